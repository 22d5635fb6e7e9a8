"""NCCL's interface (cupy.cuda.nccl) over MPI, for arrays of the host device, with the strictest semantics that NCCL may
have.

A launch is work of its stream. A rank's launches run in the order in which its host launched them, over all streams and
communicators, one at a time: one whose partners have not come keeps all later ones waiting, and what waits too long
raises an error that names it. A group becomes one launch for each of its communicators, in an order that has nothing to
do with the program's; in a launch, collective operations run one after the other, then all sends and receives
together. Everything is a rendezvous: no operation ends before its partners have begun theirs.
"""

from __future__ import annotations

import gc
import os
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol
from weakref import WeakSet

import numpy as np
from mpi4py import MPI

from nettorrent_mpi.device.arrays import Array

PATIENCE = 20.0  # seconds
ID_BYTES = 128
FIRST_TAG = 20000  # in MPI.COMM_WORLD, where members of a new communicator meet


class Order(Protocol):
    """What this library needs of the host device: memory and streams as NCCL knows them, by number."""

    uuid: str

    def memory(self, address: int, size: int) -> Array:
        """Return the bytes at an address of the device."""

    def enqueue(
        self, stream: int, name: str, entered: Callable[[], None], ready: Callable[[], bool], run: Callable[[], None]
    ) -> None:
        """Append work to a stream. Each time that it is launched, alone or with a graph, `entered` is called; when it
        is next, `ready` again and again until it says so; then `run`."""


class HostNcclError(RuntimeError):
    """NCCL's error."""


class Operation(NamedTuple):
    """One call of the library. Addresses are the device's; 0 stands for none."""

    kind: str
    source: int
    target: int
    count: int
    dtype: np.dtype[Any]
    peer: int = 0

    def __str__(self) -> str:
        where = {"send": f" to {self.peer}", "recv": f" from {self.peer}", "broadcast": f" from {self.peer}"}
        return f"{self.kind} of {self.count} {self.dtype}{where.get(self.kind, '')}"


class HostNccl:
    """The library as one rank has it: what the module cupy.cuda.nccl is."""

    NcclError = HostNcclError
    available = True
    NCCL_SUM = 0
    NCCL_UINT8, NCCL_INT64, NCCL_FLOAT32, NCCL_FLOAT64, NCCL_BFLOAT16 = 1, 4, 7, 8, 9  # nccl.h

    def __init__(self, device: Order, *, patience: float = PATIENCE, version: int = 23200):
        self.device, self.patience, self.version = device, patience, version
        self.launches: deque[Turn] = deque()  # in the host's order, until they are complete
        self.count = 0
        self.abandoned: list[Iterator[None] | None] = []
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

    def _next(self, source: int, tag: int) -> Any:
        until = time.monotonic() + self.library.patience
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
        assert peer != self.index or kind not in {"send", "recv"}
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
        self.comm.Free()


class Launch:
    """A Launch is what one call or one group launches on one communicator. As part of a graph it runs many times."""

    def __init__(self, communicator: HostCommunicator, operations: list[Operation]):
        self.communicator, self.operations = communicator, operations
        self._turns: deque[Turn] = deque()
        communicator.launches.add(self)

    def entered(self) -> None:
        self._turns.append(Turn(self))
        self.communicator.library.launches.append(self._turns[-1])

    def ready(self) -> bool:
        return self._turns[0].complete()

    def run(self) -> None:
        self._turns.popleft()

    def __str__(self) -> str:
        members = ", ".join(str(rank) for rank in self.communicator.ranks)
        return f"{' + '.join(str(each) for each in self.operations)} among ranks {members}"


