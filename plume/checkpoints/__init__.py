"""A checkpoint on disk, and what makes it complete. No forward pass. Start with `folder.py`."""
