"""Beats are short messages between ranks that need no MPI: datagrams (UDP), signed with a key that only these ranks
know.

They work while MPI is stuck. They may be lost, so what matters is sent again.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import secrets
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.comm.processes import Process, this_process

_SEAL = 16  # bytes of a message's signature
_LARGEST = 60000  # bytes of a message
_ROOM = 4 << 20  # bytes that may wait to be read
_SIOCGIFADDR = 0x8915
Address = tuple[str, int]


class Member(NamedTuple):
    """A rank tells this of itself when the ranks meet."""

    host: str
    process: Process
    addresses: list[Address]


class Beats:
    """A Beats object sends and receives one rank's beats. All ranks of `world` make it together, over MPI."""

    def __init__(self, world: Group, host: str):
        self.rank = world.index
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        with suppress(OSError):
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _ROOM)
        self._socket.bind(("", 0))
        port = self._socket.getsockname()[1]
        own = Member(host, this_process(), [(address, port) for address in addresses()])
        told = world.gather_objects((secrets.token_bytes(32), own))
        self._key = told[0][0]
        self.members = [member for _, member in told]
        here = world.nodes[world.index]
        self.local = [rank for rank, node in enumerate(world.nodes) if node == here]
        self._ways = [
            [*([("127.0.0.1", member.addresses[0][1])] if node == here else []), *member.addresses[1:]]
            or member.addresses
            for node, member in zip(world.nodes, self.members, strict=True)
        ]
        self._known: dict[int, Address] = {}  # where a rank's messages come from
        self._number = 0
        self._newest = [0] * world.size

    def send(self, to: int, content: dict[str, Any]) -> None:
        """Send something that JSON can hold. It may get lost."""
        self._number += 1
        text = json.dumps([self.rank, to, self._number, content]).encode()
        for way in [self._known[to]] if to in self._known else self._ways[to]:
            with suppress(OSError):
                self._socket.sendto(self._seal(text) + text, way)

    def receive(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (rank, content) of what has arrived; no message older than one that has come before."""
        while True:
            try:
                data, way = self._socket.recvfrom(_LARGEST + _SEAL)
            except OSError:
                return
            text = data[_SEAL:]
            if not hmac.compare_digest(data[:_SEAL], self._seal(text)):
                continue
            source, to, number, content = json.loads(text)
            if to == self.rank and number > self._newest[source]:
                self._newest[source], self._known[source] = number, way
                yield source, content

    def heard(self, rank: int) -> bool:
        """Whether this rank's messages have come, so that the way to it is known."""
        return rank in self._known

    def close(self) -> None:
        """Give the socket back."""
        self._socket.close()

    def _seal(self, text: bytes) -> bytes:
        return hmac.digest(self._key, text, hashlib.sha256)[:_SEAL]


def addresses() -> list[str]:
    """Return this host's IPv4 addresses, that of the host itself first."""
    found = ["127.0.0.1"]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):
                ask = struct.pack("256s", name.encode()[:15])
                found.append(socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, ask)[20:24]))
    return list(dict.fromkeys(found))
