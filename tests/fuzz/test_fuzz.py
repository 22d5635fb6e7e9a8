"""Readers of damaged and hostile files: they refuse them by an error of ours, or read them as everybody does.

Each case is made from its number; `python -m tests.fuzz` looks at many more, and says which number shows what.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz.cases import CASES
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
    with Sandbox(target, folder) as sandbox:
        for number, outcome in sandbox.run(cases):
            assert not outcome.fault, f"case {number}: {outcome.kind}: {outcome.text}"
