"""Products of bfloat16 matrices by oneDNN, added up in float32 and rounded once."""

from __future__ import annotations

from typing import Any

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.cpu.onednn import (
    BFLOAT16,
    BIAS,
    DST,
    FLOAT32,
    SRC,
    WEIGHTS,
    ArrayMemory,
    Dimensions,
    Handle,
    Library,
    Operation,
    adding,
)


class Products:
    """Products are those of one library. What it has compiled for matrices of the same sizes is used again.

    Matrices are C-contiguous, or some columns of such, or the transposes of these.
    """

    def __init__(self, library: Library):
        self._library = library
        self._known: dict[tuple[Any, ...], tuple[Handle, list[Handle]]] = {}

    def prepare(self, a: Array, b: Array, out: Array, *, accumulate: bool, bias: Array | None = None) -> Operation:
        """Return what computes out <- (or +=) a @ b, plus a bias, each time that it is called, as long as the arrays
        stay in place. Raises OneDnnError where the library cannot."""
        arrays = [a, b, out] if bias is None else [a, b, out, bias[None]]
        key = (accumulate, *((array.shape, array.strides, array.itemsize) for array in arrays))
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._describe(arrays, accumulate)
        description, layouts = known
        numbers = (SRC, WEIGHTS, DST, BIAS)[: len(arrays)]
        made = [ArrayMemory(self._library, *each) for each in zip(layouts, arrays, strict=True)]
        return Operation(self._library, description, dict(zip(numbers, made, strict=True)))

    def _describe(self, arrays: list[Array], accumulate: bool) -> tuple[Handle, list[Handle]]:
        """Return the description of an operation, and the layouts of its arrays."""
        library, attributes = self._library, adding(self._library, add=accumulate)
        layouts = [self._layout(array) for array in arrays]
        a, b, out, *bias = layouts
        description = library.make(
            "matmul_primitive_desc_create", library.engine, a, b, bias[0] if bias else None, out, attributes
        )
        return description, layouts

    def _layout(self, array: Array) -> Handle:
        steps = [step // array.itemsize for step in array.strides]
        kind = BFLOAT16 if array.itemsize == 2 else FLOAT32
        return self._library.make(
            "memory_desc_create_with_strides", 2, Dimensions(*array.shape), kind, Dimensions(*steps)
        )
