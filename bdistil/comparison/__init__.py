"""Comparison of bdistil with other ways to train the same students, on the same data, teacher and epochs."""
