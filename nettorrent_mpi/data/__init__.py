"""Floor 1: readers of published formats, the order of the rows, augmentation."""
