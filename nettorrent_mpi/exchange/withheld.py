"""A part of a replica's own steps is withheld from its parameters until peers know of it (plan/gossip_rules.py)."""

from __future__ import annotations

from collections.abc import Sequence

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.device import Device
from nettorrent_mpi.exchange.vector import Vector
from nettorrent_mpi.plan.exchange_specs import Gossip
from nettorrent_mpi.plan.gossip_rules import withholding


class Withheld:
    """Withheld `changes` are arrays like the `parameters`, which the vector's values include and the parameters do not:
    `part` of each step, from its end until the vector releases them; none where that is 0."""

    def __init__(self, spec: Gossip, replicas: int, parameters: Sequence[Array], vector: Vector, device: Device):
        self._spec, self._replicas, self._device = spec, replicas, device
        self._parameters, self._vector = parameters, vector
        self.part = 0.0
        self.changes: list[Array] = []
        self._before: list[Array] = []

    def choose(self, parts: int) -> None:
        """Choose what is withheld where this number of parts takes turns. Settled, so that nothing is at present."""
        self.part = withholding(self._spec, self._replicas, parts)
        arrays = self._parameters if self.part else ()
        self._before = [self._device.empty(array.shape, array.dtype) for array in arrays]
        self.changes = [self._device.zeros(array.shape, array.dtype) for array in arrays]
        self._vector.withhold(self.changes)

    def begin_step(self) -> None:
        """Remember the parameters before the optimizer's update. Nothing is withheld of the step before any more."""
        for parameters, before in zip(self._parameters, self._before, strict=False):
            self._device.ops.copy(before, parameters)

    def end_step(self) -> None:
        """Take `part` of the update back."""
        for parameters, before, change in zip(self._parameters, self._before, self.changes, strict=False):
            self._device.ops.withhold(parameters, before, change, self.part)

    def forget(self) -> None:
        """Withhold nothing of the steps so far: the parameters were replaced."""
        for change in self.changes:
            self._device.ops.fill(change, 0)

    @property
    def arrays(self) -> list[Array]:
        """Return what changes while changes are released: nothing where none are withheld."""
        return [*self._parameters, *self.changes] if self.part else []
