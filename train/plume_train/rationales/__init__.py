"""Rationales for pairs that have none, written by any model behind an OpenAI-compatible endpoint."""
