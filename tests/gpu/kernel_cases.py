"""What the tests of kernels share: operations on the host device, beside the CPU device's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import numpy as np
import pytest

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.gpu import Gpu, source
from nettorrent_mpi.device.gpu.operations import KernelOperations
from tests.gpu.compared import NAMES, dtype_of
from tests.gpu.host import build
from tests.gpu.host.runtime import HostRuntime

OTHERS = [pytest.param(name, marks=pytest.mark.long) for name in NAMES[1:]]
typed = pytest.mark.parametrize("name", [NAMES[0], *OTHERS])
STEPS = {"float32": 2.0**-23, "float64": 2.0**-52, "bfloat16": 2.0**-8}
O = TypeVar("O", bound=KernelOperations)  # noqa: E741


class Bench(Generic[O]):
    """Operations of a GPU, made by `make`, on a host device of its own; with the kernels of `text`, if given, for
    `name`."""

    def __init__(self, make: Callable[[Any], O], seed: int = 0, text: str | None = None, name: str = "float32"):
        runtime = HostRuntime(seed, memory=1 << 30)
        if text is not None:
            runtime.libraries[name] = build.load(name, seed, text)
        self.device = Gpu(runtime)
        self.device.arena.reserve(1 << 20)  # less to poison
        self.ops = make(self.device)

    def up(self, x: Array) -> Array:
        """A copy of x on the device."""
        out = self.device.empty(x.shape, x.dtype)
        self.device.upload(out, x)
        return out

    def like(self, x: Array) -> Array:
        """An array on the device like x, full of NaN (or of large whole numbers)."""
        return self.up(np.full(x.nbytes, 255, np.uint8).view(x.dtype).reshape(x.shape) if x.size else x)

    def down(self, x: Array) -> Array:
        return self.device.on_host(x)


def work_of(name: str) -> Any:
    """The type in which the CPU computes what is compared with arrays of this type."""
    return np.dtype(np.float64 if name == "float64" else np.float32)


def some(name: str, *shape: int, seed: int = 1, shift: float = 0.0) -> Array:
    """Random numbers."""
    return (np.random.default_rng(seed).standard_normal(shape) + shift).astype(dtype_of(name))


def wide(x: Array) -> Array:
    """A copy of x; in float32 if it is bfloat16, which the CPU does not compute in."""
    return x.astype(np.float32) if x.dtype.name == "bfloat16" else x.copy()


def same(found: Array, wanted: Array) -> None:
    """The same numbers, NaN included; bfloat16: those that `wanted`, in float32, are rounded to."""
    assert found.shape == wanted.shape
    if found.dtype.name == "bfloat16":
        found, wanted = found.astype(np.float32), wanted.astype(found.dtype).astype(np.float32)
    np.testing.assert_array_equal(found, wanted)
    assert found.dtype == wanted.dtype


def near(found: Array, wanted: Array, name: str, size: Array | float | None = None) -> None:
    """The same up to rounding: 1e-6 of `size`, or of the number, where arrays of this type are computed in float32,
    1e-12 in float64; and up to the rounding of `found` itself. `wanted` is float64."""
    assert found.shape == wanted.shape
    limit = max(1e-12 if name == "float64" else 1e-6, STEPS[found.dtype.name])
    found = found.astype(np.float64)
    large = np.abs(wanted) if size is None else np.maximum(np.abs(wanted), size)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(wanted))
    wrong = np.abs(found - wanted) > limit * large
    assert not wrong.any(), (found[wrong][:5], wanted[wrong][:5])


def planted(sections: str, old: str, new: str) -> str:
    """Sections of the source (a|b), and what all rest on, with a fault in the place of `old`: less to compile."""
    names = tuple(f"// ---- {section}" for section in sections.split("|"))
    parts = ["// ---- " + part for part in source.text().split("\n// ---- ")]
    text = "\n".join(part for k, part in enumerate(parts) if k < 2 or part.startswith(names))
    assert text.count(old) == 1, text.count(old)
    return text.replace(old, new)
