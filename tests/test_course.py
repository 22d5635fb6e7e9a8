"""The solutions of the course run, and what they assert holds."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import ROOT

SOLUTIONS = ROOT / "docs" / "course" / "solutions"
RANKS = {"rows_or_cols": 2, "elite": 3}  # the others need no MPI


def test_all_are_run() -> None:
    assert sorted(path.stem for path in SOLUTIONS.glob("*.py")) == sorted([*ALONE, *RANKS])


ALONE = ["bubble", "slow_links", "topology"]


@pytest.mark.parametrize("name", ALONE)
def test_solution(name: str) -> None:
    done = subprocess.run(
        [sys.executable, SOLUTIONS / f"{name}.py"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", RANKS)
def test_solution_on_ranks(name: str, mpirun: Callable[..., Any]) -> None:
    done = mpirun(RANKS[name], [SOLUTIONS / f"{name}.py"], timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout
