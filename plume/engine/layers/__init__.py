"""transformers' layers in fewer operations. It chooses no backend and knows no Triton. Start with `text.py`."""
