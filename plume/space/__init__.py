"""Operations on vectors: labels without training. Start with `zero_shot.py`."""
