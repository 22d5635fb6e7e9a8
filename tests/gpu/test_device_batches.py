"""Mini-batches gathered on a GPU equal those that the CPU gathers, bit for bit, in every order of work that events
allow."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nettorrent_mpi.data.augment import Augment
from nettorrent_mpi.data.from_arrays import from_arrays
from nettorrent_mpi.data.rows import Dataset, private
from nettorrent_mpi.data.sampler import Sampler
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.device import make_device
from nettorrent_mpi.device.gpu import Gpu
from nettorrent_mpi.device.gpu.pinned import PinnedRing
from nettorrent_mpi.engine.batches import Batches
from nettorrent_mpi.engine.device_batches import DeviceBatches, open_batches
from nettorrent_mpi.plan.actions import Action
from nettorrent_mpi.plan.blocks import span
from nettorrent_mpi.plan.schedule import build
from nettorrent_mpi.plan.stream import staleness_bound, stream_step
from nettorrent_mpi.plan.topology import Stage, Topology
from tests.gpu.host.build import compiler
from tests.gpu.host.runtime import HostRuntime

pytestmark = pytest.mark.skipif(compiler() is None, reason="g++ is not installed")

BATCH, PIECES = 10, 3


@dataclass(frozen=True)
class Case:
    """A case is one data set, one layout, and where its rows lie."""

    rows: int = 37  # four mini-batches an epoch, the last one smaller
    shape: tuple[int, ...] = (5, 6, 3)
    stored: str = "uint8"
    x: str = "float32"
    classes: int | None = 7
    augment: tuple[str, ...] = ()
    mean: Any = None
    std: Any = None
    topology: Topology = field(default_factory=lambda: Topology(1, (Stage(0, 1, 1, 1),)))
    exact: bool = True
    validation: float = 0.0
    disjoint: bool = False
    resident: bool = True
    asynchronous: bool = False
    capture: bool = True

    @property
    def ahead(self) -> int:
        return staleness_bound(len(self.topology.stages), PIECES, 0) if self.asynchronous else 0

    def dataset(self) -> Dataset:
        rng = np.random.default_rng(3)
        shape = (self.rows, *self.shape)
        values = rng.integers(0, 256, shape) if self.stored == "uint8" else rng.standard_normal(shape) * 3
        x = values.astype(self.stored)
        y = rng.integers(0, self.classes, self.rows) if self.classes else rng.standard_normal((self.rows, 2))
        return from_arrays(x, y, mean=self.mean, std=self.std)

    def sampler(self) -> Sampler:
        return Sampler(
            self.rows,
            5,
            self.validation,
            BATCH,
            replicas=self.topology.replicas,
            micro_batches=PIECES,
            partition="disjoint" if self.disjoint else "shared",
        )


class Buffers(SimpleNamespace):
    """Buffers are as much of a wiring as batches ask for."""

    def __init__(self, case: Case, rank: int, empty: Callable[..., Array]):
        topology = case.topology
        place = topology.place(rank)
        super().__init__(topology=topology, place=place, exact=case.exact)
        self.is_first, self.is_last = place.stage == 0, place.stage == len(topology.stages) - 1
        self.slots, self.shape = len(topology.stages) - place.stage + PIECES, case.shape
        dtype = pytest.importorskip("ml_dtypes").bfloat16 if case.x == "bfloat16" else case.x
        self.memory = [empty((BATCH, *case.shape), dtype) for _ in range(self.slots + 1)]

    def has_room(self, size: int) -> bool:
        return True

    def x(self, g: int, rows: int) -> Array:
        return self.memory[g % self.slots][:rows]

    def ahead(self, rows: int) -> Array:
        return self.memory[-1][:rows]

    def take_ahead(self, g: int) -> None:
        place = g % self.slots
        self.memory[place], self.memory[-1] = self.memory[-1], self.memory[place]


def gpu(seed: int) -> Gpu:
    """A device whose order of work the seed decides."""
    device = Gpu(HostRuntime(seed, memory=1 << 28))
    device.arena.reserve(1 << 18)
    return device


def lists(case: Case, stage: int, steps: int) -> list[Sequence[Action]]:
    """The actions of each step from one rest to the next."""
    stages = len(case.topology.stages)
    if case.asynchronous:
        return [stream_step(stages, PIECES, stage, first=n == 0, left=steps - n) for n in range(steps)]
    return [build("1f1b", stages, PIECES)[stage]] * steps


class Reader:
    """A reader does with batches what a pipeline does, and keeps what they gave in the order of the calls."""

    def __init__(self, case: Case, batches: Batches, wiring: Buffers, device: Gpu | None):
        self.case, self.batches, self.wiring, self.device = case, batches, wiring, device
        self.ahead = case.ahead
        self.found: list[tuple[str, Array]] = []
        self.graphs: dict[Hashable, Any] = {}
        self.replayed = 0
        if device:
            self.steps = device.numbers(1 + self.ahead)

    def train(self, first: int, count: int) -> None:
        """Steps first.. from one rest to the next."""
        base = 0
        for n, actions in enumerate(lists(self.case, self.wiring.place.stage, count)):
            self.batches.begin_step(first + n, PIECES)
            base = base if self.case.asynchronous else 0
            self._do(self.batches, actions, base, first + n)
            base += PIECES

    def evaluate(self, rows: Array, batches: Batches, alone: bool = False) -> None:
        most = span(BATCH, PIECES, 0).size
        if alone:
            most = max(most // self.case.topology.replicas, 1)
        pieces = -(-len(rows) // most)
        batches.begin_rows(rows, pieces, alone=alone)
        self._do(batches, [Action(self.wiring.place.stage, "F", m) for m in range(pieces)], 0, None)

    def _do(self, batches: Batches, actions: Sequence[Action], base: int, step: int | None) -> None:
        """Do what a pipeline does with a list of actions; loads in every other step only."""
        device = self.device
        if device and step is not None:
            self.steps.set(range(step, step + 1 + self.ahead))
        batches.prepare(actions, [self.steps.array[i : i + 1] for i in range(1 + self.ahead)] if device else ())
        key = batches.key()
        forward = [a.micro_batch or 0 for a in actions if a.kind == "F"]

        def read(m: int) -> None:
            self._use("x", batches.inputs(m, base + m))
            if self.wiring.is_last:
                self._use("targets", batches.targets(m))

        captured = device is not None and key is not None and step is not None and self.case.capture
        if captured and device:
            whole = (key, base % self.wiring.slots, tuple(forward))
            if whole in self.graphs:
                self.replayed += 1
            else:
                self.graphs[whole] = device.runtime.capture(device.stream, lambda: [read(m) for m in forward])
            self.graphs[whole].launch(device.stream)
        for action in actions:
            if action.kind == "L" and step is not None and step % 2:
                batches.load(action.micro_batch or 0)
            elif action.kind == "F" and not captured:
                read(action.micro_batch or 0)

    def _use(self, name: str, array: Array) -> None:
        if self.device is None:
            self.found.append((name, array.copy()))
        elif array.size:
            work: Any = self.device.runtime
            inside = work.within(array)
            self.device.stream.enqueue(f"use of {name}", lambda: self.found.append((name, inside.copy())))


def scripts(reader: Reader, test: Batches, case: Case, sampler: Sampler) -> None:
    """Two rests, evaluations between, and steps over three epochs."""
    reader.train(0, 6)
    if len(sampler.validation_rows) and not case.topology.stages[1:]:
        reader.evaluate(sampler.validation_rows, reader.batches, alone=True)
    reader.evaluate(np.array([4, 3, 11, 0, 4, 8, 2, 19, 30, 29, 28, 5, 6]), test)
    if len(sampler.validation_rows):
        reader.evaluate(sampler.validation_rows, reader.batches)
    reader.train(6, 5)
    reader.train(2, 2)  # as after a restart from an older checkpoint


def read(case: Case, rank: int, seed: int | None) -> Reader:
    """Everything that one rank reads: with a seed on the double, else on the CPU."""
    device: Any = make_device("cpu") if seed is None else gpu(seed)
    if seed is None and case.x == "bfloat16":  # computed in float32 and rounded once
        case = replace(case, x="float32")
    wiring = Buffers(case, rank, device.empty)
    dataset, sampler = case.dataset(), case.sampler()
    augment = Augment(case.augment, case.shape) if case.augment else None

    def opened(**more: Any) -> Batches:
        resident = case.resident
        batches = open_batches(dataset.train, wiring, private, device, BATCH, PIECES, resident=resident, **more)
        batches.read_targets(lambda targets: None)
        return batches

    train, test = opened(sampler=sampler, augment=augment, ahead=case.ahead), opened()
    assert isinstance(train, DeviceBatches) == (seed is not None)
    reader = Reader(case, train, wiring, None if seed is None else device)
    scripts(reader, test, case, sampler)
    if seed is not None:
        device.stream.synchronize()
    return reader


def assert_equal(case: Case, seeds: int) -> None:
    replayed = 0
    for rank in range(case.topology.size):
        wanted = [(name, array) for name, array in read(case, rank, None).found if array.size]
        for seed in range(seeds):
            reader = read(case, rank, seed)
            replayed += reader.replayed
            names = [name for name, _ in reader.found]
            assert names == [name for name, _ in wanted]
            for (name, found), (_, want) in zip(reader.found, wanted, strict=True):
                if name == "x" and not reader.wiring.is_first:
                    continue
                same = want.astype(found.dtype) if found.dtype.name == "bfloat16" else want
                assert found.dtype == same.dtype
                np.testing.assert_array_equal(found.view(np.uint8), same.view(np.uint8))
    assert replayed > 0 or not case.capture


ALONE = Topology(1, (Stage(0, 1, 1, 1),))
STAGES = Topology(1, (Stage(0, 1, 1, 1), Stage(1, 2, 1, 1), Stage(2, 3, 1, 1), Stage(3, 4, 1, 1), Stage(4, 5, 1, 1)))
TEAMS = Topology(2, (Stage(0, 1, 2, 1), Stage(1, 2, 1, 2)))
CASES = {
    "bytes": Case(),
    "augmented": Case(augment=("flip", "crop"), mean=[0.1, 0.2, 0.3], std=[0.5, 0.25, 0.75]),
    "flipped floats, validation": Case(stored="float32", augment=("flip",), mean=0.3, validation=0.3),
    "cropped, float64": Case(stored="float64", x="float64", augment=("crop",), validation=0.2, std=[3.0, 0.7, 1.1]),
    "bfloat16": Case(x="bfloat16", augment=("crop",), mean=0.4, std=[0.1, 0.3, 0.2]),
    "half precision": Case(stored="float16", shape=(7,), classes=None),
    "other byte order": Case(stored=">f8", shape=(3,), x="float64", classes=None),
    "teams and replicas": Case(topology=TEAMS, augment=("flip", "crop"), validation=0.2),
    "disjoint": Case(topology=Topology(3, (Stage(0, 1, 1, 1),)), exact=False, disjoint=True, validation=0.2),
    "async": Case(topology=STAGES, asynchronous=True, augment=("flip",)),
    "async, short epochs": Case(topology=STAGES, asynchronous=True, rows=31, validation=0.6, augment=("flip",)),
}


@pytest.mark.parametrize("resident", [True, False], ids=["resident", "staged"])
@pytest.mark.parametrize("name", CASES)
def test_the_device_gathers_what_the_cpu_gathers(name: str, resident: bool) -> None:
    case = replace(CASES[name], resident=resident)
    assert_equal(case, 2)
    assert_equal(replace(case, capture=False), 1)


@pytest.mark.long
@pytest.mark.parametrize("resident", [True, False], ids=["resident", "staged"])
@pytest.mark.parametrize("name", ["augmented", "teams and replicas", "async"])
def test_in_many_orders(name: str, resident: bool) -> None:
    assert_equal(replace(CASES[name], resident=resident), 40)


@pytest.mark.parametrize("room", [True, False])
def test_rows_are_resident_where_there_is_room(room: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case, device = Case(), gpu(0)
    monkeypatch.setattr(device, "has_room", lambda size: room)
    batches = open_batches(case.dataset().train, Buffers(case, 0, device.empty), private, device, BATCH, PIECES)
    assert isinstance(batches, DeviceBatches)
    assert (batches._resident is not None) == room


def test_batches_with_a_name_use_the_same_memory_again() -> None:
    case, device = Case(), gpu(0)
    wiring, used = Buffers(case, 0, device.empty), []
    for _ in range(3):
        open_batches(case.dataset().train, wiring, private, device, BATCH, PIECES, resident=False, name="again")
        used.append(device.arena.used)
    assert used[0] == used[2]


class Hasty(PinnedRing):
    """A ring whose host does not wait for a pinned buffer."""

    def stage(self, position: int, size: int, fill: Callable[[Array], None], after: Any = None) -> None:
        self._arrived[position] = None
        super().stage(position, size, fill, after)


class Overwriting(PinnedRing):
    """A ring whose uploads do not wait for the computation."""

    def stage(self, position: int, size: int, fill: Callable[[Array], None], after: Any = None) -> None:
        super().stage(position, size, fill)


class Early(PinnedRing):
    """A ring whose computation does not wait for an upload."""

    def arrive(self, position: int) -> None:
        pass


@pytest.mark.parametrize("fault", [Hasty, Overwriting, Early])
def test_a_forgotten_wait_is_found(fault: type[PinnedRing], monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(resident=False, capture=False)
    wanted = [array for _, array in read(case, 0, None).found if array.size]
    monkeypatch.setattr("nettorrent_mpi.device.gpu.PinnedRing", fault)
    seeds = range(12)
    wrong = sum(
        any(not np.array_equal(found, want) for (_, found), want in zip(read(case, 0, seed).found, wanted, strict=True))
        for seed in seeds
    )
    assert wrong >= 3
