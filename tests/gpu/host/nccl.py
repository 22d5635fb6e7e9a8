"""NCCL's interface (cupy.cuda.nccl) over MPI, for arrays of the host device, with the strictest semantics that NCCL may
have.

A launch is work of its stream. A rank's launches run in the order in which its host launched them, over all streams and
communicators, one at a time: one whose partners have not come keeps all later ones waiting, and what waits too long
raises an error that names it. A group becomes one launch for each of its communicators, in an order that has nothing to
do with the program's; in a launch, collective operations run one after the other, then all sends and receives
together. Everything is a rendezvous: no operation ends before its partners have begun theirs.

Members are connected when they first use each other: a launch keeps its host waiting until theirs have launched, too
(ncclCollPreconnect and ncclP2PPreconnect in NCCL's group.cc).
"""

from __future__ import annotations

import gc
import os
import time
import zlib
from typing import Any
from weakref import WeakSet

import numpy as np
from mpi4py import MPI

from tests.gpu.host.nccl_launches import PAIRS, HostNcclError, Launch, Line, Operation, Order

PATIENCE = 20.0  # seconds
ID_BYTES = 128
FIRST_TAG = 20000  # in MPI.COMM_WORLD, where members of a new communicator meet


class HostNccl:
    """The library as one rank has it: what the module cupy.cuda.nccl is."""

    NcclError = HostNcclError
    available = True
    NCCL_SUM = 0
    NCCL_UINT8, NCCL_INT64, NCCL_FLOAT32, NCCL_FLOAT64, NCCL_BFLOAT16 = 1, 4, 7, 8, 9  # nccl.h

    def __init__(self, device: Order, *, patience: float = PATIENCE, version: int = 23200):
        self.device, self.line, self.version = device, Line(device, patience), version
        self._ids = 0
        self._depth = 0
        self._group: list[tuple[HostCommunicator, Operation, int]] = []

    def get_version(self) -> int:
        return self.version

    def get_unique_id(self) -> bytes:
        """Say where the members meet: at the rank that made the id, under its number."""
        self._ids += 1
        told = b"%d %d %s" % (MPI.COMM_WORLD.rank, self._ids, os.urandom(4).hex().encode())
        return told.ljust(ID_BYTES)

    def NcclCommunicator(self, size: int, identity: bytes, index: int) -> HostCommunicator:
        return HostCommunicator(self, size, identity, index)

    def groupStart(self) -> None:
        self._depth += 1

    def groupEnd(self) -> None:
        assert self._depth, "a group ends that has not begun"
        self._depth -= 1
        if self._depth:
            return
        group, self._group = self._group, []
        for communicator in sorted({each[0] for each in group}, key=lambda c: zlib.crc32(c.identity)):
            mine = [(operation, stream) for c, operation, stream in group if c is communicator]
            assert len({stream for _, stream in mine}) == 1, "a communicator's group on several streams"
            launch = Launch(communicator, [operation for operation, _ in mine])
            communicator.launches.add(launch)
            communicator._connect(launch)
            self.device.enqueue(mine[0][1], str(launch), launch.entered, launch.ready, launch.run)

    def add(self, communicator: HostCommunicator, operation: Operation, stream: int) -> None:
        """Launch an operation, or add it to the group."""
        self.groupStart()
        self._group.append((communicator, operation, stream))
        self.groupEnd()


