"""Whole runs in modes that nobody has thought of: configurations are drawn, see programs/random_runs.py.

NETTORRENT_RANDOM_RUNS=200 tries that many under each MPI, instead of a few (100 in the tests marked long).
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from nettorrent_mpi.config import reading as configuration
from nettorrent_mpi.engine.setup import set_up
from nettorrent_mpi.plan import exchange_specs as choices
from nettorrent_mpi.plan import pairing

PROGRAM = Path(__file__).resolve().parent / "programs" / "random_runs.py"
COUNT = int(os.environ.get("NETTORRENT_RANDOM_RUNS", "8"))
MANY = max(COUNT, 100)
Run = subprocess.CompletedProcess[str]


@pytest.mark.parametrize(
    ("mpi", "seed", "count"),
    [
        ("openmpi", 1, min(COUNT, 3)),
        pytest.param("openmpi", 1, COUNT, marks=pytest.mark.slow),
        pytest.param("mpich", 2, COUNT, marks=pytest.mark.slow),
        pytest.param("openmpi", 3, MANY, marks=pytest.mark.long),
        pytest.param("mpich", 4, MANY, marks=pytest.mark.long),
    ],
)
def test_random_runs(mpirun: Callable[..., Run], mpi: str, seed: int, count: int) -> None:
    done = mpirun(8, [PROGRAM, str(count), str(seed)], mpi=mpi, timeout=90 + 5 * count)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert f"{count} of {count} are well" in done.stdout


@pytest.fixture(scope="module")
def program() -> Any:
    spec = importlib.util.spec_from_file_location("random_runs", PROGRAM)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def words(value: Any) -> Iterator[str]:
    """Every name and word of a configuration."""
    if isinstance(value, dict):
        for key, inside in value.items():
            yield str(key)
            yield from words(inside)
    elif isinstance(value, list):
        for inside in value:
            yield from words(inside)
    else:
        yield str(value)


def test_what_is_drawn_can_be_had_and_is_everything(program: Any) -> None:
    seen: Counter[str] = Counter()
    ranks: Counter[int] = Counter()
    for number in range(300):
        for run in program.draw(0, number):
            if number < 100:
                set_up(configuration.loads(json.dumps(run.config), "drawn"), run.ranks)
            seen.update(set(words(run.config)))
            ranks[run.ranks] += 1
    assert set(ranks) == set(range(1, 9))
    everything = {*choices.PIPELINES, *choices.MIXES, *choices.COMPRESSIONS, *choices.EXCHANGES, *pairing.KINDS}
    everything |= {field.name for kind in (choices.Gossip, choices.Elite) for field in fields(kind)}
    everything |= {"tournament", "disjoint", "conv2d", "batch_norm", "dropout", "clip_norm", "swarms", "optimizer"}
    assert {word for word in everything if seen[word] < 3} == set()
    assert program.draw(0, 5) == program.draw(0, 5)
