"""When checkpoints are due, and which ones are kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from nettorrent_mpi.config.sections import Checkpoint
from nettorrent_mpi.engine import saving
from nettorrent_mpi.engine.saving import Saving
from nettorrent_mpi.plan.errors import NetTorrentError

EPOCH = 10  # steps


class Files:
    """What would write checkpoints."""

    def __init__(self, write: Callable[[], None] = lambda: None):
        self._write = write

    def write(self, *, needed: bool) -> None:
        self._write()

    def poll(self) -> None:
        pass

    def finish(self, error: NetTorrentError | None = None) -> None:
        pass


def test_steps_and_epochs() -> None:
    made = Saving(Checkpoint(every_steps=4, every_epochs=2, every_seconds=None), EPOCH)
    assert made.rests(3) == [], "nothing can be written"
    made.files = Files()
    assert min(made.rests(16)) == 20
    assert [step for step in range(1, 25) if made.due(step)] == [4, 8, 12, 16, 20, 24]
    assert [step for step in range(1, 45) if Saving(Checkpoint(every_epochs=2), EPOCH).due(step)] == [20, 40]


def test_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now, written = 100.0, []
    monkeypatch.setattr(saving.time, "monotonic", lambda: now)
    made = Saving(Checkpoint(), EPOCH)
    now += 1e4
    assert not made.overdue, "nothing can be written"
    made.files = Files(lambda: written.append(now))
    assert made.overdue
    made.save(needed=False)
    assert written == [now]
    now += 599
    assert not made.overdue
    now += 1
    assert made.overdue, "one every ten minutes by default"
    never = Saving(Checkpoint(every_seconds=None, every_epochs=None), EPOCH)
    never.files = made.files
    now += 1e6
    assert not never.overdue
    assert never.rests(0) == []
