"""Holds the configuration that ships with the package."""

from __future__ import annotations

SHIPPED = "the built-in configuration"  # how messages call DEFAULT

# What `train` runs without a CONFIG; configs/digits.yaml is the same text.
DEFAULT = """\
# A small convolutional network for the handwritten digits that ship with the package (8 x 8 pixels, one channel).
# Run it:   mpirun -n 4 python -m nettorrent_mpi.train configs/digits.yaml
# Change it from the command line:   --set train.epochs=5 --set model.layers.0.conv2d.filters=16
seed: 1                          # every random number of the run comes from it, however many ranks there are
data: {name: digits}
model:
  # A layer is a name (flatten), or a name with its options. conv2d and linear have weights: each of the four heads a
  # swarm of ranks, together with the layers after it, so that 4 ranks make 4 swarms.
  layers:
    - conv2d: {filters: 32, kernel: 3, padding: same, activation: relu}
    - max_pool2d: 2              # the first option may stand alone: the same as {size: 2}
    - conv2d: {filters: 64, kernel: 3, padding: same, activation: relu}
    - max_pool2d: 2
    - flatten                    # 2 x 2 pixels x 64 filters become 256 numbers
    - linear: {units: 64, activation: relu}
    - dropout: 0.25              # in training, each of the 64 is left out in a quarter of the rows
    - linear: {units: 10}        # one number per digit; the loss turns them into probabilities
  loss: cross_entropy
train:
  epochs: 20
  batch_size: 32                 # rows for one update of the weights: the same on 1 rank and on 100
  micro_batches: 4               # pieces of 8 rows follow each other through the swarms, so that none waits for long
  optimizer: {adam: {lr: 0.004}}
  schedule: cosine               # the learning rate falls to zero along half a cosine
layout: layers                   # one swarm per weight layer, sized by its cost
"""
