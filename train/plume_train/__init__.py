"""Explicit-to-latent curriculum training."""
