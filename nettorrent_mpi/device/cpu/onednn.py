"""oneDNN, Intel's library of kernels for every x86-64 and Arm processor, through its C interface (versions 3.x).

    pip install 'nettorrent_mpi[fast]'

Covers only products of float32 matrices (of bfloat16 ones: onednn_products.py), and convolutions of float32 or
bfloat16 images. Arrays are NumPy's, in NumPy's memory order: images (b, height, width, channels), weights (height,
width, inputs, outputs). oneDNN reorders weights for its code in each call; they are small.
"""

from __future__ import annotations

import ctypes
import platform
import site
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from nettorrent_mpi.device.arrays import Array, aligned
from nettorrent_mpi.device.cpu.blas import Gemm, address

_VERSION = 3  # version of the interface
# Numbers of dnnl_types.h.
_CPU, _IN_ORDER = 1, 1
BFLOAT16, FLOAT32 = 2, 3
_ANY, _VECTOR, _NHWC, _HWIO = 1, 2, 22, 28  # layouts; the library counts dimensions of weights as (o, i, h, w)
_TRAINING, _DIRECT = 64, 1
_ASK_WEIGHTS, _ASK_WEIGHT_GRADIENT = 131, 132
SRC, DST, WEIGHTS, BIAS = 1, 17, 33, 41
_GRADIENT = 128  # plus one of these
_BFLOAT16_ISA = 0x80  # the bit of instruction sets with products of bfloat16: AVX512-BF16 and what includes it, as AMX

Handle = ctypes.c_void_p
Dimensions = ctypes.c_int64 * 12


class _Argument(ctypes.Structure):
    _fields_ = [("number", ctypes.c_int), ("memory", Handle)]


class OneDnnError(RuntimeError):
    """A call of oneDNN failed: the shape is not supported, or memory ran out."""


