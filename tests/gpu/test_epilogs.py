"""A ReLU after a product is part of it where the library keeps NaN, and a kernel elsewhere: the numbers are the CPU's
either way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.geometry import Geometry
from nettorrent_mpi.device.gpu import GpuOperations
from nettorrent_mpi.plan.errors import NoPlanError
from tests.gpu.compared import CPU
from tests.gpu.host import build
from tests.gpu.kernel_cases import Bench, some, typed

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="g++ is not installed")

GEOMETRY = Geometry.of((6, 5, 3), 7, (3, 2), (2, 1), "same")


class Watched:
    """Watched benches note how the library is asked for products: (with a bias, with a ReLU)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, keeps_nan: bool, refuses: bool = False):
        self.bench = Bench(GpuOperations, seed=3)
        self.asked: list[tuple[bool, bool]] = []
        runtime = self.bench.device.runtime
        monkeypatch.setattr(runtime, "keeps_nan", keeps_nan)
        for name in ("product", "convolution"):
            monkeypatch.setattr(runtime, name, self._noting(getattr(runtime, name), refuses))

    def _noting(self, prepare: Any, refuses: bool) -> Any:
        def noting(*arguments: Any, bias: Array | None = None, relu: bool = False, **more: Any) -> Any:
            self.asked.append((bias is not None, relu))
            if relu and refuses:
                raise NoPlanError("no plan")
            return prepare(*arguments, bias=bias, relu=relu, **more)

        return noting

    def operands(self, kind: str, name: str, biased: bool) -> tuple[list[Array | None], list[Any]]:
        """Return (x, weight, bias, y) with NaN in x, and what else the operation gets."""
        shapes = {"linear": ((9, 5), (5, 7), (9, 7)), "convolve": ((4, 6, 5, 3), (3, 2, 3, 7), (4, 3, 5, 7))}[kind]
        x, weight = some(name, *shapes[0]), some(name, *shapes[1], seed=2)
        x.reshape(len(x), -1)[2, 3] = np.nan
        return [x, weight, some(name, 7, seed=3) if biased else None, np.ones(shapes[2], x.dtype)], (
            [GEOMETRY] if kind == "convolve" else []
        )

    def compare(self, kind: str, name: str, biased: bool) -> None:
        arrays, more = self.operands(kind, name, biased)
        wide = [None if x is None else x.astype(np.float64) for x in arrays]
        with np.errstate(invalid="ignore"):
            getattr(CPU, kind)(*wide, *more, relu=True)
        own = [None if x is None else self.bench.up(x) for x in arrays]
        if kind == "convolve":  # filters lie as KRSC
            assert arrays[1] is not None
            own[1] = self.bench.up(np.ascontiguousarray(arrays[1].transpose(3, 0, 1, 2))).transpose(1, 2, 3, 0)
        for _ in range(2):
            getattr(self.bench.ops, kind)(*own, *more, relu=True)
        assert own[3] is not None
        assert wide[3] is not None
        found = self.bench.down(own[3]).astype(np.float64)
        assert np.isnan(wide[3]).any()
        assert (wide[3] == 0).any()
        assert (wide[3] > 0).any()
        step = {"float32": 1e-5, "float64": 1e-13, "bfloat16": 2e-2}[name]
        np.testing.assert_allclose(found, wide[3], rtol=step, atol=step)


@pytest.mark.parametrize("kind", ["linear", "convolve"])
@typed
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("keeps_nan", [True, False])
def test_nan_comes_through(
    kind: str, name: str, biased: bool, keeps_nan: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(monkeypatch, keeps_nan)
    watched.compare(kind, name, biased)
    # The trial, then what is used, once for the same arrays.
    assert watched.asked == [(True, True), (True, True) if keeps_nan else (biased, False)]


def test_a_library_that_refuses_gets_no_relu(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch, keeps_nan=True, refuses=True)
    watched.compare("convolve", "float64", True)
    assert watched.asked == [(True, True), (True, False)]


def test_without_a_relu_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch, keeps_nan=False)
    arrays, _ = watched.operands("linear", "float32", True)
    x, weight, bias, y = (watched.bench.up(array) for array in arrays if array is not None)
    watched.bench.ops.linear(x, weight, bias, y)
    watched.bench.ops.linear(x, weight, None, y)
    assert watched.asked == [(True, False), (False, False)]
    nothing, empty = watched.bench.up(np.empty((9, 0), "f4")), watched.bench.up(np.empty((0, 7), "f4"))
    watched.bench.ops.linear(nothing, empty, watched.bench.up(np.arange(-3, 4, dtype="f4")), y, relu=True)
    assert (watched.bench.down(y) == [0, 0, 0, 0, 1, 2, 3]).all()
    assert len(watched.asked) == 2