class Turn:
    """A Turn is one execution of a launch."""

    def __init__(self, launch: Launch):
        library = launch.communicator.library
        library.count += 1
        self.launch, self.number = launch, library.count
        self._library = library
        self._until = float("inf")
        self._steps: Iterator[None] | None = None
        self._done = False

    def __str__(self) -> str:
        return f"NCCL launch {self.number} of rank {MPI.COMM_WORLD.rank} ({self.launch})"

    def complete(self) -> bool:
        """Go on with it if it is its turn. Whether it has ended."""
        communicator, launches = self.launch.communicator, self._library.launches
        if self._done:
            return True
        if self._until == float("inf"):
            self._until = time.monotonic() + self._library.patience
        if communicator.aborted:
            launches.remove(self)
            self._library.abandoned.append(self._steps)  # whose requests may still read and write memory
            self._done = True
            return True
        if launches[0] is self:
            if self._steps is None:
                self._steps = self._run()
            if next(self._steps, self) is self:  # the generator has ended
                launches.popleft()
                self._done = True
                return True
        if time.monotonic() > self._until:
            behind = "its partners" if launches[0] is self else str(launches[0])
            communicator.error = f"{self} has waited {self._library.patience:g} s for {behind}"
            raise TimeoutError(communicator.error)
        return False

    def _run(self) -> Iterator[None]:
        pairs = [each for each in self.launch.operations if each.kind in {"send", "recv"}]
        for operation in self.launch.operations:
            if operation not in pairs:
                yield from self._collective(operation)
        comm, requests = self.launch.communicator.comm, []
        for operation in pairs:
            size = operation.count * operation.dtype.itemsize
            tag = operation.dtype.num if operation.dtype.num < 256 else 256
            if operation.kind == "send":
                requests.append(comm.Issend(self._bytes(operation.source, size), operation.peer, tag))
            else:
                requests.append(comm.Irecv(self._bytes(operation.target, size), operation.peer, tag))
        statuses = [MPI.Status() for _ in requests]
        while not MPI.Request.Testall(requests, statuses):
            yield
        for operation, status in zip(pairs, statuses, strict=True):
            got, wanted = status.Get_count(MPI.BYTE), operation.count * operation.dtype.itemsize
            if operation.kind == "recv" and got != wanted:
                raise HostNcclError(f"{self}: {operation} got {got} bytes")

    def _collective(self, operation: Operation) -> Iterator[None]:
        communicator = self.launch.communicator
        comm, members, index = communicator.comm, communicator.size, communicator.index
        told = np.frombuffer(f"{operation}".encode().ljust(80)[:80], np.uint8)
        everyone = np.empty((members, told.size), np.uint8)
        yield from self._wait(comm.Iallgather(told, everyone))
        names = {row.tobytes().decode().strip() for row in everyone}
        if len(names) > 1:
            raise HostNcclError(f"{self}: the members' operations differ: {sorted(names)}")
        kind, source, target, count, dtype, root = operation
        size = count * dtype.itemsize
        sent = self._bytes(source, size * (members if kind == "reduce_scatter" else 1))
        got = np.empty((members, sent.size), np.uint8)
        yield from self._wait(comm.Iallgather(sent, got))
        out = self._bytes(target, size * (members if kind == "all_gather" else 1))
        self._in_place(operation)
        if kind == "all_gather":
            out[...] = got.reshape(-1)
        elif kind == "broadcast":
            out[...] = got[root]
        else:
            values = got.view(dtype)
            if kind == "reduce_scatter":
                values = values[:, count * index : count * (index + 1)]
            wide = np.float32 if dtype.name == "bfloat16" else dtype
            total = values[0].astype(wide)
            for row in values[1:]:
                total += row.astype(wide)
            out[...] = total.astype(dtype).view(np.uint8)

    def _in_place(self, operation: Operation) -> None:
        """Where the arrays of a collective operation overlap, they have to lie as NCCL allows."""
        communicator = self.launch.communicator
        kind, source, target, count, dtype, _ = operation
        size, offset = count * dtype.itemsize, communicator.index * count * dtype.itemsize
        ends = {
            "reduce_scatter": (size * communicator.size, size, offset),
            "all_gather": (size, size * communicator.size, -offset),
        }
        sent, got, allowed = ends.get(kind, (size, size, 0))
        overlap = source < target + got and target < source + sent
        assert not overlap or target - source == allowed, f"{self}: the arrays overlap"

    def _bytes(self, address: int, size: int) -> Array:
        return self._library.device.memory(address, size)

    @staticmethod
    def _wait(request: MPI.Request) -> Iterator[None]:
        while not request.Test():
            yield


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
