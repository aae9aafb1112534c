"""An embedding server: any client of OpenAI's, vLLM's, Jina's, Cohere's or TEI's API gets a checkpoint's vectors."""
