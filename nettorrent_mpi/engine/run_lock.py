"""A RunLock on a folder lets no two runs write to it. It works on network file systems, which may lack locks of their
own, and does not outlive its owner: it is a file that its owner makes, refreshes and removes.

A lock whose owner was killed is taken over: at once where the owner ran on this machine (its process is gone), was a
rank of the same run or ran in an earlier turn of this Slurm job, otherwise once it has not been refreshed for STALE
seconds.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from nettorrent_mpi.data.files import parsed
from nettorrent_mpi.data.storage import check_folder
from nettorrent_mpi.engine.run_files import written
from nettorrent_mpi.plan.errors import InUseError, OutputError, warn

LOCK = "lock.json"
REFRESH = 15.0  # seconds between two signs of life
STALE = 150.0  # seconds without one after which an owner elsewhere is gone
_MACHINE = ("host", "boot", "namespace")  # where the same process number means the same process
_PROCESS = (*_MACHINE, "pid", "started")

Owner = dict[str, Any]


class _Seen(NamedTuple):
    owner: Owner  # empty if the lock was just made, or is damaged
    refreshed: float  # by the file system's clock


class RunLock:
    """A RunLock holds a folder, which it makes if need be, until it is released. Locks of one process do not exclude
    each other.

    Raises an InUseError if another run holds the folder. If that runs elsewhere and may be gone, this waits for its
    next sign of life; not for that of the same `run`, in which only the heir of a lost rank makes a lock again.
    """

    def __init__(self, folder: Path, run: str = ""):
        self._folder, self._path = folder, folder / LOCK
        self.owner = _this_process() | {"run": run}
        self._there = folder.exists()
        self._stop = threading.Event()
        self._lost = False
        if not folder.is_dir():
            check_folder(folder)
        with written(self._path):
            folder.mkdir(parents=True, exist_ok=True)
        with written(self._path):
            self._first = self._acquire()
        if self._first:
            threading.Thread(target=self._refresh, daemon=True).start()

    def check(self) -> None:
        """Raise an OutputError if another run has taken the folder over, as while this process was suspended."""
        if self._lost:
            raise OutputError(f"another run has taken over {self._folder}, because this one showed no sign of life")

    def release(self) -> None:
        """Give the folder back. It is removed if nothing was written to it."""
        self._stop.set()
        with suppress(OSError):
            if self._first and not self._lost:
                self._path.unlink()
            if not self._there:
                self._folder.rmdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _acquire(self) -> bool:
        """Make the lock; return False if this process has it already."""
        watched: _Seen | None = None
        until = 0.0
        while not self._make():
            seen = self._look()
            if seen is None:
                continue
            if _alike(seen.owner, self.owner, _PROCESS):
                return False
            lives = _lives(seen.owner, self.owner)
            if lives is None and watched is None:
                watched, left = seen, STALE - (self._now() - seen.refreshed)
                until = time.monotonic() + left
                if left > 0:
                    text = f"waiting for a sign of life of {_in_words(seen.owner)}, which holds {self._folder}"
                    warn(f"{text}, for at most {left:.0f} s", alone=True)
            if lives or (lives is None and seen != watched):
                raise InUseError(
                    f"{self._folder} is in use by {_in_words(seen.owner)}: choose another folder with --output DIR, or "
                    f"stop that run (if there is none, remove {self._path})"
                )
            if lives is False or time.monotonic() >= until:
                self._remove(seen)
            else:
                time.sleep(min(1.0, STALE / 10))
        return True

    def _make(self) -> bool:
        """Make the lock, unless there is one."""
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        try:
            os.write(descriptor, json.dumps(self.owner).encode())
        except OSError:
            self._path.unlink()
            raise
        finally:
            os.close(descriptor)
        return True

    def _look(self, path: Path | None = None) -> _Seen | None:
        return _look(path or self._path)

    def _now(self) -> float:
        """Return the time by the file system's clock."""
        probe = self._folder / f"{LOCK}.{_name(self.owner)}"
        try:
            probe.touch()
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _remove(self, seen: _Seen) -> None:
        """Remove a lock without owner; another process may do so at the same time, and have made its own by now."""
        aside = self._folder / f"{LOCK}.{_name(self.owner)}"
        try:
            self._path.rename(aside)
        except FileNotFoundError:
            return
        found = self._look(aside)
        if found is not None and found.owner != seen.owner:
            with suppress(OSError):
                os.link(aside, self._path)
        aside.unlink()

    def _refresh(self) -> None:
        while not self._stop.wait(REFRESH):
            with suppress(OSError):
                seen = self._look()
                if seen is None:
                    self._make()  # somebody has removed it, and nobody else has made one
                elif seen.owner and not _alike(seen.owner, self.owner, _PROCESS):
                    self._lost = True
                    return
                else:
                    os.utime(self._path)


