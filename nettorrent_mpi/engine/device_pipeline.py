"""A GPU's host launches a list of actions and goes on, while the GPU executes them.

plan/launches.py turns the list into launches on two streams, and says which waits for which. A run of compute is
executed once, so that all memory is allocated and all algorithms are chosen; then it is captured as a graph, which is
launched whenever the same run comes again. Nothing that a graph contains depends on a value of the host that changes
from step to step: learning rate, step number and row numbers lie in arrays on the GPU. Layers from outside the package
may compute with such values, so networks that have one are executed in every step.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from math import lcm
from typing import Any, NamedTuple, cast

from nettorrent_mpi.comm.activity import NOW
from nettorrent_mpi.comm.channels import launch
from nettorrent_mpi.comm.parcels import Parcel
from nettorrent_mpi.device.arrays import quiet
from nettorrent_mpi.device.device import Device, StreamDevice
from nettorrent_mpi.device.events import Event
from nettorrent_mpi.engine.metrics import Metrics
from nettorrent_mpi.engine.pipeline import Pipeline
from nettorrent_mpi.engine.run_plan import Plan
from nettorrent_mpi.engine.state import State
from nettorrent_mpi.engine.update import Update
from nettorrent_mpi.engine.wiring import Wiring
from nettorrent_mpi.engine.work import Work
from nettorrent_mpi.nn.layers.sequence import Sequence as Layers
from nettorrent_mpi.plan.actions import Action, Kind
from nettorrent_mpi.plan.launches import BEFORE, Compute, Item, OnHost, Transfers, awaited, launches


class _Recorded(NamedTuple):
    """A _Recorded is a run of compute that is recorded, and what its actions left behind on the host."""

    run: Callable[[], None]
    effects: list[Any]


class DevicePipeline(Pipeline):
    """A DevicePipeline runs a rank's launches. The actions of compute are those of `Pipeline`; those of transfers are
    parcels of grouped launches."""

    def __init__(
        self,
        plan: Plan,
        wiring: Wiring,
        device: Device,
        layers: Layers,
        state: State,
        update: Update,
        metrics: Metrics,
        progress: Callable[[], None] | None,
        ahead: int,
    ):
        super().__init__(plan, wiring, device, layers, state, update, metrics, progress, ahead)
        self._ctx.progress = None  # between layers the host has nothing to wait for, and may be inside a capture
        self._gpu = cast("StreamDevice", self._device)
        self._links = self._gpu.make_stream()
        self._last: dict[bool, Event | None] = {False: None, True: None}  # of compute, of links
        self._known: dict[tuple[Action, ...], tuple[list[Item], frozenset[int]]] = {}
        self._recorded: dict[Hashable, _Recorded] = {}
        self._executed = False
        # Without flush the GPU may wait for what a neighbour launches in its next step, so no report waits for it.
        self._follows = ahead > 0 and not update.reads_loss
        buffers = self._wiring.buffers
        self._period = lcm(*(count for count in buffers if count))
        self._recordable = self._wiring.capturable and not plan.network.whole.foreign

    def run(self, work: Work) -> None:
        """Launch a list of actions."""
        self.begin(work)
        items, awaited_items = self._launches(work.actions)
        events: dict[int, Event] = {}
        with quiet(), self._gpu.on(self._gpu.compute):
            for number, item in enumerate(items):
                NOW.action, NOW.step = item.actions[0], work.step + 1
                NOW.count += 1
                moves = isinstance(item, Transfers)
                stream = self._links if moves else self._gpu.compute
                if not isinstance(item, OnHost) and item.after is not None:
                    event = self._last[not moves] if item.after == BEFORE else events[item.after]
                    if event is not None:
                        stream.wait(event)
                began = self.trace.now() if self.trace else 0
                if isinstance(item, Transfers):
                    self._transfer(item.actions)
                elif isinstance(item, OnHost):
                    self._execute(item.actions)
                else:
                    self._compute(item, work)
                if self.trace and not isinstance(item, Compute):
                    self._gpu.synchronize()
                    for action in item.actions:
                        self.trace.add(work.step, action, began)
                if number in awaited_items:
                    events[number] = self._last[moves] = stream.record()
                if self._progress:
                    self._progress()
        self._base += work.pieces
        if self._follows:
            self._metrics.follow()

    def drain(self) -> None:
        """Wait for everything that was launched."""
        self._gpu.synchronize()

    def close(self) -> None:
        super().close()
        self._recorded.clear()  # NCCL waits, when a communicator is freed, for all graphs that it is used in

    def _launches(self, actions: Sequence[Action]) -> tuple[list[Item], frozenset[int]]:
        key = tuple(actions)
        known = self._known.get(key)
        if known is None:
            items = launches(actions, self._wiring.buffers)
            known = self._known[key] = items, awaited(items)
        return known

    # -- compute ------------------------------------------------------------------------------------------------------

    def _compute(self, item: Compute, work: Work) -> None:
        actions = tuple(action for action in item.actions if action.kind != "L")
        key = self._key(actions, work)
        if key is None:
            self._execute(actions)
        else:
            recorded = self._recorded.get(key)
            if recorded is None:
                run = self._device.capture(lambda: self._execute(actions))
                recorded = self._recorded[key] = _Recorded(run, [])
            self._executed = False
            recorded.run()
            if self._executed:
                recorded.effects[:] = self._effects(actions)
            else:
                self._restore(recorded.effects)
        for action in item.actions:
            if action.kind == "L":
                self._methods["L"](action.micro_batch or 0)

    def _execute(self, actions: Sequence[Action]) -> None:
        self._executed = True
        for action in actions:
            began = self.trace.now() if self.trace else 0
            self._methods[action.kind](action.micro_batch or 0)
            if self.trace:  # the GPU's own times: each action is waited for
                self._gpu.synchronize()
                self.trace.add(self._step, action, began)

    def _key(self, actions: tuple[Action, ...], work: Work) -> Hashable | None:
        """Return what the arrays and arguments of a run depend on, None where it cannot be recorded. It is the same on
        all ranks of a swarm, so that all of them record, or all of them launch, an operation that needs all."""
        told = work.batches.key()
        if told is None or not work.training or not actions or self.trace or not self._recordable:
            return None
        versions = {id(params): number for number, params in enumerate(self._state.versions)}
        used = tuple(None if params is None else versions.get(id(params), -1) for params in self._params)
        return actions, told, self._base % self._period, self._state.kept, used

    def _effects(self, actions: Sequence[Action]) -> list[Any]:
        """Return what these actions have left behind on the host for later ones."""
        slots = self._slots_of(actions, "F")
        written = [(slot, self._saved[slot], self._dy[slot], self._y[slot]) for slot in slots]
        left = [(slot, list(self._held[slot])) for slot in self._slots_of(actions, "I")]
        return [written, left, list(self._params), self._state.kept]

    def _slots_of(self, actions: Sequence[Action], kind: Kind) -> set[int]:
        return {(self._base + (a.micro_batch or 0)) % self._wiring.slots for a in actions if a.kind == kind}

    def _restore(self, effects: list[Any]) -> None:
        written, left, self._params[:], self._state.kept = effects
        for slot, held in left:
            self._held[slot][:] = held
        for slot, saved, dy, y in written:
            self._saved[slot], self._dy[slot], self._y[slot] = saved, dy, y

    # -- transfers ----------------------------------------------------------------------------------------------------

    def _transfer(self, actions: Sequence[Action]) -> None:
        """Launch neighbouring transfers as one group, on the stream of links."""
        parcels = [self._parcel(action) for action in actions]
        with self._gpu.on(self._links):
            for parcel in parcels:
                parcel.pack()
            launch([message for parcel in parcels for message in parcel.messages])
            for parcel in parcels:
                parcel.unpack()

    def _parcel(self, action: Action) -> Parcel:
        wiring, m = self._wiring, action.micro_batch or 0
        rows, g = self._batches.rows(m), self._base + m
        if action.kind == "SA":
            y = self._y[g % wiring.slots]
            assert y is not None
            return wiring.parcel("y", y, rows.whole)
        if action.kind == "RA":
            return wiring.parcel("x", wiring.x(g, rows.mine.size), rows.whole)
        if action.kind == "SG":
            return wiring.parcel("dx", wiring.dx(g, rows.mine.size), rows.whole)
        return wiring.parcel("dy", wiring.dy(g, rows.mine.size), rows.whole)
