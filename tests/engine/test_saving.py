"""When checkpoints are due, and which ones are kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nettorrent_mpi.config.sections import Checkpoint
from nettorrent_mpi.engine import saving
from nettorrent_mpi.engine.checkpoint import write_checkpoint
from nettorrent_mpi.engine.saving import Saving

EPOCH = 10  # steps


def test_steps_and_epochs() -> None:
    made = Saving(Checkpoint(every_steps=4, every_epochs=2, every_seconds=None), EPOCH)
    assert made.rests(3) == [], "nothing can be written"
    made.write = lambda needed: None
    assert min(made.rests(16)) == 20
    assert [step for step in range(1, 25) if made.due(step)] == [4, 8, 12, 16, 20, 24]
    assert [step for step in range(1, 45) if Saving(Checkpoint(every_epochs=2), EPOCH).due(step)] == [20, 40]


def test_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now, written = 100.0, []
    monkeypatch.setattr(saving.time, "monotonic", lambda: now)
    made = Saving(Checkpoint(), EPOCH)
    now += 1e4
    assert not made.overdue, "nothing can be written"
    made.write = lambda needed: written.append(now)
    assert made.overdue
    made.save(needed=False)
    assert written == [now]
    now += 599
    assert not made.overdue
    now += 1
    assert made.overdue, "one every ten minutes by default"
    never = Saving(Checkpoint(every_seconds=None, every_epochs=None), EPOCH)
    never.write = made.write
    now += 1e6
    assert not never.overdue
    assert never.rests(0) == []


def test_the_newest_are_kept(tmp_path: Path) -> None:
    def write(step: int) -> list[int]:
        write_checkpoint(tmp_path, {"parameters": {"a": np.zeros(3)}}, {"step": step}, keep=3)
        return sorted(int(path.stem.removeprefix("step-")) for path in tmp_path.iterdir())

    assert [write(step) for step in (5, 10, 15, 20)][-1] == [10, 15, 20]
    assert write(12) == [10, 12], "15 and 20 are of a run that was resumed from 10"
