"""The checkpoint of ranks that stand still in a later step is that of the last whole one, in every layout, and also
without a rank of which others hold everything."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI

from nettorrent_mpi.comm.world import World
from nettorrent_mpi.engine.checkpoint_writer import CheckpointWriter
from nettorrent_mpi.engine.emergency import EmergencyCheckpoint
from nettorrent_mpi.engine.engine import Engine
from nettorrent_mpi.plan import specs
from nettorrent_mpi.plan.actions import ONCE
from nettorrent_mpi.plan.errors import DataError, OutputError
from nettorrent_mpi.plan.topology import Topology
from tests.checkpoints import saved, whole
from tests.ranks.test_attach import name, plan, start, topologies, train

RANK, SIZE = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
ABOUT = {"samples": 0, "time": 0.0, "config": "{}"}


def emergency(engine: Engine, folder: Path) -> EmergencyCheckpoint:
    writer = CheckpointWriter(engine, folder, 9)
    return EmergencyCheckpoint(engine, writer, folder, lambda step: {**ABOUT, "step": step})


def standing(optimizer: specs.OptimizerSpec, folder: Path) -> Iterator[tuple[Topology, Engine, dict[str, np.ndarray]]]:
    """Yield, in each layout, an engine that has not come to the update of step 6, and the checkpoint of step 5."""
    world = World()
    for topology in topologies(SIZE):
        engine = start(world, plan(topology, optimizer=optimizer, clip_norm=None))
        train(engine, 0, 5)
        wanted = whole(saved(engine, folder / name(topology) / "plain", 5))
        work = engine.prepare(5, 0.003)
        first = next(i for i, action in enumerate(work.actions) if action.kind in ONCE)
        engine.pipeline.run(work._replace(actions=work.actions[:first]))
        world.barrier()
        yield topology, engine, wanted
        engine.pipeline.run(work._replace(actions=work.actions[first:]))
        engine.close()
    world.free()


@pytest.mark.ranks(2, 3)
def test_the_checkpoint_is_that_of_the_last_whole_step(shared_path: Path) -> None:
    """Forward passes of the next one have changed running statistics and sums since."""
    for topology, engine, wanted in standing(specs.Adam(0.003), shared_path):
        folder = shared_path / name(topology) / "checkpoints"
        made = emergency(engine, folder)
        assert made.whole() == 5
        assert made.obstacle(dict.fromkeys(range(SIZE), 5)) is None
        made.write(5, [])
        engine.world.barrier()
        if RANK == 0:
            found = whole(made.complete(5, range(SIZE)))
            assert found.keys() == wanted.keys()
            for key, array in wanted.items():
                np.testing.assert_array_equal(found[key], array, err_msg=f"{name(topology)} {key}")
            assert made.obstacle(dict.fromkeys(range(SIZE), 5)) == ""
        engine.world.barrier()


@pytest.mark.ranks(2, 3)
def test_others_stand_in_for_a_silent_rank(shared_path: Path) -> None:
    silent = SIZE - 1
    answers = dict.fromkeys(range(silent), 5)
    for topology, engine, wanted in standing(specs.Sgd(0.1), shared_path):
        made, place = emergency(engine, shared_path / name(topology) / "checkpoints"), topology.place(silent)
        problem = made.obstacle(answers)
        if len(topology.exact_group(place.stage, place.col)) == 1:
            assert problem is not None
            assert problem.startswith(f"rank {silent}, which holds ")
            assert problem.endswith(" alone, does not answer")
            continue
        assert problem is None
        if silent != RANK:
            made.write(5, [silent])
        engine.world.barrier()
        if RANK == 0:
            found = whole(made.complete(5, range(silent)))
            assert found.keys() == {key for key in wanted if not key.startswith("numbers")}
            for key, array in found.items():
                np.testing.assert_array_equal(array, wanted[key], err_msg=f"{name(topology)} {key}")
        engine.world.barrier()


@pytest.mark.ranks(2, 3)
def test_what_cannot_be_saved_is_not(shared_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shared_path / "checkpoints"
    world = World()
    engine = start(world, plan(Topology(SIZE, next(topologies(1)).stages)))
    made = emergency(engine, folder)
    train(engine, 0, 3)
    last = SIZE - 1
    assert made.obstacle(dict.fromkeys(range(SIZE), 0)) == ""
    assert made.obstacle({0: 3, 1: 4}) == "rank 0 is after step 3, and rank 1 after step 4 already"
    assert made.obstacle({0: 3, 1: None}) == "rank 1 is in the middle of an update, or reads a state"
    alone = made.obstacle(dict.fromkeys(range(last), 3))
    assert alone is not None
    assert alone.startswith(f"rank {last}, which alone has its part of the optimizer's state (m, v) of conv2d1/weight[")
    with pytest.raises(OutputError, match="went on"):
        made.write(2, [])

    def meanwhile(*given: object) -> None:
        engine.update.begin(0.003, 4)

    monkeypatch.setattr("nettorrent_mpi.engine.emergency.write_blocks", meanwhile)
    with pytest.raises(OutputError, match="went on"):
        made.write(3, [])
    if RANK == 0:
        assert not list(folder.glob("*/manifest.json"))
    engine.close()
    world.free()


@pytest.mark.ranks(2)
def test_one_that_lacks_a_part_is_none(shared_path: Path) -> None:
    world = World()
    for topology in topologies(SIZE):
        engine, folder = start(world, plan(topology)), shared_path / name(topology) / "checkpoints"
        train(engine, 0, 1)
        made = emergency(engine, folder)
        made.write(1, [])
        world.barrier()
        if RANK == 0:
            with pytest.raises(DataError, match=r"has shape|is missing|has not each part"):
                made.complete(1, [0])
            assert not list(folder.glob("*/manifest.json"))
        world.barrier()
        engine.close()
    world.free()


@pytest.mark.ranks(3)
def test_what_all_have_written_is_completed_alone(shared_path: Path) -> None:
    world = World()
    engine = start(world, plan(next(topologies(SIZE))))
    train(engine, 0, 5)
    wanted = whole(saved(engine, shared_path / "plain", 5))
    writer = CheckpointWriter(engine, shared_path / "checkpoints", 9)
    writer.begin(5, lambda: {**ABOUT, "step": 5})
    writer.stand_still()
    world.barrier()
    if RANK == 1:
        writer.complete_alone()
        found = whole(shared_path / "checkpoints" / "step-0000000005")
        assert found.keys() == wanted.keys()
        assert all(np.array_equal(found[key], array) for key, array in wanted.items())
    world.barrier()
    writer.abandon()
    engine.close()
    world.free()
