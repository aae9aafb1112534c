"""The definition of the model, which training and inference share. No engine, no losses. Start with `rollout.py`."""
