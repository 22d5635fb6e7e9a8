"""Standard output and standard error that cannot end a command: where they fail, text is lost and the work goes on."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from nettorrent_mpi.cli.terminal import fitted, text_width


class SafeStream:
    """A SafeStream writes to a text stream what that takes, on a terminal in lines that fit. `error` is the first
    failure other than a reader's leaving (as `head` does); `tell` is called with it, once."""

    def __init__(self, stream: TextIO | None, tell: Callable[[Exception], None] = lambda error: None):
        # Python has none where the descriptor is closed
        self._stream = stream if stream is not None else open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        self._tell = tell
        self.encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self.error: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        width = None if "\x1b" in text else text_width(self._stream)  # a live display has its own lines
        self._attempt(lambda: self._write(text if width is None else fitted(text, width)))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def leave(self) -> None:
        """Flush for the last time. If that fails, the interpreter's own flush at its end is made to succeed."""
        if not self._attempt(self._stream.flush):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            self._stream.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding))

    def _attempt(self, action: Callable[[], object]) -> bool:
        try:
            action()
        except (OSError, ValueError) as error:  # ValueError: it is closed
            if not isinstance(error, BrokenPipeError) and self.error is None:
                self.error = error
                self._tell(error)
            return False
        return True


@contextmanager
def safe_streams() -> Iterator[SafeStream]:
    """Make sys.stdout and sys.stderr Streams inside the `with` block, and give the former."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # a closed one's number must not become that of a run's file, which libraries would write their output to
    os.close(descriptor)
    before = sys.stdout, sys.stderr
    errors = SafeStream(sys.stderr)

    def tell(error: Exception) -> None:
        reason = getattr(error, "strerror", None) or error
        errors.write(f"nettorrent: warning: standard output cannot be written ({reason})\n")

    output = SafeStream(sys.stdout, tell)
    sys.stdout, sys.stderr = cast("TextIO", output), cast("TextIO", errors)
    try:
        yield output
    finally:
        output.leave()
        errors.leave()
        sys.stdout, sys.stderr = before
