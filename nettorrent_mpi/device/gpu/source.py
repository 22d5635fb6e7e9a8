"""The source of the GPU's kernels, and what every compiler and launcher of them has to know: NVRTC and CuPy, and g++ in
tests.

A kernel is an `extern "C" __global__` function of kernels.cu. Its signature, parsed from there, types the arguments of
each launch. The source is compiled once for each type of REAL.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from nettorrent_mpi.device.arrays import Array, DType, as_dtype
from nettorrent_mpi.plan.records import dataclass

PATH = Path(__file__).with_name("kernels.cu")
REALS = {"float32": "float", "float64": "double", "bfloat16": "bf16"}  # name of a dtype -> REAL
TYPES = {  # of scalars and of what pointers point to -> names of the dtypes that fit
    "double": ("float64",),
    "float": ("float32",),
    "int": ("int32",),
    "i64": ("int64",),
    "u8": ("uint8", "bool"),
    "u16": ("uint16", "int16", "float16"),
    "u32": ("uint32",),
    "u64": ("uint64",),
    "bool": ("bool",),
}

_KERNEL = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\(\d+\) )?(\w+)\(([^)]*)\)\s*\{')


@dataclass(frozen=True)
class KernelParameter:
    """A KernelParameter has a name and a type (without `const`), or is a pointer to that type."""

    name: str
    type: str
    pointer: bool

    @property
    def dtype(self) -> str:
        """The name of a scalar's dtype."""
        return TYPES[self.type][0]


@dataclass(frozen=True)
class Signature:
    """A Signature is a kernel's name and parameters."""

    name: str
    parameters: tuple[KernelParameter, ...]

    def values(self, real: DType, arguments: Sequence[Any], address: Callable[[Array], int]) -> list[Any]:
        """Return the arguments of a launch as the parameters' plain values: addresses of arrays (0 for None), ints,
        floats and bools. Raises TypeError for any that does not fit, an array of another type included."""
        if len(arguments) != len(self.parameters):
            raise TypeError(f"{self.name} takes {len(self.parameters)} arguments, not {len(arguments)}")
        name = as_dtype(real).name
        return [self._value(p, name, a, address) for p, a in zip(self.parameters, arguments, strict=True)]

    def _value(self, parameter: KernelParameter, real: str, argument: Any, address: Callable[[Array], int]) -> Any:
        kind = parameter.type
        if parameter.pointer:
            if argument is None:
                return 0
            if kind != "void" and argument.dtype.name not in _types(kind, real):
                raise TypeError(f"{self.name}: {parameter.name} ({kind}*, REAL = {real}) is of {argument.dtype}")
            return address(argument)
        if kind == "double":
            return float(argument)
        return bool(argument) if kind == "bool" else operator.index(argument)


@cache
def text() -> str:
    """Return the source of all kernels."""
    return PATH.read_text(encoding="utf-8")


@cache
def signatures(source: str | None = None) -> dict[str, Signature]:
    """Return the signatures of all kernels, by name."""
    found = {}
    for name, parameters in _KERNEL.findall(text() if source is None else source):
        assert name not in found, name
        found[name] = Signature(name, tuple(_parameter(parameter) for parameter in parameters.split(",")))
    return found


def _parameter(declaration: str) -> KernelParameter:
    words = [word for word in declaration.replace("*", " * ").split() if word not in ("const", "__restrict__")]
    pointer = words[1:-1] == ["*"]
    kind = words[0]
    assert pointer or not words[1:-1], declaration
    assert kind in TYPES or (pointer and kind in ("REAL", "WORK", "void")), declaration
    return KernelParameter(words[-1], kind, pointer)


def _types(kind: str, real: str) -> tuple[str, ...]:
    """Return the names of the dtypes of arrays that a pointer to this type may point to."""
    if kind == "WORK":  # what arithmetic is in
        return ("float64" if real == "float64" else "float32",)
    return (real,) if kind == "REAL" else TYPES[kind]


def options(real: DType) -> tuple[str, ...]:
    """Return NVRTC's options. Without --fmad=false it would fuse a * b + c: what is computed element by element would
    differ from the CPU in the last bit."""
    return ("--std=c++17", "--fmad=false", f"-DREAL={REALS[as_dtype(real).name]}")
