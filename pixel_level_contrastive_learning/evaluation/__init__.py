"""Evaluation: whether it worked, with labels and without."""
