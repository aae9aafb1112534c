"""The ops of a latent step and who computes them. It reads no prefixes. Start with `ops.py`."""
