"""A checkpoint of any layout on any ranks is gone on from on any other; it is written beside the training, and is that
of the step at which it was begun; what goes wrong on one rank is told once, and ends nothing that need not end."""

from __future__ import annotations

import errno
import os
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI

import nettorrent_mpi as nt
from nettorrent_mpi.comm.world import World
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.engine import checkpoint_writer
from nettorrent_mpi.engine.checkpoint import find_checkpoint
from nettorrent_mpi.engine.checkpoint_folder import tidy
from nettorrent_mpi.engine.checkpoint_writer import CheckpointWriter
from nettorrent_mpi.engine.engine import Engine
from nettorrent_mpi.engine.run_plan import Plan
from nettorrent_mpi.plan import exchange_specs as exchanges
from nettorrent_mpi.plan.errors import DataError, NonFiniteError
from nettorrent_mpi.plan.topology import Topology
from tests.checkpoints import restore, saved, whole
from tests.ranks.test_attach import equal, name, plan, serial, start, topologies, train

RANK, SIZE = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
ABOUT = {"step": 5, "samples": 0, "time": 0.0, "config": "{}"}


def pairs() -> list[tuple[Topology, Topology]]:
    """(before, after) of layouts on up to so many ranks, those far from each other first."""
    every = [each for ranks in range(1, SIZE + 1) for each in topologies(ranks)]
    found = [(a, b) for i, a in enumerate(every) for j, b in enumerate(every) if i != j]
    order = np.random.default_rng(3).permutation(len(found))
    return [found[i] for i in order]


@contextmanager
def part(ranks: int) -> Iterator[World | None]:
    """A world of the first ranks; None on the others."""
    comm = MPI.COMM_WORLD.Split(0 if ranks > RANK else MPI.UNDEFINED)
    if comm == MPI.COMM_NULL:
        yield None
        return
    world = World(comm)
    yield world
    world.free()
    comm.Free()


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    "chosen",
    [
        pytest.param(slice(0, 2), id="two"),
        pytest.param(slice(2, 6), id="four", marks=pytest.mark.slow),
        pytest.param(slice(6, 46), id="forty", marks=pytest.mark.long),
    ],
)
def test_any_layout_goes_on_from_any_other(chosen: slice, shared_path: Path) -> None:
    """Parameters, running statistics and the optimizer's state come along: the serial result."""
    results: list[tuple[str, Mapping[str, Array]]] = []
    for number, (before, after) in enumerate(pairs()[chosen]):
        folder = shared_path / str(number)
        with part(before.size) as world:
            if world is not None:
                engine = start(world, plan(before))
                train(engine, 0, 5)
                saved(engine, folder, 5)
                engine.close()
        MPI.COMM_WORLD.Barrier()
        with part(after.size) as world:
            if world is not None:
                engine = start(world, plan(after))
                restore(engine, folder)
                assert engine.steps == 5
                train(engine, 5, 10)
                results.append((f"{name(before)} -> {name(after)}", engine.parameters()))
                engine.close()
    for where, arrays in results if RANK == 0 else []:
        equal(arrays, serial("adam"), where=where)


APART = {
    "ring": exchanges.Gossip(pairing="ring", part=0.4, deadline="none", every=2),
    "push_sum": exchanges.Gossip(pairing="random", part=1.0, deadline="none", mix=exchanges.PushSumMix()),
    "int8": exchanges.Gossip(part=0.4, deadline="none", compress=exchanges.Int8()),
    "momentum": exchanges.Gossip(part=0.4, deadline="none", exact_every=3, slow_momentum=0.5),
    "elite": exchanges.Elite(every_samples=64),
    "none": exchanges.Nothing(),
}


PARTS = 6  # in which they are tested


def ways() -> Iterator[tuple[str, Plan]]:
    """Each layout on up to so many ranks, with the exact exchange and, where it can, with others and with a pipeline
    without flush."""
    for topology in (each for ranks in range(1, SIZE + 1) for each in topologies(ranks)):
        options: dict[str, dict[str, object]] = {"exact": {}}
        if len(topology.stages) > 1:
            options |= {"async": {"pipeline": exchanges.Async(), "clip_norm": None}}
            options |= {"gpipe": {"pipeline": exchanges.Gpipe()}, "split": {"pipeline": exchanges.ZeroBubble()}}
        if topology.replicas > 1:
            options |= {kind: {"exchange": exchange, "clip_norm": None} for kind, exchange in APART.items()}
        for kind, chosen in options.items():
            yield f"{name(topology)}, {kind}", plan(topology, kernels="numpy", dtype="float32", **chosen)


