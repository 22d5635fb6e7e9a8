"""Operations on bfloat16 arrays: every one computes in float32, and rounds its result once.

An operation that has no code of its own for bfloat16 is given float32 copies of what it reads, in scratch memory, and
its results are rounded into the arrays. NumPy's casts from and to ml_dtypes' bfloat16 take 0.05 and 0.34 ns per element
(one core of an AMD EPYC of family 26); its arithmetic on such arrays takes 3 ns, and is not used.

Products are oneDNN's where it is faster than float32 products of such copies.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from nettorrent_mpi.device.arrays import Array, as_dtype
from nettorrent_mpi.device.cpu import blas
from nettorrent_mpi.device.cpu.flat import Run
from nettorrent_mpi.device.cpu.onednn import OneDnnError
from nettorrent_mpi.device.cpu.onednn_products import Products
from nettorrent_mpi.device.cpu.operations import CpuOperations
from nettorrent_mpi.device.cpu.products import REMEMBERED
from nettorrent_mpi.device.cpu.tuning import Tuning

# What operations do with their arrays, by the parameters' names: r read, w write, u both. Other parameters are numbers,
# or arrays that are never bfloat16.
USES: dict[str, dict[str, str]] = {
    "add": {"a": "r", "b": "r", "out": "w"},
    "subtract": {"a": "r", "b": "r", "out": "w"},
    "multiply": {"a": "r", "b": "r", "out": "w"},
    "scale": {"x": "u"},
    "divide": {"x": "u"},
    "store": {"out": "u", "x": "r"},
    "move": {"x": "u", "towards": "r", "origin": "r"},
    "withhold": {"x": "u", "before": "r", "kept": "u"},
    "count_nonfinite": {"y": "r"},
    "sum_rows": {"x": "r", "out": "u"},
    "convolve": {"x": "r", "weight": "r", "bias": "r", "y": "w"},
    "convolve_grad_x": {"weight": "r", "dy": "r", "dx": "w"},
    "convolve_grad_w": {"x": "r", "dy": "r", "dw": "u"},
    "relu": {"x": "r", "y": "w"},
    "relu_grad": {"y": "r", "dy": "u"},
    "relu_grad_sum": {"y": "r", "dy": "u", "total": "u"},
    "leaky_relu": {"x": "r", "y": "w"},
    "leaky_relu_grad": {"y": "r", "dy": "u"},
    "sigmoid": {"x": "r", "y": "w"},
    "sigmoid_grad": {"y": "r", "dy": "u"},
    "tanh": {"x": "r", "y": "w"},
    "tanh_grad": {"y": "r", "dy": "u"},
    "gelu": {"x": "r", "y": "w", "slope": "w"},
    "drop": {"y": "u"},
    "moments": {"x": "r"},
    "normalize": {"x": "r", "weight": "r", "bias": "r", "y": "w"},
    "norm_sums": {"x": "r", "dy": "r"},
    "norm_grad": {"x": "r", "dy": "u", "weight": "r"},
    "sum_features": {"x": "r", "total_n": "w"},
    "center": {"x": "r", "mean_n": "r", "y": "w", "squares_n": "w"},
    "scale_features": {"y": "u", "scale_n": "r", "weight": "r", "bias": "r"},
    "layer_norm_sums": {"x": "r", "dy": "u", "weight": "r"},
    "layer_norm_grad": {"x": "r", "dy": "u"},
    "max_pool": {"x": "r", "y": "w"},
    "max_pool_grad": {"dy": "r", "dx": "w"},
    "avg_pool": {"x": "r", "y": "w"},
    "avg_pool_grad": {"dy": "u", "dx": "w"},
    "global_avg_pool": {"x": "r", "y": "w"},
    "global_avg_pool_grad": {"dy": "u", "dx": "w"},
    "cross_entropy": {"y_bO": "r", "dy_bO": "w"},
    "binary_cross_entropy": {"y_bO": "r", "wanted_bO": "r", "dy_bO": "w"},
    "squared_error": {"y_bO": "r", "wanted_bO": "r", "dy_bO": "w"},
    "count_right": {"y_bO": "r"},
    "count_same_side": {"y_bO": "r", "wanted_bO": "r"},
}


class WidenedOperations(CpuOperations):
    """All operations (device.ops.Ops) on arrays of bfloat16, and of other types, without loops of their own."""

    def __init__(self, tuning: Tuning):
        super().__init__(tuning)
        self.bfloat16: np.dtype[Any] = as_dtype("bfloat16")
        library = tuning.onednn()
        self.library = library if library is not None and library.multiplies_bfloat16 else None
        self._products = None if self.library is None else Products(self.library)
        self._native: dict[tuple[Any, ...], bool] = {}  # whether oneDNN's product is the faster one
        self._layers: dict[tuple[Any, ...], tuple[Run, tuple[Array | None, ...]]] = {}

    def widened(self, x: Array, name: str, *, read: bool = True) -> Array:
        """Return scratch memory of float32 in the shape of x, by default with its values."""
        wide = self.memory(np.float32).scratch(name, x.shape, np.float32)
        if read:
            np.copyto(wide, x)
        return wide

    def prepared(self, operation: str, *arguments: Any, **named: Any) -> list[Run]:
        if operation in ("matmul", "linear"):
            return super().prepared(operation, *arguments, **named)
        return [partial(getattr(self, operation), *arguments, **named)]

    def linear(self, x: Array, weight: Array, bias: Array | None, y: Array, relu: bool = False) -> None:
        for run in self._linear(x, weight, bias, y, relu):
            run()

    def _linear(self, x: Array, weight: Array, bias: Array | None, y: Array, relu: bool = False) -> list[Run]:
        if x.dtype != self.bfloat16:
            return super()._linear(x, weight, bias, y, relu)
        key = id(x), id(weight), id(bias), id(y)
        known = self._layers.get(key)
        if known is None:
            if len(self._layers) == REMEMBERED:
                self._layers.clear()
            run = self._fastest(x, weight, y, bias=bias)
            known = self._layers[key] = run, (x, weight, bias, y)  # their ids are unique as long as they live
        # oneDNN's own ReLU makes 0 of NaN, which would hide that a training diverges.
        return [known[0], partial(self.relu, y, y)] if relu else [known[0]]

    def _prepare(self, a: Array, b: Array, out: Array, turn_a: bool, turn_b: bool, accumulate: bool) -> Run:
        if a.dtype != self.bfloat16:
            return super()._prepare(a, b, out, turn_a, turn_b, accumulate)
        return self._fastest(a.T if turn_a else a, b.T if turn_b else b, out, accumulate=accumulate)

    def _fastest(self, a: Array, b: Array, out: Array, *, accumulate: bool = False, bias: Array | None = None) -> Run:
        """Return what computes out <- (or +=) a @ b, plus a bias; out may be float32 (the gradients of weights are)."""
        wide = partial(self._by_widening, a, b, accumulate=accumulate, bias=bias)
        if self._products is None or not (out.size and a.size):
            return partial(wide, out)
        native = partial(self._products.prepare, a, b, accumulate=accumulate, bias=bias)
        letters = "".join("n" if blas.plain(array) else "t" for array in (a, b))
        # The rows of a micro-batch, which are added up where a is transposed, may be fewer at times: the first product
        # of a layer decides.
        fixed = a.shape[letters[0] == "n"], b.shape[1]
        key = (*fixed, letters, accumulate, bias is not None, out.dtype.name)
        if key not in self._native:
            what = f"{a.shape[0]}x{a.shape[1]}x{b.shape[1]} {key[2:]}"
            self._native[key] = self._trial(what, np.zeros_like(out), wide, native)
        return native(out) if self._native[key] else partial(wide, out)

    def _trial(self, what: str, out: Array, wide: Callable[[Array], None], native: Callable[[Array], Run]) -> bool:
        """Whether oneDNN's product is faster."""
        wide(out)  # chooses its float32 product by a trial of its own, which cannot be inside another one
        try:
            trials: dict[str, Run] = {"widened": partial(wide, out), "onednn": native(out)}
        except OneDnnError:
            return False
        return self._tuning.fastest(f"bfloat16 product {what}", trials, out) == "onednn"

    def _by_widening(self, a: Array, b: Array, out: Array, *, accumulate: bool, bias: Array | None) -> None:
        first, second = self.widened(a, "wide first"), self.widened(b, "wide second")
        total = out if out.dtype == np.float32 else self.widened(out, "wide product", read=accumulate)
        super().matmul(first, second, total, accumulate=accumulate)
        if bias is not None:
            np.add(total, self.widened(bias, "wide bias"), out=total)
        if total is not out:
            np.copyto(out, total, casting="unsafe")


def _widened(operation: Callable[..., Any], uses: dict[str, str]) -> Callable[..., Any]:
    """Return the operation for arrays that may be bfloat16."""
    parameters = list(inspect.signature(operation).parameters)[1:]
    arrays = [(parameters.index(name), name, f"wide {name}", use) for name, use in uses.items()]

    def run(self: WidenedOperations, *given: Any, **named: Any) -> Any:
        short, arguments, back = self.bfloat16, list(given), []
        known: dict[int, Array] = {}  # an array that is given twice has one copy
        for place, name, key, use in arrays:
            x = given[place] if place < len(given) else named.get(name)
            if x is None or x.dtype != short:
                continue
            wide = known.get(id(x))
            if wide is None:
                wide = known[id(x)] = self.widened(x, key, read=use != "w")
            if use != "r":
                back.append((x, wide))
            if place < len(given):
                arguments[place] = wide
            else:
                named[name] = wide
        found = operation(self, *arguments, **named)
        for x, wide in back:
            np.copyto(x, wide, casting="unsafe")
        return found

    run.__doc__ = operation.__doc__
    return run


for _name, _uses in USES.items():
    setattr(WidenedOperations, _name, _widened(getattr(WidenedOperations, _name), _uses))
