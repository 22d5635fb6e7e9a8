"""Files are written whole or not at all, also on full disks and where a file system has no locks or fails once."""

from __future__ import annotations

import errno
import os
import shlex
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from nettorrent_mpi.plan.errors import DataError, OutputError

if TYPE_CHECKING:  # loaded only where needed: most ranks of a run never read or write such a file
    import h5py

T = TypeVar("T")
PAUSES = (0.1, 0.5)  # seconds before each further attempt
# What a network's file system may answer once. (A file that could not be flushed has to be written anew: the system
# forgets the pages.)
PASSING = {errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EBUSY, errno.ETIMEDOUT, errno.EREMOTEIO}
# The answers of a file system that cannot flush a file or a folder (some of SMB, FUSE, virtual machines).
_NO_FLUSH = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM, errno.EISDIR}
# The oldest format of HDF5 whose metadata have checksums: with an older one a flipped bit may give wrong arrays.
_FORMAT = ("v110", "latest")


def retried(action: Callable[[], T]) -> T:
    """Return the result of `action`, which is called again if the file system fails in a way that may pass."""
    for pause in PAUSES:
        try:
            return action()
        except OSError as error:
            if error.errno not in PASSING:
                raise
            time.sleep(pause)
    return action()


def refused(error: Exception, path: Path) -> None:
    """Raise a DataError if reading failed by an answer of the system's: then the file may well be sound."""
    number = getattr(error, "errno", None)
    if number and number != errno.EINVAL:  # which HDF5 gives where an offset makes no sense
        remedy = "; try again" if number in PASSING else ""
        raise DataError(f"could not be read ({os.strerror(number)}){remedy}", file=str(path)) from error


def check_plain(path: Path) -> None:
    """Raise DataError for what is there and no file: reading a pipe or a device may never end. Raises OSError."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise DataError("cannot be read: it is no plain file", file=str(path))


def regular(path: Path) -> FileIO:
    """Open a regular file for reading, whoever made it: a link is not followed, and nothing is waited for, as a pipe
    would be. Raises DataError for anything else, also where there is nothing."""
    try:
        descriptor = retried(lambda: os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC))
    except FileNotFoundError:
        raise DataError("is missing", file=str(path)) from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise DataError("is a link, which is not followed; use the file itself", file=str(path)) from None
        raise DataError(f"could not be read ({error.strerror})", file=str(path)) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DataError("is not a regular file", file=str(path))
    return FileIO(descriptor)


def check_file(path: Path, *, overwrite: bool) -> None:
    """Check before the work that a file can be written afterwards. Raises OutputError where its folder is missing or
    takes no files, where it is a folder, and where it exists and `overwrite` does not allow to replace it."""
    if path.is_dir():
        raise OutputError(f"{path} is a folder: name a file with --output FILE")
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists: choose another name with --output FILE, or replace it with --overwrite")
    if not path.parent.exists():
        text = (
            f"{path}: there is no folder {path.parent}: make it (mkdir -p {shlex.quote(str(path.parent))}), or choose"
        )
        raise OutputError(f"{text} another place with --output FILE")
    _check_takes_files(path.parent, path, "FILE")


def check_folder(path: Path) -> None:
    """Check before the work that files can be written into a folder, which is made where it is missing. Raises
    OutputError."""
    there = next(each for each in (path, *path.absolute().parents) if each.exists())
    _check_takes_files(there, path, "DIR")


def _check_takes_files(folder: Path, path: Path, what: str) -> None:
    from tempfile import TemporaryFile

    another = f"choose another place with --output {what}"
    if not folder.is_dir():
        where = "" if folder == path else f"{path}: "
        raise OutputError(f"{where}{folder} is a file, not a folder; {another}")
    try:
        with TemporaryFile(dir=folder):  # os.access knows neither of read-only file systems nor what root may not
            pass
    except OSError as error:
        raise OutputError(f"{path}: {folder} cannot be written to ({error.strerror or error}); {another}") from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name to write a file under: it takes the place of `path` once it is whole and on the disk, and
    is removed if writing fails."""
    part = path.with_name(f"{path.name}.part")
    part.unlink(missing_ok=True)
    os.close(create(str(part)))
    try:
        yield part
        flush(part)
        part.replace(path)
        flush(path.parent)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def create(path: str, flags: int = os.O_WRONLY) -> int:
    """Create a file and open it, as `open` wants it of an opener: never one that is there already, nor where a link
    leads to."""
    return os.open(path, flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk, where the file system can tell."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_FLUSH:
            raise


def read_hdf5(path: Path) -> h5py.File:
    """Open an HDF5 file for reading, without locks where the file system has none. Raises OSError, and DataError for
    what is no file."""
    import h5py

    def read() -> h5py.File:
        check_plain(path)
        try:
            return h5py.File(path, "r")
        except OSError as error:
            if (
                "unable to lock file" not in str(error) or error.errno == errno.EAGAIN
            ):  # which is: somebody writes to it
                raise
            return h5py.File(path, "r", locking=False)

    return retried(read)


@contextmanager
def new_hdf5(path: Path) -> Iterator[h5py.File]:
    """Give a new HDF5 file to write: it takes the place of `path` once it is whole. Raises OSError."""
    import h5py

    with replacing(path) as part, _Target(part, "w+") as target:
        with h5py.File(target, "w", libver=_FORMAT) as file:
            yield file
        if target.error is not None:
            raise target.error


class _Target(FileIO):
    """A file that HDF5 writes to. HDF5 2.0 ends the process where writing fails (seen: a segmentation fault on a full
    disk), so it is told that all went well, and `error` has the failure."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._attempt(lambda: self._write(view))
        return len(view)

    def _write(self, view: memoryview) -> None:
        while view:
            view = view[super().write(view) :]

    def readinto(self, target: Any) -> int:
        return self._attempt(lambda: super(_Target, self).readinto(target)) or len(target)

    def truncate(self, size: int | None = None) -> int:
        return self._attempt(lambda: super(_Target, self).truncate(size)) or 0

    def flush(self) -> None:
        """Do nothing: the file is flushed when it is whole."""

    def _attempt(self, action: Callable[[], T]) -> T | None:
        if self.error is None:
            try:
                return action()
            except OSError as error:
                self.error = error
        return None
