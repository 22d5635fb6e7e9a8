"""A training recovers from the loss of ranks.

Every survivor leaves what it waits for, because the world is revoked (comm/failures.py). The world shrinks to the
survivors; they tell each other what they hold; a layout for them is chosen; the engine is attached to the new world,
and takes its state from what the survivors hold in memory, from the newest checkpoint, or begins again. Who decides
what is pure: plan/recovery.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nettorrent_mpi.comm.failures import lost
from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.comm.launcher import depart, flush
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.engine.engine import Engine
from nettorrent_mpi.engine.failure import agreed
from nettorrent_mpi.engine.resharding import Blocks, move, of_replica
from nettorrent_mpi.engine.setup import Setup, of_survivors
from nettorrent_mpi.engine.state import EXCHANGE
from nettorrent_mpi.engine.trainer import TrainingLoop
from nettorrent_mpi.engine.training_files import TrainingFiles
from nettorrent_mpi.plan.errors import warn
from nettorrent_mpi.plan.moves import Holding
from nettorrent_mpi.plan.records import dataclass
from nettorrent_mpi.plan.recovery import Kept, LiveReplicas, Snapshot, Survivor, places_of_survivors, source

if TYPE_CHECKING:
    from nettorrent_mpi.engine.safeguard import Safeguard

MEMORY, BEGINNING = "memory", "the beginning"  # sources of a state


@dataclass(frozen=True)
class Failure:
    """A Failure tells of ranks that were lost, and how the training went on without them."""

    step: int  # the last one that any survivor had completed, of a live replica if there is one
    lost: list[int]  # ranks, numbered as at the start of the program
    left: int  # ranks that go on
    left_out: list[int]  # those that live, but have no place in the new layout, and leave; numbered as `lost`
    replicas: int  # in the new layout
    live_replicas: int  # of which no rank was lost, where replicas differ: they lose not one step
    resumed_from: int  # step
    source: str  # of the state: where it came from
    seconds: float  # from when this rank saw the loss until it went on

    @property
    def line(self) -> str:
        """Tell it in one line."""
        told = (
            f"{_in_words(self.lost, 'was', 'were')} lost after step {self.step}: {self.left} go on after step "
            f"{self.resumed_from}, from {self.source} ({self.seconds:.1f} s)"
        )
        if self.left_out:
            place = f"place in {self.replicas} replica{'s' * (self.replicas > 1)} of {self.left // self.replicas}"
            told += f"; {_in_words(self.left_out, f'has no {place} and leaves', f'have no {place} and leave')}"
        return told

    def figures(self) -> dict[str, Any]:
        """Return it as in summary.json."""
        return asdict(self) | {"seconds": round(self.seconds, 3)}


def _in_words(ranks: Sequence[int], one: str, several: str) -> str:
    numbers = ", ".join(map(str, ranks))
    return f"ranks {numbers} {several}" if len(ranks) > 1 else f"rank {numbers} {one}"


class Held(NamedTuple):
    """Held is what this rank holds of a training's state in the layout of one engine: copies, and, where replicas
    differ and its own is whole, the live arrays after `step`."""

    guard: Safeguard
    step: int | None
    live: Mapping[Holding, Array]

    @property
    def survivor(self) -> Survivor:
        """Return what this rank tells the other survivors."""
        copies = self.guard.copies
        return Survivor(self.guard.rank, copies.kept() if copies is not None else (), self.step)


class Recovery:
    """A Recovery brings a training back after ranks were lost. All survivors call `recover`, wherever the loss found
    them; a further loss in it makes it begin again with what is still held: that is kept until the new engine's copies
    are whole. A survivor that has no place in the layout of the others takes part to the end, and then leaves the
    program.

    `announce` is called at the end of each recovery, on all ranks that go on; it may communicate. `resign` is called on
    one that will leave, before the others get what it holds alone.
    """

    def __init__(self, engine: Engine, loop: TrainingLoop, files: TrainingFiles, take: Callable[[Setup], None]):
        """`take` gets the setup of the survivors."""
        self._engine, self._loop, self._files, self._take = engine, loop, files, take
        self._held: list[Held] = []
        self.failures: list[Failure] = []
        self.announce: Callable[[Failure], None] = self._warn
        self.resign: Callable[[], None] = lambda: None

    def recover(self) -> bool:
        """Go on without the ranks that are lost; return whether any rank's caller has left the loop over the
        training."""
        world, loop, began, gone = self._engine.world, self._loop, time.perf_counter(), list[int]()
        while True:
            self._leave()
            try:
                gone += world.shrink()
                told = world.gather_objects((loop.step, loop.left, [held.survivor for held in self._held]))
                step = max(each for each, *_ in told)
                restored = self._restore([survivors for *_, survivors in told])
                if restored is not None:
                    where, left_out, live = restored
                    step = loop.step if live else step
                    seconds = time.perf_counter() - began
                    replicas = self._engine.topology.replicas
                    failure = Failure(
                        step, sorted(gone), world.size, left_out, replicas, live, loop.step, where, seconds
                    )
                    self.announce(failure)
                world.agree()
            except Exception as error:
                if not (lost(error, world) or world.is_broken):  # then it is what a collective call left undone
                    with suppress(Exception):
                        if agreed(error, world):
                            world.agree()  # so that those leave that were left out
                    raise
                continue
            if restored is None:
                flush()
                depart(0, others_go_on=True)
            self._held.clear()
            self.failures.append(failure)
            return any(left for _, left, _ in told)

    def _leave(self) -> None:
        """Give up what is in flight, and hold what the engine has."""
        guard, engine = self._loop.guard, self._engine
        fresh = guard is not None and all(held.guard is not guard for held in self._held)
        step = guard.assemble() if guard is not None and fresh else None
        engine.world.revoke()
        self._files.abandon()
        self._loop.abandon()
        engine.abandon()
        if guard is not None and fresh:
            guard.abandon()
            self._held.append(Held(guard, step, {} if step is None else engine.blocks.live()))

    def _restore(self, told: Sequence[Sequence[Survivor]]) -> tuple[str, list[int], int] | None:
        """Attach the engine to the survivors and give it the newest state that there is. Returns where it comes from,
        which ranks have no place, and the number of live replicas; on a rank without a place None.

        `told` has what each of them holds: of the same engines, but for the last one, which some may not have made."""
        world, loop, files = self._engine.world, self._loop, self._files
        found: LiveReplicas | Snapshot | None = None
        held, survivors = self._held[0], [each[0] for each in told]
        for number, each in reversed(list(enumerate(self._held))):
            if all(len(several) > number for several in told):
                held, survivors = each, [several[number] for several in told]
                found = source(held.guard.topology, held.guard.apart, survivors)
                if found is not None:
                    break
        with world.agreement():
            setup = of_survivors(files.setup, world.size, None if found is None else len(found.replicas))
        topology, old = setup.topology, held.guard.topology
        staying = places_of_survivors(old, [each.rank for each in survivors], found, topology.size)
        left_out = [number for position, number in enumerate(world.numbers) if position not in staying]
        stays = world.rank in staying
        if not stays:
            self.resign()
            files.close()
        whole = world.keep(staying)
        blocks = None if found is None else _brought(whole, held, survivors, found)
        if not stays:
            if blocks is not None:
                blocks.give(topology.replicas)
            return None
        files.setup = setup
        self._take(setup)
        self._engine.attach(world, setup.plan, blocks, setup.sampler)
        loop.attach()
        files.move_to_first_rank()
        where, step = MEMORY, 0
        if found is not None:
            step = found.step
        elif (path := files.read_newest()) is not None:
            step, where = loop.step, str(path)
        else:
            where = BEGINNING
        loop.resume(step, setup.sampler.samples(step), loop.time, loop.loss, None)
        files.check_best()
        if loop.guard is not None:
            loop.guard.refresh(step)
        return where, left_out, len(found.replicas) if isinstance(found, LiveReplicas) else 0

    def _warn(self, failure: Failure) -> None:
        if self._engine.world.rank == 0:
            warn(failure.line, alone=True)


def _brought(group: Group, held: Held, survivors: Sequence[Survivor], found: LiveReplicas | Snapshot) -> Blocks:
    """Return the blocks that this rank brings. All survivors call."""
    topology, rank, several = held.guard.topology, held.guard.rank, len(found.replicas) > 1
    mine: dict[int, dict[Holding, Array]] = {replica: {} for replica in found.replicas}
    if isinstance(found, LiveReplicas):
        mine.get(topology.place(rank).replica, {}).update(held.live)
    else:
        for survivor, owner, step in found.bring:
            if survivor == group.index:
                assert held.guard.copies is not None
                replica = topology.place(owner).replica if several else found.replicas[0]
                mine[replica] |= held.guard.copies.arrays(Kept(step, owner))
    if not several:
        return Blocks(group, mine[found.replicas[0]], 1, found.step)
    own = {Holding(of_replica(replica, h.name), h.box): a for replica, held_ in mine.items() for h, a in held_.items()}
    average = _average(group, mine[found.replicas[0]], own, found.replicas)
    numbered = {
        Holding(of_replica(found.replicas.index(replica), h.name), h.box): a
        for replica, held_ in mine.items()
        for h, a in held_.items()
        if not h.name.startswith(EXCHANGE)  # what all have in common: if one was lost in an exchange, it differs
    }
    return Blocks(group, average | numbered, len(found.replicas), found.step)


def _average(
    group: Group, first: Mapping[Holding, Array], own: Mapping[Holding, Array], replicas: Sequence[int]
) -> dict[Holding, Array]:
    """Return the average over the replicas of the blocks that this rank brings of the first one. All ranks call."""
    sums = {holding: np.array(array) for holding, array in first.items()}
    for replica in replicas[1:]:
        others = {holding: np.empty_like(array) for holding, array in sums.items()}
        move(group, own, {Holding(of_replica(replica, h.name), h.box): array for h, array in others.items()})
        for holding, array in others.items():
            np.add(sums[holding], array, out=sums[holding])
    for array in sums.values():
        np.divide(array, len(replicas), out=array)
    return sums
