"""Quality and speed of plume and its baselines."""
