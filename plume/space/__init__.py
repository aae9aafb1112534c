"""Operations on vectors, without a model or a file: sums, logic, cut-offs, labels. Start with `arithmetic.py`."""
