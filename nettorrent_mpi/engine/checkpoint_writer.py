"""Checkpoints are written while training goes on: each rank writes the blocks that it owns, from a copy, by a thread.

    main thread, at rest        copies this rank's blocks, and starts a thread
    thread                      writes them into step-N.tmp/, with a note of their checksum
    main thread, after steps    once the thread is done, joins a nonblocking sum: whether all ranks have written
    thread of one rank          completes the checkpoint: index, manifest, its name; removes old ones
    main thread, after steps    a second nonblocking sum tells all ranks that the checkpoint is there

The threads use no MPI. One checkpoint is in flight at a time: the next one waits until it is there, because the memory
of the copy is needed again. One that some rank cannot write is given up by all of them, with one warning.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from shutil import rmtree

import numpy as np

from nettorrent_mpi.comm.mail import Pending
from nettorrent_mpi.engine.blame import check_finite
from nettorrent_mpi.engine.checkpoint_folder import complete, name_of, write_blocks
from nettorrent_mpi.engine.engine import Engine
from nettorrent_mpi.engine.model_file import Attribute
from nettorrent_mpi.engine.state_copy import StateCopy
from nettorrent_mpi.engine.wiring import Wiring
from nettorrent_mpi.plan.errors import NetTorrentError, OutputError, in_one_line, warn

COMPLETES = 0  # the rank whose thread completes checkpoints


class CheckpointWriter:
    """A CheckpointWriter writes the checkpoints of an engine's training into `folder`, and keeps the `keep` newest.

    All ranks make one and call the same methods, at rest; only `poll` belongs into the steps.
    """

    def __init__(self, engine: Engine, folder: Path, keep: int):
        self._engine, self._folder, self._keep = engine, folder, keep
        self._copy = StateCopy()
        self._wiring: Wiring | None = None  # that the channel is of
        self._step: int | None = None  # of the checkpoint in flight
        self._completing = False  # all its blocks are written
        self._thread: _Writing | None = None
        self._sum: Pending | None = None
        self._problem: NetTorrentError | None = None  # of this rank

    def prepare(self) -> None:
        """Get ready to write, so that the first checkpoint takes no longer than the others."""
        if self._wiring is not self._engine.wiring:
            self._wiring = self._engine.wiring
            self._channel = self._wiring.channel(self._wiring.everyone)
            self._copy.reserve(self._engine)

    def begin(self, step: int, attributes: Callable[[], Mapping[str, Attribute]]) -> None:
        """Begin to write the checkpoint of this step once the one in flight is there. A thread calls `attributes`.
        Raises a NonFiniteError or DataError on all ranks if weights are not finite."""
        self.finish()
        self.prepare()
        finite = self._copy.take(self._engine)
        check_finite(self._engine, finite=finite)
        self._step, self._completing, self._attributes = step, False, attributes
        self._unwanted = threading.Event()
        look = partial(_look, threading.current_thread(), self._unwanted)
        self._start(partial(write_blocks, self._part, self._engine.world.rank, self._copy.blocks, look))

    def poll(self) -> None:
        """Go on with the checkpoint in flight, if there is something to be done. Does not wait."""
        if self._step is not None:
            self._go_on(wait=False, needed=False)

    def finish(self, *, needed: bool = False) -> None:
        """Wait until no checkpoint is in flight. Raises an OutputError on all ranks if one that is `needed` could not
        be written."""
        while self._step is not None:
            self._go_on(wait=True, needed=needed)

    def abandon(self) -> None:
        """Give up the checkpoint in flight, because ranks are lost: at once, but for what waits for the disk. Each rank
        calls for itself."""
        if self._thread is not None:
            self._unwanted.set()
            self._thread.join()
        if self._sum is not None:
            self._sum.abandon()
        self._thread = self._sum = self._step = self._wiring = None

    @property
    def in_flight(self) -> int | None:
        """Return the step of the checkpoint in flight."""
        return self._step

    def stand_still(self) -> None:
        """Wait until this rank writes nothing. Any thread may call."""
        thread = self._thread
        if thread is not None:
            thread.join()

    def complete_alone(self) -> None:
        """Complete the checkpoint in flight without the other ranks, which do not come to it, if all have written their
        blocks. Raises an OutputError if they have not. Any thread of one rank may call."""
        if self._step is not None:
            self.stand_still()
            complete(self._part, range(self._channel.size), self._attributes(), self._keep)

    @property
    def _part(self) -> Path:
        assert self._step is not None
        return self._folder / f"{name_of(self._step)}.tmp"

    def _start(self, work: Callable[[], None]) -> None:
        self._thread = _Writing(work)
        self._thread.start()

    def _go_on(self, *, wait: bool, needed: bool) -> None:
        """Take the next step on the way to a complete checkpoint, if it can be taken."""
        rank = self._engine.world.rank
        if self._sum is None:
            if self._thread is not None and self._thread.is_alive() and not wait:
                return
            self._problem = None if self._thread is None else self._thread.outcome()
            self._thread = None
            failed = np.zeros(self._channel.size)
            failed[rank] = self._problem is not None
            self._sum = Pending(self._channel, failed)
        if not wait and not self._sum.done():
            return
        ranks, self._sum = np.flatnonzero(self._sum.sums()), None
        if ranks.size:
            self._give_up(int(ranks[0]), needed=needed)
        elif self._completing:
            self._step = None
        else:
            self._completing = True
            if rank == COMPLETES:
                part, size, attributes = self._part, self._channel.size, self._attributes
                self._start(lambda: complete(part, range(size), attributes(), self._keep))

    def _give_up(self, rank: int, *, needed: bool) -> None:
        """Give up the checkpoint in flight, because of what went wrong on this rank."""
        world, step = self._engine.world, self._step
        if world.rank == COMPLETES:
            rmtree(self._part, ignore_errors=True)
        self._step = None
        if needed:
            with world.agreement():
                if self._problem is not None:
                    raise self._problem
        elif world.rank == rank:
            warn(f"there is no checkpoint of step {step}: {self._problem}", alone=True)


def _look(trains: threading.Thread, unwanted: threading.Event) -> None:
    """Raise an OutputError if nobody wants what is being written: the thread that trains has ended, as after a second
    Ctrl-C, or ranks are lost."""
    if unwanted.is_set() or not trains.is_alive():
        raise OutputError("the training ended while it was written")


class _Writing(threading.Thread):
    """A _Writing is a thread that writes. Its error is kept until it is asked for.

    It is no daemon: Python would end in the middle of HDF5, which fails.
    """

    def __init__(self, work: Callable[[], None]):
        super().__init__(name="checkpoint")
        self._work = work
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # raised where the outcome is asked for
            self._error = error

    def outcome(self) -> NetTorrentError | None:
        """Wait until it is done; return the error by which it failed, or None. One that is not about what is written
        is raised."""
        self.join()
        if self._error is None:
            return None
        told = in_one_line(self._error) if isinstance(self._error, Exception) else None
        if told is None:
            raise self._error
        return told
