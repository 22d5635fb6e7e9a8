"""The decisions of a recovery: who keeps a copy of whose blocks, which copies make up a whole state when ranks are
lost, and the layout in which the survivors go on.

Ranks copy what they own after the same steps, and send it to a buddy. A copy is *complete* where all of it has come;
a step is *whole* once each rank of the network's group has its own copy of it and its ward's complete. All know that
only some time later (a barrier that nobody waits for tells them).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from math import ceil
from typing import NamedTuple

from nettorrent_mpi.plan.blocks import Span
from nettorrent_mpi.plan.cost import predict
from nettorrent_mpi.plan.layouts import partition
from nettorrent_mpi.plan.performance import Machine
from nettorrent_mpi.plan.records import dataclass
from nettorrent_mpi.plan.search import divided
from nettorrent_mpi.plan.sizes import most_rows
from nettorrent_mpi.plan.topology import LayerFacts, Topology

PLACES = 2  # for copies of a rank's blocks, here and at its buddy: see Copies
COPYINGS = 3  # times that a rank copies what it owns for its buddy: to its own memory, to a message, and from another's
MESSAGES = 10  # of one copy, with those that tell that all are there
PART = 0.01  # of the time that copies may take
MOST_LOST = 30.0  # seconds of work since the last copies, for which they may take more
AS_NEAR = 1.1  # times that differ by less than this factor are nearly the same


def buddies(nodes: Sequence[int]) -> list[int]:
    """Return for each rank the one that keeps a copy of its blocks: a permutation. `nodes` gives each rank's node.

    No rank is its own buddy, unless it is alone, and as many as possible have theirs on another node. Ranks are each
    other's buddies, but for a circle of three where their number is odd: so few pairs of ranks cannot both be lost.
    """
    size, half = len(nodes), len(nodes) // 2
    if size == 1:
        return [0]
    counts = Counter(nodes)
    order = sorted(range(size), key=lambda rank: (-counts[nodes[rank]], nodes[rank], rank))
    found = [0] * size
    for a, b in ((order[i], order[i + half]) for i in range(half)):
        found[a], found[b] = b, a
    if size % 2:  # 0 -> half -> the last -> 0
        found[order[half]], found[order[-1]] = order[-1], order[0]
    return found


def seconds_of_copies(owned: int) -> float:
    """Predict the seconds in which a rank copies what it owns, so many bytes, and sends it to its buddy."""
    machine = Machine()
    return COPYINGS * owned / machine.bandwidth + MESSAGES * machine.latency


def copies_due(copies: float, step: float) -> int:
    """Return after how many steps there are copies again, which take `copies` seconds, as a step takes `step`: so that
    they take PART of the time, but the work of MOST_LOST seconds at most can be lost."""
    return max(1, min(ceil(copies / (PART * step)), int(MOST_LOST / step)))


class Kept(NamedTuple):
    """A Kept is a complete copy of the blocks that a rank owned after a step."""

    step: int
    rank: int


class Copies:
    """Copies are where one rank keeps its own and its ward's blocks: two places for each, which take turns.

    A place may be overwritten when the step in the other one is whole, and this rank knows it. So all ranks have the
    last step that any of them knows to be whole, whenever some of them are lost, and whatever is under way. One place
    would not do: a rank whose buddy is lost would have overwritten its own copy of that step, or the buddy of a lost
    rank the ward's.
    """

    def __init__(self) -> None:
        self._own: list[int | None] = [None] * PLACES
        self._ward: list[int | None] = [None] * PLACES
        self.whole: int | None = None  # the last step that this rank knows to be whole
        self.place = 0  # of the latest step's copies

    @property
    def latest(self) -> int | None:
        """The latest step that has been begun."""
        return self._own[self.place]

    def begin(self, step: int) -> int:
        """Return the place for copies of this step, which are written from now on. The step before is whole."""
        assert self.latest == self.whole, "the place of a copy that may still be needed would be overwritten"
        self.place = (self.place + 1) % PLACES
        self._own[self.place], self._ward[self.place] = step, None
        return self.place

    def arrived(self) -> None:
        """Note that the ward's copy of the latest step is complete."""
        self._ward[self.place] = self.latest

    def all_have(self) -> None:
        """Note that the latest step is whole."""
        assert self._ward[self.place] == self.latest
        self.whole = self.latest

    def kept(self) -> list[tuple[int, bool, int]]:
        """Return (step, whether the ward's, place) of each complete copy."""
        both = ((False, self._own), (True, self._ward))
        return [(step, ward, i) for ward, steps in both for i, step in enumerate(steps) if step is not None]


@dataclass(frozen=True)
class Survivor:
    """A Survivor tells what one rank brings: its number before the loss, its complete copies, and, where replicas
    differ, the step after which all ranks of its replica live and are at rest; None if they do not."""

    rank: int
    kept: Sequence[Kept] = ()
    live: int | None = None


class LiveReplicas(NamedTuple):
    """Replicas that differ go on with what their ranks hold, from `step` on."""

    replicas: tuple[int, ...]  # their numbers before the loss
    step: int


class Bring(NamedTuple):
    """Survivor `survivor` (its position among them) brings its copy of what `rank` owned after `step`."""

    survivor: int
    rank: int
    step: int


class Snapshot(NamedTuple):
    """The state comes from copies. `replicas` has the numbers of the replicas that they make up, only the first where
    all are equal; of several the steps may differ, and `step` is the latest."""

    replicas: tuple[int, ...]
    step: int
    bring: tuple[Bring, ...]