@pytest.mark.ranks(4)
@pytest.mark.long
@pytest.mark.parametrize("chosen", range(PARTS))
def test_the_same_layout_goes_on_bit_for_bit(chosen: int, shared_path: Path) -> None:
    """The training goes on as if it had not stopped after steps at which nobody had known before that it would rest."""
    wrong, every = [], list(ways())
    assert len(every) >= 40
    for number, (where, made) in list(enumerate(every))[chosen::PARTS]:
        with part(made.topology.size) as world:
            if world is None:
                continue
            found = []
            for stops in ((), (3, 7)):
                engine = start(world, made)
                for n in range(10):
                    rest = next(rest for rest in (*stops, 10) if rest > n)
                    engine.step(n, 0.003, rest - n)
                    if n + 1 in stops:
                        folder = saved(engine, shared_path / str(number), n + 1)
                        engine.close()
                        engine = start(world, made)
                        restore(engine, folder)
                found.append({holding: np.array(array) for holding, array in engine.blocks.held().items()})
                engine.close()
            whole, parts = found
            different = [each.name for each in whole.keys() ^ parts.keys()]
            different += [
                each.name for each in whole.keys() & parts.keys() if whole[each].tobytes() != parts[each].tobytes()
            ]
            wrong += [f"{where}: {sorted(set(different))}"] if different else []
    assert not wrong, "\n".join(wrong)


@pytest.fixture
def engine(world: MPI.Intracomm) -> Iterator[Engine]:
    made = World(world)
    (topology, *_) = topologies(SIZE)
    found = start(made, plan(topology))
    train(found, 0, 5)
    yield found
    found.close()
    made.free()


class Slow:
    """Threads that write when they may."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.may = threading.Event()
        original = checkpoint_writer.write_blocks

        def write(*given: object) -> None:
            assert self.may.wait(60)
            original(*given)  # type: ignore[arg-type]

        monkeypatch.setattr(checkpoint_writer, "write_blocks", write)


@pytest.mark.ranks(1, 4)
def test_training_goes_on_meanwhile(engine: Engine, shared_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the checkpoint is that of its step."""
    plainly = whole(saved(engine, shared_path / "plainly", 5))
    slow = Slow(monkeypatch)
    writer = CheckpointWriter(engine, shared_path, 9)
    writer.begin(5, lambda: ABOUT)
    for n in range(5, 9):
        engine.step(n, 0.003)
        writer.poll()
    assert writer._step == 5
    slow.may.set()
    if RANK == 0:
        assert [path.name for path in shared_path.glob("step-*")] in ([], ["step-0000000005.tmp"])
    MPI.COMM_WORLD.Barrier()
    while writer._step is not None:  # polls alone complete it
        writer.poll()
    found = whole(shared_path / "step-0000000005")
    assert found.keys() == plainly.keys()
    for key, array in plainly.items():
        np.testing.assert_array_equal(found[key], array, err_msg=key)
    assert {path.name for path in shared_path.glob("step-*")} == {"step-0000000005"}


