"""The folder of a run: which folders are one, what is said of others, and how files are written into it, whole or not
at all, with errors that name the file and the remedy."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nettorrent_mpi.data.storage import replacing, retried
from nettorrent_mpi.plan.errors import DataError, OutputError, listed, readable

RUN_FILES = ("config.yaml", "run.json", "metrics.jsonl", "summary.json")  # one of them makes a folder a run's


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run."""
    return any((folder / name).is_file() for name in RUN_FILES)


def run_of(path: Path) -> Path | None:
    """Return the folder of the run that a path names: itself, or that in which this file (model.h5, ...), this
    checkpoint or this folder of checkpoints is; None where there is none."""
    if is_run(path):
        return path
    above = path.absolute().parents
    inside = path.is_file() or path.name == "checkpoints"
    if inside and is_run(path.parent):
        return path.parent
    if path.is_dir() and above and above[0].name == "checkpoints" and is_run(above[1]):
        return above[1]
    return None


def no_run(path: Path) -> DataError:
    """Return the error about a path that names no run: what it is instead, and which runs are near."""
    what = "is a file" if path.is_file() else "has none of a run's files" if path.is_dir() else "does not exist"
    described = path.is_file() and path.suffix in (".yaml", ".yml")
    maker = f"`nettorrent train {path}`" if described else "`nettorrent train`"
    near = ""
    for folder in dict.fromkeys((path, path.parent, Path("runs"))):
        runs: list[str] = []
        with suppress(OSError):  # which cannot be read
            runs = sorted(each.name for each in folder.iterdir() if is_run(each))
        if runs:
            import difflib

            close = [] if folder == path else difflib.get_close_matches(path.name, runs, n=1)
            near = f"; did you mean {folder / close[0]}?" if close else f"; {folder}/ holds: {listed(runs)}"
            break
    return DataError(readable(f"{path} {what}: name the folder of a run, which {maker} makes{near}"))


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
            text = f"{path} could not be written: the disk is full: free space, or choose another place with {option}"
        else:
            text = f"{path} could not be written ({error.strerror or error}); choose another place with {option}"
        raise OutputError(text) from error
