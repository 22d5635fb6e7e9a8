"""The binary versions of CIFAR-10 and CIFAR-100 hold records of label bytes and 3,072 bytes: the red, green and blue
planes of 32 x 32 pixels, row by row (A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009).

A record of CIFAR-10 has one label, one of CIFAR-100 two: the superclass (coarse) and the class (fine).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from nettorrent_mpi.data.files import opening, size_of
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.plan.errors import DataError

SHAPE = (32, 32, 3)
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# In the order of the publisher's coarse_label_names.txt and fine_label_names.txt.
_COARSE = """
aquatic_mammals fish flowers food_containers fruit_and_vegetables household_electrical_devices household_furniture
insects large_carnivores large_man-made_outdoor_things large_natural_outdoor_scenes large_omnivores_and_herbivores
medium_mammals non-insect_invertebrates people reptiles small_mammals trees vehicles_1 vehicles_2
"""
_FINE = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm
"""
COARSE, FINE = tuple(_COARSE.split()), tuple(_FINE.split())
_PIXELS = 3072
_BLOCK = 500  # records at a time: 1.5 MB


class CifarFiles:
    """Reads the binary files of one split in sequence, whose records have so many `labels_each`, of which the one of
    number `which` says the class, one of `classes`. Opening checks sizes only. Raises DataError."""

    def __init__(self, paths: Sequence[Path], remedy: str, classes: int, labels_each: int = 1, which: int = 0):
        self._paths, self._remedy, self._classes = paths, remedy, classes
        self._labels_each, self._which, self._record = labels_each, which, labels_each + _PIXELS
        self.rows = 0
        for path in paths:
            size = size_of(path, remedy)
            if size == 0 or size % self._record:
                text = f"truncated: {size} bytes are not a whole number of records of {self._record} bytes; {remedy}"
                raise DataError(text, file=str(path), offset=size)
            self.rows += size // self._record

    def images(self, out_bHWC: Array) -> None:
        """Fill out_bHWC, (rows, 32, 32, 3) uint8."""
        row = 0
        for _, _, block in self._blocks():
            planes_bCHW = block[:, self._labels_each :].reshape(-1, 3, 32, 32)
            out_bHWC[row : row + len(block)] = planes_bCHW.transpose(0, 2, 3, 1)
            row += len(block)

    def labels(self) -> Array:
        """Read all labels: (rows,) int64."""
        labels = np.empty(self.rows, np.int64)
        row = 0
        for path, first, block in self._blocks():
            given = block[:, self._which]
            labels[row : row + len(block)] = given
            wrong = np.flatnonzero(given >= self._classes)
            if len(wrong):
                record, most = int(first + wrong[0]), self._classes - 1
                text = f"label {given[wrong[0]]} of record {record} is not in 0..{most}; {self._remedy}"
                raise DataError(text, file=str(path), offset=record * self._record + self._which)
            row += len(block)
        return labels

    def _blocks(self) -> Iterator[tuple[Path, int, Array]]:
        """Yield (file, number of the first record, records as (b, bytes)), each valid until the next one."""
        buffer = np.empty((_BLOCK, self._record), np.uint8)
        total = 0
        for path in self._paths:
            first = 0
            with opening(path, self._remedy) as file:
                while read := file.readinto(buffer.data):
                    if read % self._record:
                        offset = first * self._record + read
                        raise DataError(f"truncated within a record; {self._remedy}", file=str(path), offset=offset)
                    records = read // self._record
                    total += records
                    if total > self.rows:
                        raise DataError("grew while it was being read; run again", file=str(path))
                    yield path, first, buffer[:records]
                    first += records
        if total != self.rows:
            raise DataError("became shorter while it was being read; run again", file=str(self._paths[-1]))