def in_use(folder: Path) -> bool | None:
    """Whether a run has this folder at present; None if there is no lock. Nothing is waited for or changed: an owner
    elsewhere that was silent for STALE seconds, by this machine's clock, is gone. Raises OSErrors."""
    seen = _look(folder / LOCK)
    if seen is None:
        return None
    lives = _lives(seen.owner, _this_process() | {"run": ""})
    return abs(time.time() - seen.refreshed) < STALE if lives is None else lives


def _look(path: Path) -> _Seen | None:
    """Read a lock; None if there is none. Opening it makes NFS ask its server."""
    try:
        with path.open("rb") as file:
            text, refreshed = file.read(), os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return _Seen({}, 0.0) if path.is_symlink() else None  # a link to nothing is in the way
    try:
        owner = parsed(text)
    except ValueError:
        owner = {}
    return _Seen(owner if isinstance(owner, dict) else {}, refreshed)


def _this_process() -> Owner:
    return {
        "host": socket.gethostname(),
        "boot": _read("/proc/sys/kernel/random/boot_id"),
        "namespace": _link("/proc/self/ns/pid"),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "job": os.environ.get("SLURM_JOB_ID") or os.environ.get("PBS_JOBID"),
        "turn": os.environ.get("SLURM_RESTART_COUNT", "0"),
    }


def _name(owner: Owner) -> str:
    return f"{owner['host']}-{owner['pid']}"


def _alike(owner: Owner, own: Owner, keys: tuple[str, ...]) -> bool:
    return all(owner.get(key) == own[key] for key in keys)


def _lives(owner: Owner, own: Owner) -> bool | None:
    """Whether the owner of a lock lives; None if that cannot be known from here."""
    if own["run"] and owner.get("run") == own["run"]:
        return False
    if own["boot"] and _alike(owner, own, _MACHINE):
        pid = owner.get("pid")
        return None if _is_hidden(pid) else _started(pid) == owner.get("started")
    if own["job"] and owner.get("job") == own["job"] and owner.get("turn") != own["turn"]:
        return False
    return None


def _in_words(owner: Owner) -> str:
    if not owner:
        return "another run"
    job = f", job {owner['job']}" if owner.get("job") else ""
    return f"another run (process {owner.get('pid')} on {owner.get('host')}{job}, since {owner.get('since')})"


def _started(pid: object) -> str | None:
    """Return when a process of this machine began, in ticks since the machine did; None if it is gone."""
    state, *others = (_read(f"/proc/{pid}/stat").rpartition(")")[2] or "Z").split()
    return None if state in "ZX" else others[18]


def _is_hidden(pid: object) -> bool:
    """Whether a process exists of which /proc, mounted with hidepid, tells another user nothing."""
    try:
        os.kill(pid if isinstance(pid, int) and pid > 0 else os.getpid(), 0)
    except PermissionError:
        return not Path(f"/proc/{pid}").exists()
    except (OSError, OverflowError):
        pass
    return False


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return str(Path(path).readlink())
    except OSError:
        return ""
