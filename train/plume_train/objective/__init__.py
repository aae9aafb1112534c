"""From the model's outputs to a loss and its gradient. It reads no data. Start with `objective.py`."""