@pytest.mark.ranks(3)
def test_what_is_abandoned_is_given_up_at_once(
    engine: Engine, shared_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no trace of it disturbs the next one."""
    slow = Slow(monkeypatch)
    writer = CheckpointWriter(engine, shared_path, 9)
    writer.begin(5, lambda: ABOUT)
    slow.may.set()
    writer.abandon()
    engine.world.barrier()
    if RANK == 0:
        tidy(shared_path)
        assert not list(shared_path.iterdir())
    engine.step(5, 0.003)
    writer.begin(6, lambda: ABOUT | {"step": 6})
    writer.finish(needed=True)
    assert [path.name for path in shared_path.iterdir()] == ["step-0000000006"]


@pytest.mark.ranks(3)
def test_the_next_one_waits(engine: Engine, shared_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(monkeypatch)
    writer = CheckpointWriter(engine, shared_path, 1)
    writer.begin(5, lambda: ABOUT)
    threading.Timer(0.1, slow.may.set).start()
    engine.step(5, 0.003)
    writer.begin(6, lambda: ABOUT | {"step": 6})
    assert (shared_path / "step-0000000005").exists()
    writer.finish(needed=True)
    assert [path.name for path in shared_path.iterdir()] == ["step-0000000006"]


@pytest.mark.ranks(1, 3)
@pytest.mark.parametrize("where", ["write_blocks", "complete"])
def test_what_one_rank_cannot_write(
    engine: Engine, shared_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """One warning, or one error on all ranks; nothing is left, and the next one is written."""
    bad = SIZE - 1 if where == "write_blocks" else 0
    folder = shared_path / "checkpoints"

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")

    writer = CheckpointWriter(engine, folder, 9)
    with monkeypatch.context() as patched:
        if bad == RANK:
            patched.setattr(checkpoint_writer, where, fail)
        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always")
            writer.begin(5, lambda: ABOUT)
            engine.step(5, 0.003)
            writer.finish()
        told = [str(each.message) for each in given if "checkpoint" in str(each.message)]
        expected = [f"there is no checkpoint of step 5: somewhere: {os.strerror(errno.ENOSPC)}"]
        assert told == (expected if bad == RANK else [])
        writer.begin(6, lambda: ABOUT)
        with pytest.raises(nt.NetTorrentError, match="somewhere: No space left on device"):
            writer.finish(needed=True)
    MPI.COMM_WORLD.Barrier()
    assert not folder.exists() or not list(folder.iterdir())
    assert saved(engine, folder, 7).exists()


@pytest.mark.ranks(1)
def test_no_fault_of_a_thread_is_lost(engine: Engine, shared_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr(checkpoint_writer, "write_blocks", fail)
    writer = CheckpointWriter(engine, shared_path, 9)
    writer.begin(5, lambda: ABOUT)
    with pytest.raises(ZeroDivisionError, match="a fault"):
        writer.finish()
    writer.abandon()


@pytest.mark.ranks(3)
def test_weights_that_are_not_finite_are_no_checkpoint(engine: Engine, shared_path: Path) -> None:
    block = next(iter(engine.state.params.values()))
    value = block.flat[0]
    if RANK == 0:
        block.flat[0] = np.inf
    MPI.COMM_WORLD.Barrier()
    writer = CheckpointWriter(engine, shared_path / "checkpoints", 9)
    with pytest.raises(NonFiniteError):
        writer.begin(5, lambda: ABOUT)
    assert not (shared_path / "checkpoints").exists()
    MPI.COMM_WORLD.Barrier()
    if RANK == 0:
        block.flat[0] = value
    writer.finish()


@pytest.mark.ranks(3)
def test_damage_that_some_ranks_see(engine: Engine, shared_path: Path) -> None:
    """Is one error on all of them; or the checkpoint before is taken, with one warning."""
    made = saved(engine, shared_path, 5)
    last = saved(engine, shared_path, 6)
    MPI.COMM_WORLD.Barrier()
    if RANK == 0:
        path = last / f"shard-{SIZE - 1:05d}.h5"
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    MPI.COMM_WORLD.Barrier()
    with pytest.raises(DataError, match=rf"shard-{SIZE - 1:05d}\.h5: is not the file that was written"):
        find_checkpoint(engine.world, last)
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        assert find_checkpoint(engine.world, shared_path)[0] == made
    assert len(given) == (RANK == 0)
    with pytest.raises(DataError, match="nowhere does not exist: name the folder of a run"):
        find_checkpoint(engine.world, shared_path / "nowhere")


def trainer(world: MPI.Intracomm, output: Path | None = None) -> nt.Trainer:
    random = np.random.default_rng(0)
    x, y = random.normal(size=(96, 12)).astype(np.float32), np.arange(96) % 3
    how = {"batch_size": 16, "epochs": 2, "checkpoint": {"every_steps": 3}, "seed": 3}
    return nt.Trainer([nt.Linear(9, activation="tanh"), nt.Linear(3)], (x, y), comm=world, output=output, **how)


@pytest.mark.ranks(1, 3)
def test_places_that_are_resumed_and_loaded(world: MPI.Intracomm, shared_path: Path) -> None:
    with trainer(world, shared_path) as made:
        list(made.train())
        expected = made.parameters()
        assert made.resumed_from is None
    with trainer(world) as made:
        for place in ("checkpoints/step-0000000012", "checkpoints", "."):
            made.load(shared_path / place)
            equal(made.parameters(), expected, 0)
            made.resume(shared_path / place)
            assert (made.step, made.resumed_from) == (12, shared_path / "checkpoints" / "step-0000000012")
            list(made.train(steps=1))


@pytest.mark.ranks(1, 3)
def test_a_loop_that_is_left_has_its_checkpoint(world: MPI.Intracomm, shared_path: Path) -> None:
    with trainer(world, shared_path) as made:
        for record in made.train():
            if record.step >= 6:
                break
    steps = sorted(path.name for path in (shared_path / "checkpoints").iterdir())
    assert "step-0000000006" in steps
    assert not any(name.endswith(".tmp") for name in steps)


@pytest.mark.ranks(3)
def test_nothing_grows(engine: Engine, shared_path: Path) -> None:
    writer, counts = CheckpointWriter(engine, shared_path, 1), []
    for step in range(5, 12):
        writer.begin(step, lambda: ABOUT)
        writer.finish()
        counts.append((len(os.listdir("/proc/self/fd")), threading.active_count()))
    files, threads = counts[1]  # a thread of an earlier test may end meanwhile
    assert all(each[0] <= files and each[1] <= threads for each in counts[2:]), counts
