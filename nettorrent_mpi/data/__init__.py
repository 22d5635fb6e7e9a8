"""This folder reads data sets: published formats, arrays of one's own, the order of the rows, augmentation."""
