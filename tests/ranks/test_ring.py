"""Sums and copies around rings: against sums made by hand; when they begin; what they leave in a checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from nettorrent_mpi.comm import reducers
from nettorrent_mpi.comm.group import Array, Group
from nettorrent_mpi.comm.ring import Lap, Ring, Rings, can_carry
from nettorrent_mpi.comm.world import World
from nettorrent_mpi.data.dataset import DataOptions, open_dataset
from nettorrent_mpi.data.sampler import Sampler
from nettorrent_mpi.engine import bucket_maker
from nettorrent_mpi.engine.engine import Engine
from nettorrent_mpi.engine.run_plan import Options, Plan
from nettorrent_mpi.nn.layers.linear import LinearLayer
from nettorrent_mpi.nn.model import Network
from nettorrent_mpi.plan import specs
from nettorrent_mpi.plan.topology import Stage, Topology
from tests.checkpoints import restore, saved

SIZE, RANK = MPI.COMM_WORLD.size, MPI.COMM_WORLD.rank
SHAPE, CLASSES = (6, 5, 2), 4
LAYERS = (
    specs.Flatten(),
    specs.Linear(17, activation="relu"),
    specs.Linear(19, activation="tanh"),
    specs.Linear(23, activation="relu"),
    specs.Linear(CLASSES),
)


# -- rings ------------------------------------------------------------------------------------------------------------


def numbers(member: int, ring: int, turn: int, size: int) -> Array:
    """Gradients of a member: whole numbers, so that sums are exact in any order."""
    return np.random.default_rng([member, ring, turn]).integers(-99, 99, size).astype(np.float64)


COUNTS: tuple[Callable[[int], int], ...] = (  # shards of the members
    lambda member: 5,
    lambda member: 16 * (member % 2),
    lambda member: 0 if member else 7,
    lambda member: 40_000 + member,  # longer than what MPI sends before it is asked for
)


@pytest.mark.ranks(2, 3, 4, 5, 8)
@pytest.mark.parametrize("turned", [False, True], ids=["alike", "in orders of their own"])
def test_everybody_gets_the_sums(world: MPI.Intracomm, turned: bool) -> None:
    """Several rings, any order of members, shards of any sizes; every rank begins in its own order, at other times."""
    group, rings = Group(world), Rings()
    order = list(np.random.default_rng(1).permutation(SIZE))
    made: list[tuple[Ring, Array, Array, Array, slice]] = []
    for i, count in enumerate(COUNTS):
        counts = [count(member) for member in range(SIZE)]
        own = slice(sum(counts[:RANK]), sum(counts[: RANK + 1]))
        grads, params, sums = np.zeros(sum(counts)), np.zeros(sum(counts)), np.zeros(counts[RANK])
        ring = Ring(group, order, i, grads, sums, params, counts)
        rings.add(ring)
        made.append((ring, grads, params, sums, own))
    for turn in range(3):
        turns = list(range(len(made)))
        if turned:
            turns = [*turns[RANK % len(turns) :], *turns[: RANK % len(turns)]]
        for i in turns:
            ring, grads, params, sums, own = made[i]
            grads[...] = numbers(RANK, i, turn, grads.size)
            ring.reduce.begin()
            time.sleep(0.001 * RANK)
            rings.progress()
        for i in reversed(turns):
            ring, grads, params, sums, own = made[i]
            ring.gather.post()
            rings.finish(ring.reduce)
            whole = sum(numbers(member, i, turn, grads.size) for member in range(SIZE))
            np.testing.assert_array_equal(sums, whole[own])
            params[own] = sums / 2
            ring.gather.begin()
        for i in turns:
            ring, grads, params, sums, own = made[i]
            rings.finish(ring.gather)
            ring.reduce.sent()
            ring.gather.sent()
            whole = sum(numbers(member, i, turn, grads.size) for member in range(SIZE))
            np.testing.assert_array_equal(params, whole / 2)
    world.Barrier()
    rings.free()
    assert not rings


@pytest.mark.ranks(3, 5)
def test_sums_are_the_same_bits_in_every_run(world: MPI.Intracomm) -> None:
    group, found = Group(world), []
    for turn in range(3):
        grads, params, sums = np.random.default_rng(RANK).normal(size=3 * SIZE), np.zeros(3 * SIZE), np.zeros(3)
        rings, ring = Rings(), Ring(group, range(SIZE), 0, grads, sums, params, [3] * SIZE)
        rings.add(ring)
        time.sleep(0.002 * ((RANK + turn) % SIZE))
        ring.reduce.begin()
        rings.finish(ring.reduce)
        ring.reduce.sent()
        world.Barrier()
        rings.free()
        found.append(sums.tobytes())
    assert len(set(found)) == 1


@pytest.mark.ranks(1)
def test_short_and_huge_shards_are_left_to_mpi() -> None:
    assert can_carry([10, 0, 20], 8, 80)
    assert not can_carry([10, 0, 19], 8, 80)
    assert not can_carry([1 << 28, 1], 8, 80)


@pytest.mark.ranks(1)
def test_blocks_are_cut_in_the_order_in_which_backward_completes_them() -> None:
    sizes = {"a/w": 4, "a/b": 1, "b/w": 60, "c/w": 3, "d/in/w": 40, "d/b": 1, "e/w": 1, "e/b": 40}
    assert bucket_maker.cut(sizes, 40, 0) == [["e/w", "e/b"], ["d/in/w", "d/b"], ["b/w", "c/w"], ["a/w", "a/b"]]
    assert bucket_maker.cut(sizes, 40, 6)[2:] == [["a/w", "a/b", "b/w", "c/w"]]
    assert bucket_maker.cut(sizes, 1000, 6) == [list(sizes)]
    assert bucket_maker.cut({"a/w": 1}, 40, 6) == [["a/w"]]


# -- a training -------------------------------------------------------------------------------------------------------


@contextmanager
def training(topology: Topology, micro_batches: int = 2) -> Iterator[Engine]:
    rows = open_dataset("synthetic", None, options=DataOptions(rows=90, test_rows=0, shape=SHAPE, classes=CLASSES))
    options = Options(
        loss=specs.CrossEntropy(),
        optimizer=specs.Adam(),
        batch_size=31,
        micro_batches=micro_batches,
        dtype="float64",
    )
    made = Engine(World(), Plan(Network(LAYERS, SHAPE), topology, options))
    made.open_data(rows, Sampler(90, 1, 0.0, 31))
    yield made
    made.close()


@pytest.mark.ranks(2, 3, 4)
def test_sums_begin_under_the_last_backward(
    between_nodes: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    between_nodes(True)
    monkeypatch.setattr(reducers, "PIECE", 1 << 20)
    seen: list[str] = []
    begin, backward = Lap.begin, LinearLayer.backward

    def begun(self: Lap) -> None:
        seen.append("begin")
        begin(self)

    def gone_back(self: LinearLayer, *arguments: Any) -> Any:
        found = backward(self, *arguments)
        seen.append(self.name)
        return found

    with training(Topology(SIZE, (Stage(0, 4, 1, 1),))) as engine:
        layers = [sorted({key.split("/")[0] for key in bucket.places}) for bucket in engine.state.buckets]
        assert layers == [["linear3", "linear4"], ["linear2"], ["linear1"]]
        engine.step(0, 0.01)
        monkeypatch.setattr(Lap, "begin", begun)
        monkeypatch.setattr(LinearLayer, "backward", gone_back)
        engine.step(1, 0.01)
    names = ["linear4", "linear3", "linear2", "linear1"]
    last = ["linear4", "linear3", "begin", "linear2", "begin", "linear1", "begin"]
    assert seen == [*names, *last, *["begin"] * 3]  # two micro-batches, then the parameters


@pytest.mark.ranks(2, 3, 4)
def test_messages_move_between_the_layers_of_a_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a call into MPI now and then, a message to a stage on another host would wait for the end of a pass."""
    cuts = [0, *range(5 - SIZE, 5)]
    calls = 0

    def call(self: Group) -> None:
        nonlocal calls
        calls += 1

    monkeypatch.setattr(Group, "progress", call)
    with training(Topology(1, tuple(Stage(a, b, 1, 1) for a, b in pairwise(cuts)))) as engine:
        engine.step(0, 0.01)
        assert calls >= 4 * len(engine.layers.layers)  # forward and backward of two micro-batches


@pytest.mark.ranks(2, 4)
def test_a_checkpoint_knows_no_buckets(
    between_nodes: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch, shared_path: Path
) -> None:
    """Made with rings, gone on from with shared memory, on another layout."""
    rows, cols = Topology(SIZE, (Stage(0, 4, 1, 1),)), Topology(1, (Stage(0, 4, 1, SIZE),))
    grid = Topology(1, (Stage(0, 3, SIZE - 1, 1), Stage(3, 4, 1, 1))) if SIZE > 2 else rows
    with training(rows) as engine:
        steps(engine, range(8))
        expected = engine.parameters()
    between_nodes(True)
    with training(grid) as engine:
        steps(engine, range(4))
        made = saved(engine, shared_path, 4)
    monkeypatch.undo()
    with training(cols) as engine:
        restore(engine, made)
        steps(engine, range(4, 8))
        found = engine.parameters()
    for key, array in expected.items():
        np.testing.assert_allclose(found[key], array, rtol=0, atol=1e-10 * np.abs(array).max(), err_msg=key)


def steps(engine: Engine, numbers: Sequence[int]) -> None:
    for n in numbers:
        engine.step(n, 0.01)
