"""A thread of this process ticks about once a second, for whoever looks after ranks while MPI may be stuck.

It is one daemon thread, made when somebody first asks, that needs Python's lock for some microseconds per second. Time
in which the process is suspended has no ticks.
"""

from __future__ import annotations

import selectors
import sys
import threading
import time
import traceback
from collections.abc import Callable

SECOND = 1.0  # from tick to tick


class Ticking:
    """Ticking calls functions once a second, and others as soon as a file can be read."""

    def __init__(self) -> None:
        self._calls: list[Callable[[], None]] = []
        self._files = selectors.DefaultSelector()
        self._thread: threading.Thread | None = None

    def each(self, call: Callable[[], None]) -> None:
        """Call a function at each tick, until `stop`. One that raises is not called again."""
        self._calls = [*self._calls, call]
        self._begin()

    def stop(self, call: Callable[[], None]) -> None:
        """Do not call this function any more. It may still run once."""
        self._calls = [each for each in self._calls if each != call]

    def when(self, file: int, call: Callable[[], None]) -> None:
        """Call a function once, when a file can be read."""
        self._files.register(file, selectors.EVENT_READ, call)
        self._begin()

    def _begin(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="ticking", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        due = time.monotonic() + SECOND
        while True:
            for key, _ in self._files.select(max(due - time.monotonic(), 0)):
                self._files.unregister(key.fileobj)
                self._call(key.data)
            if time.monotonic() >= due:
                for call in self._calls:
                    self._call(call)
                due = time.monotonic() + SECOND

    def _call(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception:  # of ours; the training does not depend on it
            self.stop(call)
            sys.stderr.write(f"nettorrent: warning: the watch over ranks ends:\n{traceback.format_exc()}")


TICKING = Ticking()
