"""Arrays, and the workspaces that hold them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
Shape: TypeAlias = tuple[int, ...]
DType: TypeAlias = Any  # anything numpy.dtype() accepts

RESHAPED = 16  # reshaped arrays that a workspace caches; a layer uses two or three


class Workspace:
    """A Workspace allocates arrays once and hands them out again, so that the steady state allocates nothing.

    One workspace belongs to one layer and one micro-batch slot. `keep` gives memory that stays unchanged until the same
    slot is used again (for backward); `scratch` gives memory that all layers share and that is valid only until another
    layer runs. A smaller shape under the same name gives a view of the same memory, so the last, smaller batch costs
    nothing; a larger one reallocates (once: the first step has the largest). Contents are undefined when first handed
    out, and later whatever was left there. `allocate` makes flat arrays of a size and dtype on the device.
    """

    def __init__(
        self, dtype: DType, shared: Workspace | None = None, allocate: Callable[[int, DType], Array] | None = None
    ):
        self.dtype = np.dtype(dtype)
        self._allocate = aligned if allocate is None else allocate
        self._views: dict[tuple[Any, ...], Array] = {}
        self._memory: dict[tuple[str, np.dtype[Any]], Array] = {}
        self._shared = shared if shared is not None else self
        self._children: dict[str, Workspace] = {}
        self._reshaped: dict[tuple[int, Shape], tuple[Array, Array]] = {}
        self.made = 0  # of the shared one: how many arrays it and those that share with it have allocated
        self.keeps_gradients = False  # of the shared one: whether `passed` gives the slot's own memory

    def keep(self, name: str, shape: Shape, dtype: DType = None) -> Array:
        """Return memory of this layer and slot: C-contiguous, of `shape`, by default in the workspace's dtype."""
        key = (name, shape, dtype)
        view = self._views.get(key)
        if view is None:
            view = self._make(name, shape, self.dtype if dtype is None else np.dtype(dtype))
            self._views[key] = view
        return view

    def scratch(self, name: str, shape: Shape, dtype: DType = None) -> Array:
        """Return memory shared by all layers and slots of this rank, valid until another layer runs."""
        return self._shared.keep(name, shape, dtype)

    def passed(self, name: str, shape: Shape) -> Array:
        """Return memory for a gradient that layers pass to each other: scratch memory, or, where backward passes are
        split, memory of this layer and slot, in which the gradients of weights find it later."""
        return (self if self._shared.keeps_gradients else self._shared).keep(name, shape)

    def gradient(self, shape: Shape, dy: Array) -> Array:
        """Return `passed` memory for a dx of `shape` that does not overlap dy: two buffers alternate along the layers.

        Which one it is does not depend on whether its memory has to grow: otherwise later passes would choose other
        ones than the first, and let these grow in their turn.
        """
        home = self if self._shared.keeps_gradients else self._shared
        memory = home._memory.get(("dx", home.dtype))
        taken = memory is not None and np.may_share_memory(memory, dy)
        return home.keep("other dx" if taken else "dx", shape)

    def reshaped(self, array: Array, shape: Shape) -> Array:
        """Return a C-contiguous array in another shape: the same object for the same array."""
        key = (id(array), shape)
        known = self._reshaped.get(key)
        if known is None:
            if len(self._reshaped) == RESHAPED:
                self._reshaped.clear()
            known = self._reshaped[key] = array, array.reshape(shape)  # its id is unique as long as it lives
        return known[1]

    def child(self, name: str) -> Workspace:
        """Return the workspace of a layer inside this one (of a composite), sharing its scratch memory."""
        if name not in self._children:
            self._children[name] = Workspace(self.dtype, self._shared, self._allocate)
        return self._children[name]

    @property
    def bytes(self) -> int:
        """The bytes of all memory allocated so far, that of children included; scratch memory counts where it is
        shared."""
        own = sum(int(memory.nbytes) for memory in self._memory.values())
        return own + sum(child.bytes for child in self._children.values())

    def _make(self, name: str, shape: Shape, dtype: np.dtype[Any]) -> Array:
        size = int(np.prod(shape, dtype=np.int64))
        memory = self._memory.get((name, dtype))
        if memory is None or memory.size < size:
            memory = self._allocate(size, dtype)
            self._memory[(name, dtype)] = memory
            self._shared.made += 1
            self._views = {k: v for k, v in self._views.items() if k[0] != name}
        return memory[:size].reshape(shape)


def aligned(size: int, dtype: DType) -> Array:
    """Allocate a flat array of `size` elements, uninitialised, aligned to 64 bytes (a cache line)."""
    dtype = np.dtype(dtype)
    raw = np.empty(size * dtype.itemsize + 64, dtype=np.uint8)
    offset = -raw.ctypes.data % 64
    return raw[offset : offset + size * dtype.itemsize].view(dtype)


def as_dtype(dtype: DType) -> Any:
    """Return the dtype of any name of a type; NumPy knows bfloat16 from ml_dtypes."""
    if isinstance(dtype, str) and dtype == "bfloat16":
        from ml_dtypes import bfloat16

        return np.dtype(bfloat16)
    return np.dtype(dtype)


def is_bfloat16(x: Array) -> bool:
    """Whether the elements are bfloat16, which neither NumPy's arithmetic nor MPI knows."""
    return x.dtype.kind == "V" and x.dtype.name == "bfloat16"


def unwritten(shape: Shape, dtype: DType) -> Array:
    """Return zeros that nobody is to write: of these the system keeps one page, however many they are."""
    return np.zeros(shape, as_dtype(dtype))


def quiet() -> AbstractContextManager[Any]:
    """Suppress warnings of overflows and of non-finite numbers, which are counted explicitly."""
    return np.errstate(all="ignore")
