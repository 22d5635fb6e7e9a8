"""Files of choices: which algorithm is the fastest for what, as trials have told. Later runs start at once, and choose
alike.

A file is JSON: {subject: {what: choice}}. Its subject says what choices are valid for: a processor or GPU with these
versions of libraries. Ranks that share a file read and write it one after another, as long as that takes no longer than
PATIENCE. Where there is no place for it, each process has its own trials.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

SUBJECTS = 8  # subjects that a file keeps: the latest
PATIENCE = 20.0  # seconds to wait for other ranks


def choices_folder() -> Path:
    """Return the folder of all files: `~/.cache/nettorrent_mpi`, or under XDG_CACHE_HOME. Raises RuntimeError where the
    home folder is unknown."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "nettorrent_mpi")


@contextmanager
def open_choices(path: Callable[[], Path]) -> Iterator[FileIO | None]:
    """Open a file of choices for this process alone; None if that is impossible."""
    try:
        path().parent.mkdir(parents=True, exist_ok=True)
        file = path().open("a+b", buffering=0)  # unbuffered: nothing is left to write when it is closed
    except (OSError, RuntimeError):  # RuntimeError: the home folder is unknown
        yield None
        return
    try:
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.002)
            except OSError:  # the file system has no locks
                break
        yield file
    finally:
        with suppress(OSError):  # as where a quota is found to be exceeded
            file.close()


def read_choices(file: FileIO | None) -> dict[str, dict[str, str]]:
    """Read the file: {subject: {what: choice}}."""
    if file is None:
        return {}
    try:
        file.seek(0)
        return {
            subject: {what: choice for what, choice in choices.items() if isinstance(choice, str)}
            for subject, choices in json.loads(file.read() or "{}").items()
        }
    except (OSError, ValueError, AttributeError):  # an unreadable, incomplete or foreign file
        return {}


def write_choices(file: FileIO | None, subject: str, known: dict[str, str]) -> None:
    """Write what is known of a subject, and leave other ones as they are."""
    if file is None:
        return
    others = [(other, choices) for other, choices in read_choices(file).items() if other != subject]
    text = json.dumps(dict([*others[1 - SUBJECTS :], (subject, known)]), indent=1) + "\n"
    with suppress(OSError):  # a full disk does not prevent training
        file.truncate(0)
        file.write(text.encode())
