"""A Saving decides after which steps the training state is saved: by steps, by epochs and by seconds."""

from __future__ import annotations

import time
from typing import Protocol

from nettorrent_mpi.comm.activity import NOW
from nettorrent_mpi.config.sections import Checkpoint
from nettorrent_mpi.exchange.base import next_multiple
from nettorrent_mpi.plan.errors import NetTorrentError


class StateFiles(Protocol):
    """This is the interface of what writes checkpoints while the training goes on."""

    def write(self, *, needed: bool) -> None:
        """Begin to write a checkpoint, and wait for it if it is `needed`. All ranks call, at rest."""

    def keep_best(self, step: int) -> None:
        """Write the network after this step, the best so far. All ranks call, at rest."""

    def poll(self) -> None:
        """Go on with the one that is being written, without waiting. Called after every step."""

    def finish(self, error: NetTorrentError | None = None) -> None:
        """Wait for the one that is being written; not after an error that only some ranks have seen. All ranks call, at
        rest."""


class Saving:
    """A Saving knows after which steps a checkpoint is due, and has it written by `files`, if there are any.

    Steps and epochs are the same on all ranks. Seconds are this rank's own: where they are over (`overdue`) it asks the
    others to come to rest by its next report, as it would ask them to stop (engine/stopping.py).
    """

    def __init__(self, settings: Checkpoint, epoch_steps: int):
        every = (settings.every_steps, settings.every_epochs and settings.every_epochs * epoch_steps)
        self._every = [steps for steps in every if steps is not None]
        self._seconds = settings.every_seconds
        self.files: StateFiles | None = None
        self.begin()

    def begin(self) -> None:
        """Begin to count the seconds."""
        self._since = time.monotonic()

    def rests(self, step: int) -> list[int]:
        """Return steps after `step` at which all ranks come to rest for a checkpoint, among them the next one."""
        return [next_multiple(step, every) for every in self._every] if self.files else []

    def due(self, step: int) -> bool:
        """Whether steps or epochs want a checkpoint after this step."""
        return any(step % every == 0 for every in self._every)

    @property
    def overdue(self) -> bool:
        """Whether the seconds since the last checkpoint are over on this rank."""
        return self.files is not None and self._seconds is not None and time.monotonic() - self._since >= self._seconds

    @NOW.during("checkpoint")
    def save(self, *, needed: bool) -> None:
        """Begin to write a checkpoint; if it is `needed`, because the training ends without results, wait for it. All
        ranks call, at rest."""
        if self.files is not None:
            self.files.write(needed=needed)
        self.begin()

    def keep_best(self, step: int) -> None:
        """Write the network after this step, the best so far. All ranks call, at rest."""
        if self.files is not None:
            self.files.keep_best(step)

    def poll(self) -> None:
        """Go on with the checkpoint that is being written: after every step."""
        if self.files is not None:
            self.files.poll()

    def finish(self, error: NetTorrentError | None = None) -> None:
        """Wait for the checkpoint that is being written; not after an error that only some ranks have seen. All ranks
        call, at rest."""
        if self.files is not None:
            self.files.finish(error)
