"""The same vectors as `plume.model`, faster. It opens no files. Start with `engine.py`."""
