"""A rank of a PyTorch script that is stopped for a while rejoins the others, which with gossip train on meanwhile."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.standstill import Run, steps, with_a_standstill

pytest.importorskip("torch")
RANKS, STOPPED, STEPS, STANDSTILL = 3, 2, 2000, 5.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("exchange", "mpi"),
    [
        ("gossip", "openmpi"),
        ("gossip", "mpich"),
        ({"gossip": {"mix": "push_sum"}}, "openmpi"),
        ("elite", "openmpi"),
    ],
)
def test_a_rank_that_is_stopped_rejoins(mpirun: Callable[..., Run], tmp_path: Path, exchange: Any, mpi: str) -> None:
    words: list[str | Path] = ["-m", "tests.programs.stopped_torch", tmp_path, str(STEPS), json.dumps(exchange)]
    began, ended = with_a_standstill(mpirun, RANKS, words, tmp_path, STOPPED, STANDSTILL, mpi=mpi)
    times = [steps(tmp_path, rank) for rank in range(RANKS)]
    assert [len(found) for found in times] == [STEPS] * RANKS
    assert max(np.diff(times[STOPPED])) > STANDSTILL - 0.5  # it did stand still
    for found in times[:STOPPED] if exchange != "elite" else []:
        before = np.count_nonzero((found > began - 2) & (found <= began)) / 2
        meanwhile = np.count_nonzero((found > began + 0.5) & (found < ended)) / (ended - began - 0.5)
        assert meanwhile > before / 4, f"{before:.0f} steps/s before the standstill, {meanwhile:.0f} in it"
    weights = [np.load(tmp_path / f"weights.{rank}.npy") for rank in range(RANKS)]
    assert np.isfinite(weights[0]).all()
    assert all(np.array_equal(each, weights[0]) for each in weights)
