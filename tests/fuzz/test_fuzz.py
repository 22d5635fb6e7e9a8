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
from tests.fuzz.sandbox import AHEAD, Case, Sandbox

FEW, MANY = 20, 180  # cases of each kind in `make test`, and besides in `make test-slow` or `make test-all`


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder in memory, where there is one: cases are small and many."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as made:
        yield Path(made)


HEAVY = ("strange_model", "strange_hdf5", "config")  # take most of the time
TARGETS = [pytest.param(each, marks=pytest.mark.long if each in HEAVY else pytest.mark.slow) for each in CASES]


@pytest.mark.parametrize("target", [None, *TARGETS])
def test_damaged_files(folder: Path, target: str | None) -> None:
    """A few cases of each target, or many of one."""
    few = [Case(each, number) for each in CASES for number in range(FEW)]
    many = [Case(str(target), number) for number in range(FEW, FEW + MANY)]
    with Sandbox(folder) as sandbox:
        for case, outcome in sandbox.run(many if target else few):
            assert not outcome.fault, f"{case.name}: {outcome.kind}: {outcome.text}"


def test_few_cases_are_asked_for_ahead(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that come in pieces do not make more cases be asked for: both pipes would fill, and both sides wait."""
    read, drawn = os.read, 0

    def cases() -> Iterator[Case]:
        nonlocal drawn
        for number in range(AHEAD + 50):
            drawn += 1
            yield Case("cifar", number)

    with Sandbox(folder) as sandbox:
        monkeypatch.setattr(os, "read", lambda file, size: read(file, min(size, 10)))
        for done, _ in enumerate(sandbox.run(cases())):
            assert drawn <= done + AHEAD
