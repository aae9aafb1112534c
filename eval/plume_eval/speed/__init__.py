"""The latency bench: what reasoning costs per query, all ways of running it and the physical floor side by side."""
