"""Readers of damaged and hostile files: they refuse them by an error of ours, or read them as everybody does.

Each case is made from its number; `python -m tests.fuzz` looks at many more, and says which number shows what.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from tests.fuzz.cases import CASES, SEEDS, write
from tests.fuzz.sandbox import Sandbox

FEW, MANY = 25, 175  # cases of each kind in `make test`, and besides in `make test-slow`


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder in memory, where there is one: cases are small and many."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as made:
        yield Path(made)


_PARTS = [
    pytest.param(range(FEW), id="few"),
    pytest.param(range(FEW, FEW + MANY), id="many", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("cases", _PARTS)
@pytest.mark.parametrize("target", CASES)
def test_damaged_files(folder: Path, target: str, cases: range) -> None:
    (folder / "seeds").mkdir()
    seeds = SEEDS[target](folder / "seeds")
    with Sandbox(target) as sandbox:
        for number in cases:
            write(CASES[target](Random(number), seeds), folder / "case")
            outcome = sandbox.run(folder / "case")
            assert not outcome.fault, f"case {number}: {outcome.kind}: {outcome.text}"
