"""This is the only module that knows NCCL, NVIDIA's collective communication library, through CuPy's binding.

CuPy's binding suffices: its communicators are blocking, and can be aborted. Those of nccl4py, which are made without
blocking and can shrink, are for surviving lost ranks, which no run does.

NCCL wants all ranks to launch in one order over all communicators, because a GPU may run one launch at a time and each
waits for its partners: `plan/launches.py` proves that order, and NCCL_LAUNCH_ORDER_IMPLICIT makes GPUs keep to the
host's (NCCL 2.26 and later; NVIDIA's user guide, "Environment Variables").
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.comm.world import World
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.plan.errors import LaunchError

IN_HOST_ORDER = "NCCL_LAUNCH_ORDER_IMPLICIT"
SHARED_GPUS = "NCCL_MULTI_RANK_GPU_ENABLE"  # NCCL 2.30 and later, experimental: several ranks on one GPU
TYPES = {
    "float32": "NCCL_FLOAT32",
    "float64": "NCCL_FLOAT64",
    "bfloat16": "NCCL_BFLOAT16",
    "uint8": "NCCL_UINT8",
    "int64": "NCCL_INT64",
}


def _cupy() -> Any:
    """Return CuPy's binding of NCCL: a module."""
    from cupy.cuda import nccl

    return nccl


open_library: Callable[[], Any] = _cupy  # replaced by tests


def load(*, shared_gpus: bool = False) -> Any:
    """Load NCCL; its environment is set before. Raises a LaunchError that says what is missing."""
    os.environ.setdefault(IN_HOST_ORDER, "1")
    if shared_gpus:
        os.environ.setdefault(SHARED_GPUS, "1")
    try:
        library = open_library()
    except ImportError as error:
        raise LaunchError(_missing(str(error))) from error
    if not library.available:
        raise LaunchError(_missing("CuPy finds no libnccl.so.2"))
    return library


def _missing(reason: str) -> str:
    return (
        f"NCCL, by which GPUs exchange arrays, cannot be loaded ({reason}): install it with "
        "pip install '.[cuda12]' or '.[cuda13]', or load your site's NCCL module"
    )


def identities(world: World, library: Any, groups: Sequence[Group]) -> list[bytes]:
    """Return the unique ids of this rank's groups, which NCCL's communicators are made from.

    All ranks of the world call. Member 0 of a group makes its id. Should one fail, all ranks raise its error before any
    of them waits for an id.
    """
    with world.agreement():
        made = [_identity(library) if group.index == 0 and group.size > 1 else b"" for group in groups]
    return [_told(group, identity) for group, identity in zip(groups, made, strict=True)]


def _identity(library: Any) -> bytes:
    try:
        return bytes(library.get_unique_id())
    except library.NcclError as error:
        raise LaunchError(f"NCCL cannot start ({error}); NCCL_DEBUG=INFO makes it say more") from error


def _told(group: Group, identity: bytes) -> bytes:
    """Return member 0's id on all members."""
    received: bytes = group.comm.bcast(identity) if group.size > 1 else identity
    return received


class Communicator:
    """A Communicator is NCCL's, of the members of a group. They launch the same operations in the same order.

    Arrays are C-contiguous in the GPU's memory, `stream` is the stream's handle (CUDA's pointer). Nothing waits.
    """

    def __init__(self, library: Any, group: Group, identity: bytes, address: Callable[[Array], int]):
        """Make it together with all other members. Where NCCL refuses, that rank raises a LaunchError at once; it is
        not agreed, so that it ends the others, which wait inside NCCL."""
        self._address, self._sum = address, library.NCCL_SUM
        self._types = {np.dtype(name): getattr(library, TYPES[name]) for name in TYPES if name != "bfloat16"}
        self._bfloat16 = library.NCCL_BFLOAT16
        self._error = library.NcclError
        try:
            self._nccl = library.NcclCommunicator(group.size, identity, group.index)
        except self._error as error:
            raise LaunchError(
                f"NCCL cannot connect {group.size} GPUs ({error}); NCCL_DEBUG=INFO makes it say why"
            ) from error
        # CuPy's object destroys what it holds when it goes, and NCCL then waits for graphs and for the other members:
        # after an error for ever. So it stays, and only `close` and `abort` end the communicator.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._nccl))

    def all_reduce(self, values: Array, stream: int) -> None:
        """Compute values <- the sum of everyone's."""
        at = self._address(values)
        self._nccl.allReduce(at, at, values.size, self._type(values), self._sum, stream)

    def reduce_scatter(self, values: Array, part: Array, stream: int) -> None:
        """Compute part <- this member's part of the sum of everyone's values; it may be that section of `values`."""
        kind = self._type(values)
        self._nccl.reduceScatter(self._address(values), self._address(part), part.size, kind, self._sum, stream)

    def all_gather(self, part: Array, whole: Array, stream: int) -> None:
        """Gather whole <- everyone's parts; the own one may be its section of `whole`."""
        self._nccl.allGather(self._address(part), self._address(whole), part.size, self._type(part), stream)

    def broadcast(self, values: Array, source: int, stream: int) -> None:
        """Broadcast values <- those of member `source`."""
        at = self._address(values)
        self._nccl.broadcast(at, at, values.size, self._type(values), source, stream)

    def send(self, values: Array, to: int, stream: int) -> None:
        """Send to a member, which receives as many elements."""
        self._nccl.send(self._address(values), values.size, self._type(values), to, stream)

    def receive(self, values: Array, source: int, stream: int) -> None:
        """Receive from a member."""
        self._nccl.recv(self._address(values), values.size, self._type(values), source, stream)

    def check(self) -> None:
        """Raise NCCL's error if an operation failed."""
        self._nccl.check_async_error()

    def abort(self) -> None:
        """End what waits for members that will not come. The communicator cannot be used afterwards."""
        self._nccl.abort()

    def close(self) -> None:
        """Free it, when none of its operations is in flight."""
        self._nccl.destroy()

    def _type(self, values: Array) -> int:
        known: int | None = self._types.get(values.dtype)
        if known is None:  # ml_dtypes' type, which NumPy knows only once that package is loaded
            assert values.dtype.name == "bfloat16", values.dtype
            known = self._bfloat16
        return known


@contextmanager
def one_launch(library: Any) -> Iterator[None]:
    """Launch the operations of the `with` block, on any communicators, as one: they wait for their partners
    together, so their order among themselves does not matter."""
    library.groupStart()
    try:
        yield
    finally:
        library.groupEnd()
