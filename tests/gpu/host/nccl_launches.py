"""Launches of NCCL's double (nccl.py): what their operations do, and when a rank's launches run."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
from mpi4py import MPI

from nettorrent_mpi.device.arrays import Array

PAIRS = ("send", "recv")


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


class Members(Protocol):
    """What a launch needs of its communicator."""

    comm: MPI.Intracomm
    size: int
    index: int
    ranks: list[int]
    aborted: bool
    error: str
    line: Line


class Line:
    """A rank's launches, in the host's order, until they are complete."""

    def __init__(self, device: Order, patience: float):
        self.device, self.patience = device, patience
        self.turns: deque[Turn] = deque()
        self.count = 0
        self.abandoned: list[Iterator[None] | None] = []  # whose requests may still read and write memory


class Launch:
    """A Launch is what one call or one group launches on one communicator. As part of a graph it runs many times."""

    def __init__(self, communicator: Members, operations: list[Operation]):
        self.communicator, self.operations = communicator, operations
        self._turns: deque[Turn] = deque()

    def entered(self) -> None:
        self._turns.append(Turn(self))
        self.communicator.line.turns.append(self._turns[-1])

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
        line = launch.communicator.line
        line.count += 1
        self.launch, self.number, self._line = launch, line.count, line
        self._until = float("inf")
        self._steps: Iterator[None] | None = None
        self._done = False

    def __str__(self) -> str:
        return f"NCCL launch {self.number} of rank {MPI.COMM_WORLD.rank} ({self.launch})"

    def complete(self) -> bool:
        """Go on with it if it is its turn. Whether it has ended."""
        communicator, turns = self.launch.communicator, self._line.turns
        if self._done:
            return True
        if self._until == float("inf"):
            self._until = time.monotonic() + self._line.patience
        if communicator.aborted:
            turns.remove(self)
            self._line.abandoned.append(self._steps)
            self._done = True
            return True
        if turns[0] is self:
            if self._steps is None:
                self._steps = self._run()
            if next(self._steps, self) is self:  # the generator has ended
                turns.popleft()
                self._done = True
                return True
        if time.monotonic() > self._until:
            behind = "its partners" if turns[0] is self else str(turns[0])
            communicator.error = f"{self} has waited {self._line.patience:g} s for {behind}"
            raise TimeoutError(communicator.error)
        return False

    def _run(self) -> Iterator[None]:
        pairs = [each for each in self.launch.operations if each.kind in PAIRS]
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
        return self._line.device.memory(address, size)

    @staticmethod
    def _wait(request: MPI.Request) -> Iterator[None]:
        while not request.Test():
            yield
