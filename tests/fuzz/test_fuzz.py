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

CASES_OF_EACH, FEW = 200, 20  # in `make test`; of those that take most of the time only a few, the others in test-all


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder in memory, where there is one: cases are small and many."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as made:
        yield Path(made)


HEAVY = ("strange_model", "strange_hdf5", "config")


@pytest.mark.parametrize("target", [None, *(pytest.param(each, marks=pytest.mark.long) for each in HEAVY)])
def test_damaged_files(folder: Path, target: str | None) -> None:
    """Cases of each target, or the rest of those of a heavy one."""
    first = [Case(each, number) for each in CASES for number in range(FEW if each in HEAVY else CASES_OF_EACH)]
    rest = [Case(str(target), number) for number in range(FEW, CASES_OF_EACH)]
    with Sandbox(folder) as sandbox:
        for case, outcome in sandbox.run(rest if target else first):
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
