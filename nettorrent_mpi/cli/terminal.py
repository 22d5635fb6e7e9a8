"""The width of a terminal, and text that fits into it."""

from __future__ import annotations

import os
import stat
from typing import TextIO

# Programs that give each rank a pseudo-terminal, whatever their own output is.
_LAUNCHERS = ("mpirun", "mpiexec", "orterun", "prterun", "prun")


def terminal_width(stream: TextIO) -> int | None:
    """Return the width of the terminal behind `stream`; None if it is not a terminal that a person watches.

    Open MPI gives each rank a pseudo-terminal of size 0 x 0 even if mpirun writes to a file, so there mpirun's own
    output decides.
    """
    try:
        if not stream.isatty():
            return None
        columns = os.get_terminal_size(stream.fileno()).columns
        return columns or _launcher_width(1)
    except (OSError, ValueError):
        return None


def text_width(stream: TextIO) -> int | None:
    """Return the width of the terminal on which text written to `stream` is seen, also behind a launcher that reads it
    through a pipe; None if it goes elsewhere."""
    try:
        width, descriptor = terminal_width(stream), stream.fileno()
        if width is None and descriptor in (1, 2) and not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return _launcher_width(descriptor)
        return width
    except (OSError, ValueError):
        return None


def _launcher_width(descriptor: int) -> int | None:
    process = os.getppid()
    while process > 1:
        with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as file:
            name, _, rest = file.read().partition("(")[2].rpartition(")")
        if name in _LAUNCHERS:
            # opened for reading, and never as this process's controlling terminal
            terminal = os.open(f"/proc/{process}/fd/{descriptor}", os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK)
            try:
                return os.get_terminal_size(terminal).columns or None
            finally:
                os.close(terminal)
        process = int(rest.split()[1])
    return None


def fitted(text: str, width: int) -> str:
    """Break lines that are longer than `width` between words; what goes on is indented. A longer word stays whole."""
    lines = []
    for whole in text.split("\n"):
        line, indent = whole, " " * (len(whole) - len(whole.lstrip()) + 2)
        while len(line) > width:
            at = line.rfind(" ", len(indent), width + 1)
            at = line.find(" ", max(width, len(indent))) if at < 0 else at
            if at < 0:
                break
            lines.append(line[:at].rstrip())
            line = indent + line[at:].lstrip()
        lines.append(line)
    return "\n".join(lines)
