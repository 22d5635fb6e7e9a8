"""Handwritten characters become what the data set of a network has, for commands that show it what people write."""

from __future__ import annotations

import numpy as np

from nettorrent_mpi.data.handwriting import HANDS, hand_of, prepared
from nettorrent_mpi.data.strokes import GLYPHS, inked
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.engine.trained_network import TrainedNetwork
from nettorrent_mpi.plan.errors import ConfigError, UserError, readable


class Characters:
    """Characters are prepared as the data set of a network prepared its own.

    like: the data sets whose preparation is meant, one of HANDS; None: that on which the network was trained. Raises
    UserError for a network that reads no handwriting.
    """

    def __init__(self, network: TrainedNetwork, like: str | None = None):
        data = network.trained_on.name
        if like is not None and like not in HANDS:
            raise ConfigError(f"--like {like}: there are {', '.join(HANDS)}")
        chosen = like or hand_of(data)
        if chosen is None:
            text = f"was trained on data of the kind {readable(data)}, not on {', '.join(HANDS)}"
            raise UserError(f"{network.file} {text}: say with --like which of these its pictures resemble")
        shape = network.shape
        if len(shape) != 3 or shape[0] != shape[1] or shape[2] != 1 or not network.classes:
            text = f"reads rows of {shape} and knows {len(network.classes)} classes; "
            raise UserError(f"{network.file} {text}handwriting has square grey pictures and classes")
        self.like, self.hand, self._network = chosen, HANDS[chosen], network
        self.transposed = self._reads_transposed()

    def prepared(self, ink: Array) -> Array | None:
        """Return the character in the ink (height, width), 0 for paper and 1 for ink, as the data set shows it upright:
        (side, side), values of 0 to 1; None where there is none."""
        return prepared(ink, self.hand, self._network.shape[0])

    def row(self, character: Array) -> Array:
        """Return a prepared character as a row of the data set, (side, side, 1)."""
        row: Array = self._rows((character.T if self.transposed else character)[np.newaxis])[0]
        return row

    def _rows(self, values: Array) -> Array:
        unit = self._network.trained_on.unit
        rows = values[..., np.newaxis]
        return rows if unit is None else np.rint(rows / unit).astype(np.uint8)

    def _reads_transposed(self) -> bool:
        """Whether the network knows its characters transposed, as it does where the files of EMNIST were taken as they
        are: then it reads plain characters better that way."""
        network = self._network
        known = [name for name in network.classes if name.upper() in GLYPHS]
        if not known or network.trained_on.transposed:
            return False
        found = [self.prepared(inked(GLYPHS[name.upper()], self.hand.pen)) for name in known]
        upright = np.stack([each for each in found if each is not None])
        right = [
            sum(network.classes[i] == name for i, name in zip(network.predict(self._rows(values)), known, strict=True))
            for values in (upright, upright.transpose(0, 2, 1))
        ]
        return bool(right[1] > 2 * right[0])
