"""Operations on vectors, without a model or a file: sums, logic, cut-offs, orders, labels. Start with `arithmetic.py`."""
