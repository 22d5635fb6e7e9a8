"""The random rows that the benchmarks of speed train on, held in memory."""

MNIST = "{name: synthetic, rows: 60000, test_rows: 0, shape: [28, 28, 1], classes: 10}"
CIFAR = "{name: synthetic, rows: 50000, test_rows: 0, shape: [32, 32, 3], classes: 10}"
AUGMENTED = CIFAR.replace("}", ", augment: [flip, crop]}")