def source(topology: Topology, apart: bool, survivors: Sequence[Survivor]) -> LiveReplicas | Snapshot | None:
    """Return where the state of a run in this topology comes from after a loss: the newest whole one; None if there is
    none. `apart`: replicas differ. All survivors compute it from the same facts."""
    if not apart:
        copies = _newest(range(topology.size), survivors)
        return Snapshot((0,), copies[0].step, copies) if copies else None
    there = {survivor.rank: survivor.live for survivor in survivors}
    live: dict[int, int] = {}
    found: dict[int, tuple[Bring, ...]] = {}
    for replica in range(topology.replicas):
        ranks = topology.replica(replica)
        step = there.get(ranks[0])
        if step is not None and all(there.get(rank) == step for rank in ranks):
            live[replica] = step
        elif copies := _newest(ranks, survivors):
            found[replica] = copies
    if live:
        return LiveReplicas(tuple(live), max(live.values()))
    if not found:
        return None
    every = tuple(bring for copies in found.values() for bring in copies)
    return Snapshot(tuple(found), max(bring.step for bring in every), every)


def _newest(ranks: Sequence[int], survivors: Sequence[Survivor]) -> tuple[Bring, ...]:
    """Return who brings what each of these ranks owned after the newest step of which there are all copies; if there is
    one. A rank brings its own, where it lives."""
    by_rank: dict[int, dict[int, int]] = {rank: {} for rank in ranks}
    for position, survivor in enumerate(survivors):
        for step, rank in survivor.kept:
            if rank in by_rank and (rank == survivor.rank or step not in by_rank[rank]):
                by_rank[rank][step] = position
    steps = set.intersection(*(set(found) for found in by_rank.values()))
    if not steps:
        return ()
    newest = max(steps)
    return tuple(Bring(by_rank[rank][newest], rank, newest) for rank in ranks)


def replicas_of_survivors(old: Topology, ranks: int, there: int) -> int:
    """Return the number of replicas that differ on this many ranks, of `there` that have a state: all, as long as each
    can have a rank for each of the old stages."""
    return min(there, max(1, ranks // len(old.stages)))


def layout_of_survivors(
    facts: Sequence[LayerFacts],
    old: Topology,
    ranks: int,
    there: int,
    batch_size: int,
    pieces: Callable[[int, int], int],
    pipeline: str,
    machine: Machine | None = None,
    *,
    exact: bool,
) -> Topology:
    """Return the layout in which `ranks` survivors of a run in the layout `old` go on.

    `there` replicas bring a state of their own, and get equally many ranks; a few ranks may have no place
    (`places_of_survivors`). With an exact exchange all replicas are equal, as many as before are wanted, and all ranks
    are used. `pieces` gives the number of micro-batches for numbers of stages and of replicas. Where teams of the old
    shape use these ranks, they stay as they are. Otherwise the ranks of a replica are divided anew over the old stages,
    or, where they are too few, over neighbouring stages that are merged, so that the slowest is as fast as possible;
    with an exact exchange for any number of replicas, up to the old one, with which the predicted step is short: the
    nearest to the old number of those that are nearly as fast as the fastest.
    """
    team = old.size // old.replicas
    wanted = old.replicas if exact else replicas_of_survivors(old, ranks, there)
    if (ranks % team == 0 and ranks // team <= wanted) if exact else ranks // wanted == team:
        return Topology(ranks // team if exact else wanted, old.stages)
    counts = [n for n in range(1, wanted + 1) if ranks % n == 0] if exact else [wanted]
    cuts = [Span(stage.first, stage.stop) for stage in old.stages]
    found: list[tuple[float, Topology]] = []
    for replicas in counts:
        each = ranks // replicas
        groups = cuts if each >= len(cuts) else _merged(facts, cuts, each)
        many, alike = pieces(len(groups), replicas), replicas if exact else 1
        stages = divided(facts, groups, each, most_rows(batch_size, many, replicas), many, alike, machine)
        topology = Topology(replicas, tuple(stage for _, stage in stages))
        step = predict(topology, facts, batch_size, many, pipeline, machine, exact=exact, quick=True)
        found.append((step.seconds, topology))
    limit = AS_NEAR * min(seconds for seconds, _ in found)
    return max((topology for seconds, topology in found if seconds <= limit), key=lambda each: each.replicas)


def places_of_survivors(
    old: Topology, ranks: Sequence[int], found: LiveReplicas | Snapshot | None, size: int
) -> list[int]:
    """Return the positions of the survivors that go on in a layout of this size, in order. `ranks` are the survivors'
    numbers before the loss.

    Those of live replicas all go on; as ranks count up over replicas last, their teams stay where they are in their
    replica. Of the others the last ones have no place.
    """
    live = found.replicas if isinstance(found, LiveReplicas) else ()
    first = sorted(range(len(ranks)), key=lambda position: old.place(ranks[position]).replica not in live)
    return sorted(first[:size])


def _merged(facts: Sequence[LayerFacts], cuts: Sequence[Span], groups: int) -> list[Span]:
    """Return the stages as fewer ones, merged as evenly as possible."""
    weights = [sum(layer.operations for layer in facts[cut.start : cut.stop]) for cut in cuts]
    return [Span(cuts[part.start].start, cuts[part.stop - 1].stop) for part in partition(weights, groups)]
