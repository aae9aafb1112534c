"""`Plume`, the user's object, and one call of its `encode`. It computes no layer. Start with `plume.py`."""
