"""Operations on vectors, without a model or a file: sums, logic, cut-offs, orders, labels. Each file stands alone."""
