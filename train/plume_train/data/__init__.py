"""From a row of a file to a batch of tensors. It runs no model. Start with `records.py`."""
