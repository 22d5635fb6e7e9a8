"""A group of ranks and its collective operations on arrays. Nothing here pickles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

Array = npt.NDArray[Any]


class Group:
    """An ordered group of ranks: a communicator. `index` is this rank's place in it.

    Every operation on a group of one is free of MPI calls (or a copy), so that callers need no special case.
    """

    def __init__(self, comm: MPI.Intracomm):
        self.comm = comm
        self.size: int = comm.Get_size()
        self.index: int = comm.Get_rank()

    def barrier(self) -> None:
        """Wait for all."""
        self.comm.Barrier()

    def sum(self, values: Array) -> None:
        """Add up a contiguous array in place; every member gets bitwise the same sums."""
        if self.size > 1:
            self.comm.Allreduce(MPI.IN_PLACE, values)

    def mean(self, values: Array) -> None:
        """The mean of everyone's values, in place; bitwise the same for every member."""
        if self.size > 1:
            self.sum(values)
            np.multiply(values, 1 / self.size, out=values)

    def reduce_scatter(self, values: Array, part: Array, counts: Sequence[int]) -> None:
        """part <- this member's part of the sum of everyone's `values` (flat, divided as counts tell)."""
        if self.size > 1:
            self.comm.Reduce_scatter(values, part, counts)
        else:
            np.copyto(part, values)

    def allgather(self, part: Array, whole: Array, counts: Sequence[int]) -> None:
        """whole (flat) <- everyone's parts one after another. `part` may be this member's place in `whole` itself."""
        if self.size > 1:
            mine = whole[sum(counts[: self.index]) :][: counts[self.index]]
            own: Any = MPI.IN_PLACE if mine.ctypes.data == part.ctypes.data else part
            self.comm.Allgatherv(own, [whole, counts])
        elif whole.ctypes.data != part.ctypes.data:
            np.copyto(whole, part)

    def broadcast(self, values: Array, source: int) -> None:
        """values <- those of member `source`, everywhere."""
        if self.size > 1:
            for chunk in chunks(values):
                self.comm.Bcast(chunk, root=source)

    def maximum(self, values: Array) -> None:
        """The largest of everyone's values, in place."""
        if self.size > 1:
            self.comm.Allreduce(MPI.IN_PLACE, values, op=MPI.MAX)

    def pass_on(self, values: Array, into: Array) -> None:
        """Send `values` to the next member and receive the one before's: all members at once."""
        to, source = (self.index + 1) % self.size, (self.index - 1) % self.size
        self.comm.Sendrecv(values, to, recvbuf=into, source=source)

    def progress(self) -> None:
        """One call into MPI, so that messages move, of this group or another. Does not wait."""
        self.comm.Iprobe()

    def duplicate(self) -> Group:
        """The same members, with messages of their own: what is under way here and there is never confused."""
        comm = self.comm.Dup()
        comm.Set_errhandler(MPI.ERRORS_RETURN)
        return Group(comm)

    def send(self, values: Array, to: int, tag: int) -> None:
        """A blocking send of a contiguous array, for what happens once (saving, loading)."""
        for chunk in chunks(values):
            self.comm.Send(chunk, dest=to, tag=tag)

    def receive(self, values: Array, source: int, tag: int) -> None:
        """The other end of `send`."""
        for chunk in chunks(values):
            self.comm.Recv(chunk, source=source, tag=tag)


LARGEST_MESSAGE = 1 << 30  # bytes; MPI counts are C ints, and some transports fail at 2 GiB


def chunks(values: Array, largest: int | None = None) -> list[Array]:
    """A contiguous array as flat byte views of at most `largest` bytes (LARGEST_MESSAGE unless told) each."""
    largest = LARGEST_MESSAGE if largest is None else largest
    flat = values.reshape(-1).view(np.uint8)
    return [flat[i : i + largest] for i in range(0, flat.size, largest)]
