"""Readers of data sets: published formats, NumPy arrays, the order of the rows, augmentation."""