class Library:
    """The loaded library with an engine and a stream; `gemm` multiplies float32 matrices. `multiplies_bfloat16` says
    whether the processor has instructions for products of bfloat16; others take longer over these than over float32."""

    def __init__(self, path: str):
        self._calls = ctypes.CDLL(path)
        self._calls.dnnl_primitive_desc_query_md.restype = Handle
        self._calls.dnnl_memory_desc_get_size.restype = ctypes.c_size_t
        letter = ctypes.c_char
        self.gemm = Gemm(self._calls.dnnl_sgemm, [letter, letter], ctypes.c_int64, ctypes.c_float, _letters)
        self.engine = self.make("engine_create", _CPU, ctypes.c_size_t(0))
        self._stream = self.make("stream_create", self.engine, _IN_ORDER)
        self.multiplies_bfloat16 = bool(self._calls.dnnl_get_effective_cpu_isa() & _BFLOAT16_ISA)

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function; raises OneDnnError unless it succeeds."""
        status = getattr(self._calls, f"dnnl_{name}")(*arguments)
        if status:
            raise OneDnnError(f"dnnl_{name} failed with status {status}")

    def make(self, name: str, *arguments: Any) -> Handle:
        """Call a function that creates an object; return the handle, its first argument."""
        made = Handle()
        self.call(name, ctypes.byref(made), *arguments)
        return made

    def layout(self, shape: Sequence[int], tag: int, data_type: int = FLOAT32) -> Handle:
        """Return the memory layout of an array of numbers of this type."""
        return self.make("memory_desc_create_with_tag", len(shape), Dimensions(*shape), data_type, tag)

    def wanted(self, description: Handle, which: int) -> tuple[Handle, int]:
        """Return (the layout that an operation chose, the memory that it needs, in elements of float32)."""
        layout = Handle(self._calls.dnnl_primitive_desc_query_md(description, which, 0))
        return layout, -(-self._calls.dnnl_memory_desc_get_size(layout) // 4)

    def execute(self, operation: Handle, count: int, arguments: Any) -> None:
        status = self._calls.dnnl_primitive_execute(operation, self._stream, count, arguments)
        if status:
            raise OneDnnError(f"dnnl_primitive_execute failed with status {status}")


def _letters(plain_a: bool, plain_b: bool) -> tuple[bytes, bytes]:
    order = (b"T", b"N")
    return order[plain_a], order[plain_b]


def published() -> bool:
    """Whether PyPI has the library for this machine."""
    return sys.platform == "linux" and platform.machine() == "x86_64"


@cache
def library() -> Library | None:
    """Return the library, if there is one: beside this Python (from PyPI's onednn-cpu-gomp), or the system's."""
    from ctypes.util import find_library  # starts programs, so only called where needed

    beside = [Path(root, "lib", f"libdnnl.so.{_VERSION}") for root in (sys.prefix, site.USER_BASE or sys.prefix)]
    for path in (*map(str, beside), find_library("dnnl")):
        try:
            if path:
                return Library(path)
        except (OSError, AttributeError, OneDnnError):  # for another machine, or another version
            continue
    return None


class ArrayMemory:
    """An array as oneDNN's memory object; its address may change from call to call."""

    def __init__(self, library: Library, layout: Handle, array: Array | None = None):
        self._set = library._calls.dnnl_memory_set_data_handle
        self.handle = library.make("memory_create", layout, library.engine, Handle())
        self._array = array
        if array is not None:
            self.at(array)

    def at(self, array: Array) -> None:
        self._set(self.handle, Handle(address(array)))


class Operation:
    """A primitive of the library that can be executed on memory."""

    def __init__(self, library: Library, description: Handle, memory: dict[int, ArrayMemory]):
        self._library, self._memory = library, memory  # has to live as long
        self._operation = library.make("primitive_create", description)
        self._count = len(memory)
        self._arguments = (_Argument * len(memory))(*(_Argument(number, m.handle) for number, m in memory.items()))

    def __call__(self) -> None:
        self._library.execute(self._operation, self._count, self._arguments)


def adding(library: Library, *, add: bool) -> Handle | None:
    """Return the attributes of an operation whose result is added to what is there."""
    if not add:
        return None
    attributes, sums = library.make("primitive_attr_create"), library.make("post_ops_create")
    library.call("post_ops_append_sum", sums, ctypes.c_float(1.0), 0, 0)
    library.call("primitive_attr_set_post_ops", attributes, sums)
    return attributes


def reorder(
    library: Library, source: Handle, target: Handle, memory: tuple[ArrayMemory, ArrayMemory], add: bool = False
) -> Operation:
    """Compute target <- (or, with `add`, +=) source, in the target's layout."""
    description = library.make(
        "reorder_primitive_desc_create", source, library.engine, target, library.engine, adding(library, add=add)
    )
    return Operation(library, description, {SRC: memory[0], DST: memory[1]})


class Primitive:
    """The convolution of `rows` images: `image` = (height, width, channels), `output` likewise, stride and padding
    ((before, after) of the height, then of the width). Raises OneDnnError if the library does not support it."""

    def __init__(
        self,
        library: Library,
        rows: int,
        image: tuple[int, int, int],
        output: tuple[int, int, int],
        kernel: tuple[int, int],
        stride: tuple[int, int],
        vertical: tuple[int, int],
        horizontal: tuple[int, int],
        *,
        data_type: int = FLOAT32,
    ):
        self._library = library
        weight = self._sizes = (output[2], image[2], *kernel)
        self._x_layout = library.layout((rows, image[2], *image[:2]), _NHWC, data_type)
        self._y_layout = library.layout((rows, output[2], *output[:2]), _NHWC, data_type)
        self._bias_layout = library.layout((output[2],), _VECTOR, data_type)
        self._weight_layout = library.layout(weight, _HWIO, data_type)
        self._free = library.layout(weight, _ANY, data_type)
        self._geometry = (
            Dimensions(*stride),
            Dimensions(0, 0),  # no holes between taps
            Dimensions(vertical[0], horizontal[0]),
            Dimensions(vertical[1], horizontal[1]),
        )
        self._x, self._y = ArrayMemory(library, self._x_layout), ArrayMemory(library, self._y_layout)
        self._bias, self._weight = ArrayMemory(library, self._bias_layout), ArrayMemory(library, self._weight_layout)
        # The descriptions of both backward passes are made from the forward one.
        self._forward = self._describe_forward(self._bias_layout)

    def _describe_forward(self, bias: Handle | None) -> Handle:
        return self._library.make(
            "convolution_forward_primitive_desc_create", self._library.engine, _TRAINING, _DIRECT,
            self._x_layout, self._free, bias, self._y_layout, *self._geometry, None,
        )  # fmt: skip

    def _own(self, description: Handle, which: int) -> tuple[Handle, ArrayMemory]:
        """Allocate memory for the weights, or their gradient, in the operation's layout."""
        layout, size = self._library.wanted(description, which)
        return layout, ArrayMemory(self._library, layout, aligned(size, np.float32))


class Forward(Primitive):
    """Computes y <- the convolution of x with the weights, plus the bias."""

    def __init__(self, library: Library, *shape: Any, bias: bool, data_type: int = FLOAT32):
        super().__init__(library, *shape, data_type=data_type)
        description = self._describe_forward(self._bias_layout if bias else None)
        layout, own = self._own(description, _ASK_WEIGHTS)
        self._lay_out = reorder(library, self._weight_layout, layout, (self._weight, own))
        memory = {SRC: self._x, WEIGHTS: own, DST: self._y} | ({BIAS: self._bias} if bias else {})
        self._convolve = Operation(library, description, memory)

    def __call__(self, x: Array, weight: Array, bias: Array | None, y: Array) -> None:
        self._x.at(x)
        self._weight.at(weight)
        self._y.at(y)
        if bias is not None:
            self._bias.at(bias)
        self._lay_out()
        self._convolve()


class InputGradient(Primitive):
    """Computes dx <- the gradient with respect to the input."""

    def __init__(self, library: Library, *shape: Any, data_type: int = FLOAT32):
        super().__init__(library, *shape, data_type=data_type)
        description = library.make(
            "convolution_backward_data_primitive_desc_create", library.engine, _DIRECT,
            self._x_layout, self._free, self._y_layout, *self._geometry, self._forward, None,
        )  # fmt: skip
        layout, own = self._own(description, _ASK_WEIGHTS)
        self._lay_out = reorder(library, self._weight_layout, layout, (self._weight, own))
        memory = {_GRADIENT + SRC: self._x, WEIGHTS: own, _GRADIENT + DST: self._y}
        self._convolve = Operation(library, description, memory)

    def __call__(self, weight: Array, dy: Array, dx: Array) -> None:
        self._weight.at(weight)
        self._y.at(dy)
        self._x.at(dx)
        self._lay_out()
        self._convolve()


class WeightGradient(Primitive):
    """Computes dw <- (or +=) the gradient with respect to the weights, always float32."""

    def __init__(self, library: Library, *shape: Any, data_type: int = FLOAT32):
        super().__init__(library, *shape, data_type=data_type)
        self._free = library.layout(self._sizes, _ANY)
        self._weight_layout = library.layout(self._sizes, _HWIO)
        self._weight = ArrayMemory(library, self._weight_layout)
        description = library.make(
            "convolution_backward_weights_primitive_desc_create", library.engine, _DIRECT,
            self._x_layout, self._free, None, self._y_layout, *self._geometry, self._forward, None,
        )  # fmt: skip
        layout, own = self._own(description, _ASK_WEIGHT_GRADIENT)
        memory = {SRC: self._x, _GRADIENT + DST: self._y, _GRADIENT + WEIGHTS: own}
        self._convolve = Operation(library, description, memory)
        self._store, self._add = (
            reorder(library, layout, self._weight_layout, (own, self._weight), add) for add in (False, True)
        )

    def __call__(self, x: Array, dy: Array, dw: Array, accumulate: bool) -> None:
        self._x.at(x)
        self._y.at(dy)
        self._weight.at(dw)
        self._convolve()
        (self._add if accumulate else self._store)()
