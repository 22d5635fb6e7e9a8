"""Each rank keeps a row of numbers for itself besides blocks of arrays: in the state, for the same rank of the same
layout."""

from __future__ import annotations

import numpy as np

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.engine.metrics import ROWS, SUMS, Metrics
from nettorrent_mpi.engine.update import Update
from nettorrent_mpi.exchange.base import Exchange
from nettorrent_mpi.plan.blocks import Span
from nettorrent_mpi.plan.moves import Holding
from nettorrent_mpi.plan.topology import Topology

NUMBERS = "numbers"  # the first part of the array's name
_SUMS = 2 * SUMS  # of the metrics


class RankNumbers:
    """The RankNumbers of one rank are what was summed since the last report, the loss that its exchange is told next,
    and what the exchange keeps (`Exchange.numbers`).

    The array's name tells the layout, so that ranks of another one, and of another exchange, do not find it. It has a
    row for each rank: of a replica where replicas differ, otherwise of the world.
    """

    def __init__(self, topology: Topology, rank: int, metrics: Metrics, update: Update, exchange: Exchange):
        self._metrics, self._update, self._exchange = metrics, update, exchange
        apart = exchange.count > 1
        row = rank % (topology.size // topology.replicas) if apart else rank
        self._length = _SUMS + 2 + exchange.numbers().size
        self._device = exchange.device
        self._array = self._device.zeros((1, self._length), "float64")
        stages = "".join(f".{s.first}to{s.stop}x{s.rows}x{s.cols}" for s in topology.stages)
        name = f"{NUMBERS}/{topology.replicas}{stages}.{self._length}"
        self._holding = Holding(name, (Span(row, row + 1), Span(0, self._length)))

    def now(self) -> dict[Holding, Array]:
        """Return the numbers after the present step, on the device. All ranks of a replica call, after the same
        step."""
        loss = self._update.loss
        told = (0.0, 0.0) if loss is None else loss.look()
        self._device.upload(self._array[0], np.concatenate([self._metrics.sums(), told, self._exchange.numbers()]))
        return {self._holding: self._array}

    def kept(self) -> dict[Holding, Array]:
        """Return the numbers as they were when the present step began, on a CPU, with the exact exchange. Not
        collective."""
        return {self._holding: np.array([[*self._metrics.kept(), 0.0, 0.0, *self._exchange.numbers()]])}

    def wanted(self) -> dict[Holding, Array]:
        """Return the array, in host memory, that is to be filled for `restore`; where nothing is known of it, it stays
        as it is."""
        return {self._holding: np.full((1, self._length), np.nan)}

    def restore(self, wanted: dict[Holding, Array]) -> None:
        """Continue with these numbers, if they are known. All ranks call."""
        numbers = wanted[self._holding][0]
        if np.isnan(numbers[ROWS]):
            return
        self._metrics.restore(numbers[:_SUMS].tolist())
        if self._update.loss is not None:
            self._update.loss.restore(*numbers[_SUMS : _SUMS + 2].tolist())
        self._exchange.take_numbers(numbers[_SUMS + 2 :])
