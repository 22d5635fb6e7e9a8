"""State that knows no group: blocks in global coordinates, and how they come to other ranks (plan/moves.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.engine.state import PARAMETERS
from nettorrent_mpi.plan.moves import Holding, moves, within

REPLICAS = "replicas"
TAG = 78


def takes(replicas: int, now: int) -> int:
    """How often arrays are taken where so many replicas that differ become as many as there are now: once what all have
    in common, and each one's own where there are as many."""
    return 2 if 1 < replicas == now else 1


def of_replica(replica: int, name: str) -> str:
    """The name of an array of one replica, where replicas differ."""
    return f"{REPLICAS}/{replica}/{name}"


@dataclass(frozen=True)
class Blocks:
    """What one rank holds of a training that has come to rest, after so many `steps`.

    An array's name is "parameters/<layer>/<name>", "optimizer/<state>/<layer>/<name>" or "exchange/...". Where
    `replicas` of them differ, these are their average, and each one's own are named "replicas/<number>/..." besides.
    `group` are all ranks that hold parts of this state: they move together.
    """

    group: Group
    arrays: Mapping[Holding, Array]
    replicas: int
    steps: int

    def take(self, prefix: str, wanted: Mapping[Holding, Array]) -> None:
        """wanted <- the values of the arrays whose names are these with `prefix` before them. What is no parameter, and
        is nowhere in the group, stays as it is. All ranks of the group call, as often."""
        names: set[str] = set().union(*self.group.gather_objects({holding.name for holding in self.arrays}))
        known = {
            Holding(prefix + name, box): array
            for (name, box), array in wanted.items()
            if prefix + name in names or name.startswith(PARAMETERS)
        }
        move(self.group, self.arrays, known)

    def give(self, replicas: int = 1) -> None:
        """Give others what they want of these blocks, and take nothing. Every rank of `group` either does this, or
        attaches an engine to them; `replicas` are those that differ in that engine's plan."""
        for _ in range(takes(self.replicas, replicas)):
            self.take("", {})


def move(group: Group, held: Mapping[Holding, Array], wanted: Mapping[Holding, Array]) -> None:
    """wanted <- the values of blocks that ranks of `group` hold. All of them call, each with its own blocks.

    Array by array, so that no more than one is on its way. Raises LostStateError where nobody holds what is wanted.
    """
    old, new = group.gather_objects(list(held)), group.gather_objects(list(wanted))
    for _, group_of_moves in groupby(moves(old, new), key=lambda move: move.name):
        sends: list[tuple[Array, int]] = []
        receives: list[tuple[Array, int]] = []
        arrived: list[tuple[Array, Array]] = []
        for name, source, target, box, from_, into in (
            (m.name, m.source, m.target, m.box, m.held, m.wanted) for m in group_of_moves
        ):
            if source == group.index:
                part = held[Holding(name, from_)][within(box, from_)]
                if target == group.index:
                    wanted[Holding(name, into)][within(box, into)] = part
                else:
                    sends.append((np.ascontiguousarray(part), target))
            elif target == group.index:
                place = wanted[Holding(name, into)][within(box, into)]
                message = np.empty(place.shape, place.dtype)
                receives.append((message, source))
                arrived.append((place, message))
        group.trade(sends, receives, TAG)
        for place, message in arrived:
            place[...] = message
