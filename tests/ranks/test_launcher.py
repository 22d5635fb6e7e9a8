"""The rank tests' own machinery, from inside."""

from __future__ import annotations

from pathlib import Path

import pytest
from mpi4py import MPI


def test_ranks_share_one_world(world: MPI.Intracomm, world_size: int) -> None:
    assert world.size == world_size
    assert world.allgather(world.rank) == list(range(world_size))


@pytest.mark.ranks(2, 5)
def test_mark_limits_rank_counts(world_size: int) -> None:
    assert world_size in {2, 5}


def test_shared_path_is_one_folder(world: MPI.Intracomm, shared_path: Path) -> None:
    Path(shared_path, f"from{world.rank}").touch()
    world.Barrier()
    assert len(list(shared_path.iterdir())) == world.size


def test_own_folders_differ(world: MPI.Intracomm, tmp_path: Path) -> None:
    assert len(set(world.allgather(str(tmp_path)))) == world.size
