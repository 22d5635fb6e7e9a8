"""The files of a run are written whole or not at all; errors name the file and the remedy."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nettorrent_mpi.data.storage import replacing, retried
from nettorrent_mpi.plan.errors import OutputError


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""

    def write() -> None:
        with replacing(path) as part:
            part.write_text(text, encoding="utf-8")

    retried(write)


@contextmanager
def written(path: Path, option: str = "--output DIR") -> Iterator[None]:
    """Turn an OSError inside the `with` block into an OutputError that names the file and the remedy, the `option` for
    another folder."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            text = f"{path} could not be written: the disk is full; free some space or choose another {option}"
        else:
            text = f"{path} could not be written ({error.strerror or error}); choose another folder with {option}"
        raise OutputError(text) from error
