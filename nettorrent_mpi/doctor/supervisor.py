"""The supervisor of a rank's checks: they are made in a child process, so that one which hangs or crashes is told of,
and the others are made all the same."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from nettorrent_mpi.comm.processes import ending_with_this
from nettorrent_mpi.doctor.child import ROLL, START, TOGETHER, TRAINING
from nettorrent_mpi.doctor.finding import Finding, fault
from nettorrent_mpi.doctor.notes import SILENT, Note, Notes
from nettorrent_mpi.doctor.surroundings import Surroundings

TICK = 0.2  # seconds between two notes
COMPILING = 4  # times as long a training may take as another check: kernels of a GPU are compiled
WAITS = 3  # times as long ranks may take until MPI has started, while others are still at their own checks


class Supervisor:
    """A Supervisor makes the checks of this rank, by `run`. Afterwards `told` has the findings of ranks, `hosts` their
    hosts; `complete`: those of all ranks."""

    def __init__(self, place: Surroundings, host: str, without: Sequence[str] = ()):
        """`without`: the checks that are not to be made."""
        self._place, self._host = place, host
        self._findings: list[Finding] = []
        self._done = list(without)
        self._check, self._began = "the start", time.monotonic()
        self._everyone: list[tuple[str, list[Finding]]] | None = None
        self._ended = False  # the checks, all of them
        self._met = False  # whether the ranks have met in them
        self._stopped = False  # by a signal
        self._child: subprocess.Popen[bytes] | None = None
        self._last = b""  # of what the child has written
        self.notes = Notes(place.first)

    # -- results ------------------------------------------------------------------------------------------------------

    @property
    def complete(self) -> bool:
        """Whether all was checked, and rank 0 knows what all ranks have found."""
        return self._ended and (self._met or not self._place.launched)

    @property
    def told(self) -> dict[int, Sequence[Finding]]:
        """The findings of each rank that has told any, as far as known."""
        everyone = dict(enumerate(findings for _, findings in self._everyone or []))
        heard = {rank: note.findings for rank, note in self.notes.heard.items()}
        return everyone | heard | {self._place.rank: self._findings}

    @property
    def hosts(self) -> list[str]:
        known = [host for host, _ in self._everyone or []] or [note.host for note in self.notes.heard.values()]
        return list(dict.fromkeys([*known, *([] if known else [self._host])]))

    def silent(self) -> Finding | None:
        """Return a fault that names the ranks of this node that do not answer, or did not come to their end."""
        if self._everyone is not None and self._ended:
            return None
        now, heard, words = time.monotonic(), self.notes.heard, []
        lowest = self._place.rank - self._place.local  # of a node's ranks, as launchers number them mostly
        expected = {lowest + i for i in range(self._place.here)} if self._place.first else {lowest, self._place.rank}
        for rank in sorted(expected | set(heard) if len(heard) < self._place.here else set(heard)):
            note = heard.get(rank)
            if note is None:
                words.append(f"rank {rank} has not answered at all")
            elif now - note.came > SILENT:
                words.append(f"rank {rank} does not answer since {now - note.came:.0f} s, at `{note.check}`")
        if not words:
            return None
        return fault(
            "; ".join(words), "look at that process: stopped, or waiting for a file system? (ps, dmesg)"
        )._replace(check=ROLL)

    # -- the checks ---------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Make all checks. Returns when they are made, or cannot be."""
        signal.signal(signal.SIGTERM, self._stop)
        while not self._attempt():
            pass

    def _stop(self, *_: Any) -> None:
        self._stopped = True

    def _attempt(self) -> bool:
        """Make the checks that are left in one child process; return whether no other attempt is to be made."""
        ours, theirs = os.pipe()
        command = [sys.executable, "-m", "nettorrent_mpi.doctor.child", str(theirs)]
        os.set_inheritable(theirs, True)
        child = self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            close_fds=False, preexec_fn=ending_with_this(),  # noqa: PLW1509 (MPICH's ranks talk by what they inherit)
        )  # fmt: skip
        os.close(theirs)
        assert child.stdin is not None
        assert child.stdout is not None
        task = {"place": [str(self._place.output), *self._place[1:]], "done": self._done, "findings": self._findings}
        with suppress(OSError):
            child.stdin.write(json.dumps(task).encode() + b"\n")
            child.stdin.close()
        self._began, self._last = time.monotonic(), b""
        with selectors.DefaultSelector() as selector:
            selector.register(ours, selectors.EVENT_READ)
            selector.register(child.stdout, selectors.EVENT_READ)
            text, told = b"", 0.0
            while not self._stopped:
                for key, _ in selector.select(TICK):
                    some = os.read(key.fd, 1 << 16)
                    if not some:
                        selector.unregister(key.fileobj)
                    elif key.fd == ours:
                        *lines, text = (text + some).split(b"\n")
                        for line in lines:
                            self._take(json.loads(line))
                    else:
                        self._last = (self._last + some)[-4000:]
                if time.monotonic() - told > TICK:
                    self._tell()
                    told = time.monotonic()
                if not selector.get_map() or self._late():
                    break
        os.close(ours)
        self._tell()
        if self._stopped:
            return True
        if not self._late() and self._wait(child):
            return self._judge(child.returncode)
        self._found(
            fault(
                f"no answer within {self._limit():.0f} s",
                "see whether a file system or a program hangs (ps, dmesg); --limit gives more time",
            )
        )
        if self._check in TOGETHER:
            self._tell()
            return True  # the child stays until the report is made: its end would end the others
        child.kill()
        self._done.append(self._check)
        return False

    def _wait(self, child: subprocess.Popen[bytes]) -> bool:
        """Wait for a child that has closed its lines; return whether it has ended."""
        with suppress(subprocess.TimeoutExpired):
            child.wait(self._place.seconds)
        return child.returncode is not None

    def _judge(self, code: int) -> bool:
        """Say why the child has ended, unless it was complete; return whether no other is to be started."""
        if self._ended:
            return True
        words = self._last.decode(errors="replace").strip().splitlines()
        end = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        self._found(
            fault(
                f"the process {end}: {words[-1].strip() if words else 'without a word'}",
                "this check alone may show more: python -X faulthandler -m nettorrent_mpi doctor --checks NAME",
            )
        )
        self._done.append(self._check)
        return self._check in TOGETHER

    def _take(self, said: dict[str, Any]) -> None:
        """Take a line of the child's."""
        if "begin" in said:
            if self._check not in self._done:
                self._done.append(self._check)
            self._check, self._began = said["begin"], time.monotonic()
        elif "finding" in said:
            self._findings.append(Finding(*said["finding"]))
        elif "everyone" in said:
            self._everyone = [(host, [Finding(*each) for each in findings]) for host, findings in said["everyone"]]
        else:
            self._ended, self._met = True, bool(said["met"])

    def _found(self, finding: Finding) -> None:
        self._findings.append(finding._replace(check=self._check))

    def _tell(self) -> None:
        seconds = time.monotonic() - self._began
        self.notes.tell(Note(self._place.rank, self._check, seconds, self._ended, self._findings, self._host))
        self.notes.hear()

    def _limit(self) -> float:
        return self._place.seconds * (COMPILING if self._check == TRAINING else 1)

    def _late(self) -> bool:
        """Whether the present check has taken too long."""
        late = time.monotonic() - self._began - self._limit()
        if late > 0 and self._check == START:  # others may come later, because a check of theirs hung
            now = time.monotonic()
            busy = any(now - note.came < SILENT and note.check not in TOGETHER for note in self.notes.heard.values())
            return not busy or late > (WAITS - 1) * self._place.seconds
        return late > 0

    def wait_for_others(self) -> None:
        """Wait, where MPI does not work, on the first rank of a node until the others have ended their checks, or do
        not answer; on the others, until it has made its report, because its launcher ends all when one has ended."""
        until = time.monotonic() + 2 * self._place.seconds + self._place.local  # if the first does not report, the next
        while time.monotonic() < until and not self._stopped:
            self._tell()
            if self._place.first:
                now, notes = time.monotonic(), self.notes.heard.values()
                if len(notes) >= self._place.here and all(self._settled(note, now) for note in notes):
                    return
                if now > until - self._place.seconds and all(self._settled(note, now) for note in notes):
                    return
            elif self.notes.alone:
                return
            time.sleep(TICK / 4)

    @staticmethod
    def _settled(note: Note, now: float) -> bool:
        return note.ended or now - note.came > SILENT or (note.check in TOGETHER and bool(note.findings))

    def end(self) -> None:
        """End the child, and the notes: the others may end, too."""
        self.notes.close()
        if self._child is not None and self._child.poll() is None:
            self._child.kill()
