"""Notes by which the first rank of a node knows what all its ranks have found, and where they are, though MPI does not
start: datagrams on a socket of this machine, whose name the ranks of a run derive from their launcher."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from nettorrent_mpi.comm.launcher import LAUNCHER
from nettorrent_mpi.doctor.finding import Finding

_LARGEST = 100_000  # bytes of a note
SILENT = 3.0  # seconds without a note, which comes several times a second, after which a rank does not answer


class Note(NamedTuple):
    """A Note of a rank: the check that it makes, since when, whether it has ended them, and its findings."""

    rank: int
    check: str
    seconds: float
    ended: bool
    findings: Sequence[Finding]
    host: str = ""
    came: float = 0.0  # by the receiver's clock


class Notes:
    """Notes of the ranks of a node to their first one, which keeps the latest of each: `heard`."""

    def __init__(self, first: bool):
        line = LAUNCHER.processes
        name = f"\0nettorrent-doctor-{os.getuid()}-{line[-1].pid if line else os.getppid()}"
        self.heard: dict[int, Note] = {}
        self.alone = False  # whether the first rank takes notes no more
        self._reached = False
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._to = None if first else name
        if first:
            with suppress(OSError):  # another run of the same launcher
                self._socket.bind(name)

    def tell(self, note: Note) -> None:
        """Send this rank's present note, or keep it, on the first rank."""
        if self._to is None:
            self.heard[note.rank] = note._replace(came=time.monotonic())
            return
        try:
            self._socket.sendto(json.dumps(note).encode()[:_LARGEST], self._to)
            self._reached = True
        except ConnectionRefusedError:
            self.alone = self.alone or self._reached
        except OSError:  # it does not read them
            pass

    def hear(self) -> None:
        """Take what has come."""
        while self._to is None:
            try:
                note = Note(*json.loads(self._socket.recv(_LARGEST)))
            except (OSError, ValueError):
                return
            findings = [Finding(*each) for each in note.findings]
            self.heard[note.rank] = note._replace(findings=findings, came=time.monotonic())

    def close(self) -> None:
        self._socket.close()