class HostCommunicator:
    """A communicator (NcclCommunicator). Making it waits for all members."""

    def __init__(self, library: HostNccl, size: int, identity: bytes, index: int):
        self.library, self.size, self.index, self.identity = library, size, index, identity
        self.aborted, self.error = False, ""
        self.line = library.line
        self.launches = WeakSet[Launch]()  # those that are to run, or that a graph holds
        assert len(identity) == ID_BYTES
        maker, number, _ = identity.split()
        assert (index == 0) == (int(maker) == MPI.COMM_WORLD.rank), "member 0 makes the id"
        tag = FIRST_TAG + int(number)
        me = (index, MPI.COMM_WORLD.rank, MPI.Get_processor_name(), library.device.uuid)
        if index == 0:
            members = sorted([me, *(self._next(MPI.ANY_SOURCE, tag) for _ in range(size - 1))])
            for _, rank, *_ in members[1:]:
                MPI.COMM_WORLD.send(members, rank, tag)
        else:
            MPI.COMM_WORLD.send(me, int(maker), tag)
            members = self._next(int(maker), tag)
        several = library.version >= 23000 and os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1"
        if not several and len({member[2:] for member in members}) < size:
            raise HostNcclError("NCCL_ERROR_INVALID_USAGE: several ranks use one GPU")
        ranks = [member[1] for member in members]
        self.ranks = ranks
        self.comm = MPI.COMM_WORLD.Create_group(MPI.COMM_WORLD.group.Incl(ranks), tag)
        self.comm.Set_errhandler(MPI.ERRORS_RETURN)
        self._ring = self.comm.Dup()  # connects
        self._connected: set[tuple[str, int]] = set()

    def _connect(self, launch: Launch) -> None:
        """Wait for the hosts of members that are not connected yet."""
        pairs = {(each.kind, each.peer) for each in launch.operations if each.kind in PAIRS}
        pairs |= {("", 0)} if any(each.kind not in PAIRS for each in launch.operations) else set()
        token, requests = np.zeros(1, np.uint8), []
        for kind, peer in sorted(pairs - self._connected):
            if kind == "send":
                requests.append(self._ring.Issend(token, peer))
            elif kind == "recv":
                requests.append(self._ring.Irecv(np.empty(1, np.uint8), peer))
            else:
                requests.append(self._ring.Ibarrier())
        self._connected |= pairs
        until = time.monotonic() + self.line.patience
        while not MPI.Request.Testall(requests):
            if time.monotonic() > until:
                raise TimeoutError(f"the host of rank {MPI.COMM_WORLD.rank} waits for others' to launch {launch}")
            time.sleep(0.0002)

    def _next(self, source: int, tag: int) -> Any:
        until = time.monotonic() + self.line.patience
        while not MPI.COMM_WORLD.iprobe(source, tag):
            if time.monotonic() > until:
                raise HostNcclError(f"a communicator of {self.size} waits for its members")
            time.sleep(0.001)
        return MPI.COMM_WORLD.recv(source=source, tag=tag)

    def allReduce(self, sendbuf: int, recvbuf: int, count: int, datatype: int, op: int, stream: int) -> None:
        self._add("all_reduce", sendbuf, recvbuf, count, datatype, stream, op)

    def reduceScatter(self, sendbuf: int, recvbuf: int, recvcount: int, datatype: int, op: int, stream: int) -> None:
        self._add("reduce_scatter", sendbuf, recvbuf, recvcount, datatype, stream, op)

    def allGather(self, sendbuf: int, recvbuf: int, count: int, datatype: int, stream: int) -> None:
        self._add("all_gather", sendbuf, recvbuf, count, datatype, stream)

    def broadcast(self, sendbuff: int, recvbuff: int, count: int, datatype: int, root: int, stream: int) -> None:
        self._add("broadcast", sendbuff, recvbuff, count, datatype, stream, peer=root)

    def send(self, sendbuf: int, count: int, datatype: int, peer: int, stream: int) -> None:
        self._add("send", sendbuf, 0, count, datatype, stream, peer=peer)

    def recv(self, recvbuf: int, count: int, datatype: int, peer: int, stream: int) -> None:
        self._add("recv", 0, recvbuf, count, datatype, stream, peer=peer)

    def _add(
        self, kind: str, source: int, target: int, count: int, datatype: int, stream: int, op: int = 0, peer: int = 0
    ) -> None:
        assert not self.aborted, "a communicator is used after it was destroyed or aborted"
        assert op == HostNccl.NCCL_SUM
        assert count > 0
        assert 0 <= peer < self.size
        assert peer != self.index or kind not in PAIRS
        operation = Operation(kind, source, target, count, _dtype(datatype), peer)
        self.library.add(self, operation, stream)

    def check_async_error(self) -> None:
        if self.error:
            raise HostNcclError(self.error)

    def abort(self) -> None:
        """Let all launches of this communicator end, whatever they wait for."""
        self.aborted = True

    def destroy(self) -> None:
        if self.launches:
            gc.collect()
        held = [str(launch) for launch in self.launches]
        assert not held, f"a communicator is destroyed, and NCCL would wait for ever for the end of {held}"
        self.aborted = True
        self._ring.Free()
        self.comm.Free()


def _dtype(code: int) -> np.dtype[Any]:
    if code == HostNccl.NCCL_BFLOAT16:
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    types = {
        HostNccl.NCCL_UINT8: np.uint8,
        HostNccl.NCCL_INT64: np.int64,
        HostNccl.NCCL_FLOAT32: np.float32,
        HostNccl.NCCL_FLOAT64: np.float64,
    }
    return np.dtype(types[code])
