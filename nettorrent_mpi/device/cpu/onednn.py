"""oneDNN, Intel's library of kernels for every x86-64 and Arm processor, through its C interface (versions 3.x).

    pip install 'nettorrent_mpi[fast]'

Covers only products of float32 matrices and convolutions of float32 images. Arrays are NumPy's, in NumPy's memory
order: images (b, height, width, channels), weights (height, width, inputs, outputs). oneDNN reorders weights for its
code in each call; they are small.
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
_CPU, _IN_ORDER, _FLOAT32 = 1, 1, 3
_ANY, _VECTOR, _NHWC, _HWIO = 1, 2, 22, 28  # layouts; the library counts dimensions of weights as (o, i, h, w)
_TRAINING, _DIRECT = 64, 1
_ASK_WEIGHTS, _ASK_WEIGHT_GRADIENT = 131, 132
_SRC, _DST, _WEIGHTS, _BIAS = 1, 17, 33, 41
_GRADIENT = 128  # plus one of these

_Handle = ctypes.c_void_p
_Dimensions = ctypes.c_int64 * 12


class _Argument(ctypes.Structure):
    _fields_ = [("number", ctypes.c_int), ("memory", _Handle)]


class OneDnnError(RuntimeError):
    """A call of oneDNN failed: the shape is not supported, or memory ran out."""


class Library:
    """The loaded library with an engine and a stream; `gemm` multiplies float32 matrices."""

    def __init__(self, path: str):
        self._calls = ctypes.CDLL(path)
        self._calls.dnnl_primitive_desc_query_md.restype = _Handle
        self._calls.dnnl_memory_desc_get_size.restype = ctypes.c_size_t
        letter = ctypes.c_char
        self.gemm = Gemm(self._calls.dnnl_sgemm, [letter, letter], ctypes.c_int64, ctypes.c_float, _letters)
        self.engine = self.make("engine_create", _CPU, ctypes.c_size_t(0))
        self._stream = self.make("stream_create", self.engine, _IN_ORDER)

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function; raises OneDnnError unless it succeeds."""
        status = getattr(self._calls, f"dnnl_{name}")(*arguments)
        if status:
            raise OneDnnError(f"dnnl_{name} failed with status {status}")

    def make(self, name: str, *arguments: Any) -> _Handle:
        """Call a function that creates an object; return the handle, its first argument."""
        made = _Handle()
        self.call(name, ctypes.byref(made), *arguments)
        return made

    def layout(self, shape: Sequence[int], tag: int) -> _Handle:
        """Return the memory layout of an array of float32 numbers."""
        return self.make("memory_desc_create_with_tag", len(shape), _Dimensions(*shape), _FLOAT32, tag)

    def wanted(self, description: _Handle, which: int) -> tuple[_Handle, int]:
        """Return (the layout that an operation chose, the number of elements that it needs)."""
        layout = _Handle(self._calls.dnnl_primitive_desc_query_md(description, which, 0))
        return layout, -(-self._calls.dnnl_memory_desc_get_size(layout) // 4)

    def execute(self, operation: _Handle, count: int, arguments: Any) -> None:
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


class _Memory:
    """An array as oneDNN's memory object; its address may change from call to call."""

    def __init__(self, library: Library, layout: _Handle, array: Array | None = None):
        self._set = library._calls.dnnl_memory_set_data_handle
        self.handle = library.make("memory_create", layout, library.engine, _Handle())
        self._array = array
        if array is not None:
            self.at(array)

    def at(self, array: Array) -> None:
        self._set(self.handle, _Handle(address(array)))


class _Operation:
    """A primitive of the library that can be executed on memory."""

    def __init__(self, library: Library, description: _Handle, memory: dict[int, _Memory]):
        self._library, self._memory = library, memory  # has to live as long
        self._operation = library.make("primitive_create", description)
        self._count = len(memory)
        self._arguments = (_Argument * len(memory))(*(_Argument(number, m.handle) for number, m in memory.items()))

    def __call__(self) -> None:
        self._library.execute(self._operation, self._count, self._arguments)


def _reorder(
    library: Library, source: _Handle, target: _Handle, memory: tuple[_Memory, _Memory], add: bool = False
) -> _Operation:
    """Compute target <- (or, with `add`, +=) source, in the target's layout."""
    attributes = None
    if add:
        attributes, sums = library.make("primitive_attr_create"), library.make("post_ops_create")
        library.call("post_ops_append_sum", sums, ctypes.c_float(1.0), 0, 0)
        library.call("primitive_attr_set_post_ops", attributes, sums)
    description = library.make(
        "reorder_primitive_desc_create", source, library.engine, target, library.engine, attributes
    )
    return _Operation(library, description, {_SRC: memory[0], _DST: memory[1]})


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
    ):
        self._library = library
        weight = (output[2], image[2], *kernel)
        self._x_layout = library.layout((rows, image[2], *image[:2]), _NHWC)
        self._y_layout = library.layout((rows, output[2], *output[:2]), _NHWC)
        self._bias_layout = library.layout((output[2],), _VECTOR)
        self._weight_layout = library.layout(weight, _HWIO)
        self._free = library.layout(weight, _ANY)
        self._geometry = (
            _Dimensions(*stride),
            _Dimensions(0, 0),  # no holes between taps
            _Dimensions(vertical[0], horizontal[0]),
            _Dimensions(vertical[1], horizontal[1]),
        )
        self._x, self._y = _Memory(library, self._x_layout), _Memory(library, self._y_layout)
        self._bias, self._weight = _Memory(library, self._bias_layout), _Memory(library, self._weight_layout)
        # The descriptions of both backward passes are made from the forward one.
        self._forward = self._describe_forward(self._bias_layout)

    def _describe_forward(self, bias: _Handle | None) -> _Handle:
        return self._library.make(
            "convolution_forward_primitive_desc_create", self._library.engine, _TRAINING, _DIRECT,
            self._x_layout, self._free, bias, self._y_layout, *self._geometry, None,
        )  # fmt: skip

    def _own(self, description: _Handle, which: int) -> tuple[_Handle, _Memory]:
        """Allocate memory for the weights, or their gradient, in the operation's layout."""
        layout, size = self._library.wanted(description, which)
        return layout, _Memory(self._library, layout, aligned(size, np.float32))


