"""Signals ask a run to stop."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

EARLY = (signal.SIGUSR1, signal.SIGUSR2)  # what Slurm is told to send, and launchers pass on
TRAINING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Signals:
    """Signals note that this process is asked to stop: by USR1 or USR2 from now on, and while a training listens by
    TERM, INT or HUP, too.

    Before, these three end the process as usual, because there is nothing to save and a start-up may hang. A second INT
    (Ctrl-C) raises KeyboardInterrupt. HUP stays ignored where nohup has started the process.
    """

    def __init__(self) -> None:
        self.asked = False
        self._interrupted = self._tells = False
        self._before: dict[int, Any] = {}
        self._take(EARLY)

    def listen(self, *, tells: bool) -> None:
        """Note all signals. With `tells` the first INT is answered by a line."""
        self._tells = tells
        self._take(TRAINING)

    def _take(self, numbers: tuple[signal.Signals, ...]) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in numbers:
            if not (number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN):
                self._before.setdefault(number, signal.signal(number, self._note))

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
            if self._tells:  # not by sys.stderr, whose writing this may have interrupted
                os.write(2, b"nettorrent: stopping with a checkpoint; Ctrl-C again ends the run at once\n")
        self.asked = True

    def close(self) -> None:
        """Handle the signals as before. A second call does nothing."""
        before, self._before = self._before, {}
        for number, handler in before.items():
            signal.signal(number, handler)


def end_in_peace() -> None:
    """Let no signal replace the exit code from now on, while MPI ends and after it: srun ends the ranks that have not
    ended when the first one has, by TERM. Ctrl-C still ends this process at once."""
    for number in (*EARLY, *TRAINING):
        signal.signal(number, signal.SIG_DFL if number == signal.SIGINT else signal.SIG_IGN)
