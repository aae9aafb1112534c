"""What a user passes, until it is tensors. It knows neither the model nor a device. Start with `item.py`."""