class Forward(Primitive):
    """Computes y <- the convolution of x with the weights, plus the bias."""

    def __init__(self, library: Library, *shape: Any, bias: bool):
        super().__init__(library, *shape)
        description = self._describe_forward(self._bias_layout if bias else None)
        layout, own = self._own(description, _ASK_WEIGHTS)
        self._lay_out = _reorder(library, self._weight_layout, layout, (self._weight, own))
        memory = {_SRC: self._x, _WEIGHTS: own, _DST: self._y} | ({_BIAS: self._bias} if bias else {})
        self._convolve = _Operation(library, description, memory)

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

    def __init__(self, library: Library, *shape: Any):
        super().__init__(library, *shape)
        description = library.make(
            "convolution_backward_data_primitive_desc_create", library.engine, _DIRECT,
            self._x_layout, self._free, self._y_layout, *self._geometry, self._forward, None,
        )  # fmt: skip
        layout, own = self._own(description, _ASK_WEIGHTS)
        self._lay_out = _reorder(library, self._weight_layout, layout, (self._weight, own))
        memory = {_GRADIENT + _SRC: self._x, _WEIGHTS: own, _GRADIENT + _DST: self._y}
        self._convolve = _Operation(library, description, memory)

    def __call__(self, weight: Array, dy: Array, dx: Array) -> None:
        self._weight.at(weight)
        self._y.at(dy)
        self._x.at(dx)
        self._lay_out()
        self._convolve()


class WeightGradient(Primitive):
    """Computes dw <- (or +=) the gradient with respect to the weights."""

    def __init__(self, library: Library, *shape: Any):
        super().__init__(library, *shape)
        description = library.make(
            "convolution_backward_weights_primitive_desc_create", library.engine, _DIRECT,
            self._x_layout, self._free, None, self._y_layout, *self._geometry, self._forward, None,
        )  # fmt: skip
        layout, own = self._own(description, _ASK_WEIGHT_GRADIENT)
        memory = {_SRC: self._x, _GRADIENT + _DST: self._y, _GRADIENT + _WEIGHTS: own}
        self._convolve = _Operation(library, description, memory)
        self._store, self._add = (
            _reorder(library, layout, self._weight_layout, (own, self._weight), add) for add in (False, True)
        )

    def __call__(self, x: Array, dy: Array, dw: Array, accumulate: bool) -> None:
        self._x.at(x)
        self._y.at(dy)
        self._weight.at(dw)
        self._convolve()
        (self._add if accumulate else self._store)()
