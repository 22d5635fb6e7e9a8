"""Checks of the places where a training writes: shared memory, MPI's folder in /tmp, the output folder."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nettorrent_mpi.comm.launcher import BACKING
from nettorrent_mpi.data.storage import flush
from nettorrent_mpi.doctor.finding import Finding, fault, ok, warning
from nettorrent_mpi.doctor.surroundings import Surroundings

# Bytes in BACKING for each rank, without which MPI may not start. Where there is room, Open MPI 5.0.11 takes 0.5 MB and
# MPICH 5.0.2 takes 5.5 (seen with 2 and 6 ranks); with less than that both start, too.
SEGMENT = 1 << 20
SPACIOUS = 256 << 20  # bytes there from which on weights and rows of small networks fit, too
SESSION = 16 << 20  # bytes that MPI's folder of a session may need
LEAST = 1 << 20  # bytes that the smallest network needs
RESULTS = 100 << 20  # bytes that a few checkpoints of a small network may need
SLOW = 20e6  # bytes per second of the output folder under which one is warned
_TRIAL = 32 << 20  # bytes written at most to measure that
_SECONDS = 1.0  # for it
_LONGEST = 90  # bytes of the path of a session's folder: those of its sockets have at most 107


@contextmanager
def trial_folder(output: Path) -> Iterator[Path]:
    """Give a folder for trials in the output folder, or, where that is not yet there, in the nearest one above; it is
    removed afterwards. Raises OSError."""
    with tempfile.TemporaryDirectory(prefix=".nettorrent-doctor-", dir=nearest_above(output)) as folder:
        yield Path(folder)


def nearest_above(output: Path) -> Path:
    """Return the output folder, or the nearest folder above it that is there."""
    return next(each for each in (output.absolute(), *output.absolute().parents) if os.path.lexists(each))


def look_at_shared_memory(place: Surroundings) -> Iterator[Finding]:
    """Check that the ranks of this node can share memory."""
    remedy = "mount -o remount,size=50% /dev/shm; a container: --shm-size=8g (Docker), or the host's own (Apptainer)"
    try:
        room = os.statvfs(BACKING)
        with tempfile.TemporaryFile(dir=BACKING) as file:
            os.posix_fallocate(file.fileno(), 0, 1 << 16)
    except OSError as error:
        yield fault(f"{BACKING} cannot be written to ({error.strerror}): MPI has no memory to share", remedy)
        return
    free, whole = room.f_bavail * room.f_frsize, room.f_blocks * room.f_frsize
    told = f"{free / 1e6:,.0f} of {whole / 1e6:,.0f} MB are free"
    told += ", mounted noexec, which does no harm" if room.f_flag & os.ST_NOEXEC else ""
    if place.launched and free < place.here * SEGMENT:
        yield fault(
            f"{told}: too little for the messages of {place.here} ranks, which may end by a bus error",
            remedy,
        )
    elif free < SPACIOUS:
        yield warning(f"{told}: ranks may each keep their own copy of weights and training rows", remedy)
    else:
        yield ok(told)


def look_at_session(place: Surroundings) -> Iterator[Finding]:
    """Check the folder in which Open MPI keeps the sockets and files of a session."""
    folder = Path(os.environ.get("PMIX_SERVER_TMPDIR") or os.environ.get("TMPDIR") or "/tmp")
    remedy = "set TMPDIR (for mpirun) to a folder on a local disk, as /tmp, that can be written to"
    try:
        room = os.statvfs(folder)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1 << 16))
            file.flush()
    except OSError as error:
        yield fault(f"{folder} cannot be written to ({error.strerror}): Open MPI does not start", remedy)
        return
    free = room.f_bavail * room.f_frsize
    if free < SESSION:
        yield warning(f"{folder}: only {free / 1e6:.1f} MB are free, and Open MPI may not start", remedy)
    elif len(os.fsencode(folder)) > _LONGEST:
        yield warning(f"{folder} is too long for the sockets that Open MPI makes in it", remedy)
    else:
        yield ok(f"{folder}: {free / 1e9:,.1f} GB are free")


def look_at_output(place: Surroundings) -> Iterator[Finding]:
    """Check that results can be written; on the first rank of a node, also how fast, and whether files have locks."""
    above = nearest_above(place.output)
    where = str(place.output) if above == place.output.absolute() else f"{place.output} (to be made in {above})"
    remedy = "choose another folder with --output DIR (`output` in a configuration), or free space there"
    if not above.is_dir():
        yield fault(f"{above} is a file, not a folder", remedy)
        return
    room = os.statvfs(above)
    free = room.f_bavail * room.f_frsize
    size = min(_TRIAL, max(free // 4, 1 << 12)) if place.first else 1
    try:
        with trial_folder(place.output) as folder:
            speed, locks = _write(folder / "trial", size), _refusal(folder)
            flush(folder)
    except OSError as error:
        yield fault(f"{where} cannot be written to ({error.strerror or error})", remedy)
        return
    if not place.first:
        return
    told = f"{where}: {free / 1e9:,.1f} GB are free, {speed / 1e6:,.0f} MB/s"
    if free < LEAST:
        yield fault(f"{where}: only {free / 1e6:.1f} MB are free for results", remedy)
    elif free < RESULTS:
        yield warning(f"{where}: only {free / 1e6:.1f} MB are free for checkpoints and results", remedy)
    elif speed < SLOW:
        yield warning(
            f"{told}: checkpoints are slow to write",
            "a parallel or local file system; fewer checkpoints (the section `checkpoint`)",
        )
    else:
        yield ok(told)
    if locks:
        yield ok(f"files there cannot be locked ({locks}), and are read without")


def _write(path: Path, size: int) -> float:
    """Write a file of up to this size; return the bytes per second until they are on the disk."""
    block, written, began = os.urandom(min(1 << 20, size)), 0, time.perf_counter()
    with path.open("wb") as file:
        while written < size and time.perf_counter() - began < _SECONDS:
            written += file.write(block[: size - written])
            file.flush()
        os.fsync(file.fileno())
    return written / max(time.perf_counter() - began, 1e-6)


def _refusal(folder: Path) -> str:
    """Return what the system says where a file in this folder cannot be locked; "" where it can."""
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return str(error.strerror)
    return ""
