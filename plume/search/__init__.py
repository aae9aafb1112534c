"""Vectors on disk, and finding them again. It looks into no model. Start with `index.py`."""
