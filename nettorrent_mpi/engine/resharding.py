"""Resharding moves a training's state, blocks in global coordinates, to the ranks of another layout (plan/moves.py)."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby

import numpy as np

from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.engine.state import PARAMETERS
from nettorrent_mpi.plan.moves import Holding, moves, within
from nettorrent_mpi.plan.records import dataclass

REPLICAS = "replicas"
TAG = 78
READS = 4  # how often arrays are taken each time: numbers of ranks, the newest weights, memories, earlier versions


def takes(replicas: int, now: int) -> int:
    """Return how often arrays are taken when `replicas` differing replicas become `now`: once their common state, and
    then each one's own if their number stays the same."""
    return 2 if 1 < replicas == now else 1


def of_replica(replica: int, name: str) -> str:
    """Return the name of one replica's array, where replicas differ."""
    return f"{REPLICAS}/{replica}/{name}"


@dataclass(frozen=True)
class Blocks:
    """Blocks are what one rank holds of a training at rest after `steps` steps.

    An array is named "parameters/<layer>/<name>", "optimizer/<state>/<layer>/<name>", "exchange/...", "versions/..." or
    "numbers/...". Where
    `replicas` of them differ, these are their average, and each one's own are named "replicas/<number>/..." besides.
    `group` contains all ranks that hold parts of this state: resharding is collective over it.
    """

    group: Group
    arrays: Mapping[Holding, Array]
    replicas: int
    steps: int

    def take(self, prefix: str, wanted: Mapping[Holding, Array]) -> None:
        """Fill the wanted arrays with the values of those that have these names after `prefix`. All ranks of the group
        call, equally often.

        Arrays other than parameters stay unchanged if no rank of the group has them.
        """
        names: set[str] = set().union(*self.group.gather_objects({holding.name for holding in self.arrays}))
        known = {
            Holding(prefix + name, box): array
            for (name, box), array in wanted.items()
            if prefix + name in names or name.startswith(PARAMETERS)
        }
        move(self.group, self.arrays, known)

    def give(self, replicas: int = 1) -> None:
        """Send these blocks to the ranks that want them, and receive none.

        Every rank of `group` either calls this or attaches an engine to its blocks; `replicas` is the number of
        differing replicas in that engine's plan.
        """
        for _ in range(READS * takes(self.replicas, replicas)):
            self.take("", {})


def move(group: Group, held: Mapping[Holding, Array], wanted: Mapping[Holding, Array]) -> None:
    """Fill the wanted arrays from the blocks that the ranks of `group` hold. All of them call, each with its own
    blocks.

    Arrays move one by one, so that at most one is in flight. Raises LostStateError if no rank holds what is wanted.
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
