"""Looking inside a rollout, as numbers and as pictures. The model never imports it. Start with `trace.py`."""
