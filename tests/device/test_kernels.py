"""Kernels: every way gives what NumPy gives, the fastest is found and remembered, and nothing optional is needed."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nettorrent_mpi.device.arrays import Array, Workspace
from nettorrent_mpi.device.cpu import Cpu, elementwise, onednn, products
from nettorrent_mpi.device.cpu.convolution import algorithms
from nettorrent_mpi.device.cpu.im2col import Im2colProducts
from nettorrent_mpi.device.cpu.tuning import Tuning
from nettorrent_mpi.device.device import Kernels, make_device
from nettorrent_mpi.device.geometry import Geometry
from nettorrent_mpi.plan import specs

EACH: tuple[Kernels, Kernels] = ("numpy", "fastest")


def geometry(image: tuple[int, int, int], filters: int, kernel: Any, stride: Any, padding: Any) -> Geometry:
    return Geometry.of(image, filters, specs.pair(kernel), specs.pair(stride), padding)


GEOMETRIES = [
    geometry((8, 8, 16), 16, 3, 1, "same"),
    geometry((9, 7, 3), 5, 3, 1, "valid"),
    geometry((9, 7, 3), 17, 3, 2, "same"),
    geometry((6, 6, 8), 8, 2, 1, "same"),
    geometry((11, 5, 1), 4, (4, 2), (3, 2), "same"),
    geometry((8, 8, 6), 12, 1, 2, "valid"),
    geometry((9, 9, 8), 12, 1, 2, "valid"),
    geometry((5, 5, 2), 3, 1, 1, "valid"),
    geometry((12, 12, 33), 31, 5, 1, "same"),
]


@pytest.mark.parametrize("shape", GEOMETRIES, ids=str)
@pytest.mark.parametrize("rows", [1, 5, pytest.param(70, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_way_computes_the_same_convolution(shape: Geometry, rows: int, dtype: Any) -> None:
    rng = np.random.default_rng(2)

    def random(*size: int) -> Array:
        return rng.standard_normal(size).astype(dtype)

    x, y, dy = random(rows, *shape.image), random(rows, *shape.output), random(rows, *shape.output)
    kernel = (*shape.kernel, shape.image[2], shape.output[2])
    weight, bias, dw = random(*kernel), random(shape.output[2]), random(*kernel)
    ways = {one.name: one for one in algorithms(shape, np.dtype(dtype), Tuning())}
    assert isinstance(ways.pop("im2col"), Im2colProducts)
    found = {}
    for name, way in [("im2col", Im2colProducts(shape)), *ways.items()]:
        workspace, results = Workspace(dtype), []
        for given in (bias, None):
            way.forward(x, weight, given, y, workspace)
            results.append(y.copy())
        dx, own = np.full_like(x, np.nan), dw.copy()
        way.input_gradient(weight, dy, dx, workspace)
        found[name] = [*results, dx]
        try:
            way.weight_gradient(x, dy, own, True, workspace)
        except onednn.OneDnnError:  # the library is known to be wrong there
            assert name == "onednn"
            assert shape.kernel == (1, 1)
            continue
        found[name].append(own.copy())
        way.weight_gradient(x, dy, own, False, workspace)
        found[name].append(own)
    tolerance = 2e-4 if dtype == np.float32 else 1e-11
    for name, results in found.items():
        for one, other in zip(results, found["im2col"], strict=name != "onednn"):
            scale = np.abs(other).max()
            np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance * scale, err_msg=name)


def test_there_are_all_ways_for_a_kernel_of_3_x_3() -> None:
    ways = {one.name for one in algorithms(GEOMETRIES[0], np.dtype(np.float32), Tuning())}
    pytest.importorskip("numba", reason="Numba is not installed")
    if onednn.library() is None:
        pytest.skip("oneDNN is not installed (pip install 'nettorrent_mpi[fast]')")
    assert ways == {"im2col", "taps", "rows", "winograd", "onednn"}


def test_sigmoid_of_float32() -> None:
    pytest.importorskip("numba", reason="Numba is not installed")
    x = np.concatenate([np.linspace(-120, 120, 100_001), [np.nan, np.inf, -np.inf]]).astype(np.float32)
    y = x.copy()
    elementwise.sigmoid(y)
    with np.errstate(over="ignore"):
        exact = 1 / (1 + np.exp(-x.astype(np.float64)))
    np.testing.assert_allclose(y, exact, rtol=3e-7, atol=1e-37)
    assert np.isnan(y[-3])
    assert y[-2] == 1


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("outputs", [2, 10])
def test_cross_entropy_is_alike_with_numpy_alone(smoothing: float, outputs: int, weighted: bool) -> None:
    pytest.importorskip("numba", reason="Numba is not installed: NumPy is alone anyway")
    rng = np.random.default_rng(1)
    y, labels = 9 * rng.standard_normal((33, outputs)), rng.integers(0, outputs, 33)
    weights = np.arange(outputs) / 2.0 if weighted else None
    y[4] = 1.5  # all the same: the first counts
    y[5, 1] = y[5, 0] = 20
    found = []
    for kernels in EACH:
        ops = make_device("cpu", kernels).ops
        for number, gradient in ((0.5, True), (0.5, False), (np.nan, True)):
            y[7, 1] = number
            metrics, dy = np.zeros(5), np.zeros_like(y) if gradient else None
            ops.cross_entropy(y, labels, smoothing, np.array([50.0]), dy, metrics, weights)
            found.append((metrics, dy))
    for (one, one_dy), (other, other_dy) in zip(found[:3], found[3:], strict=True):
        np.testing.assert_allclose(one[0], other[0], rtol=1e-12)
        assert one[1] == other[1]
        assert one[4] == other[4]
        assert bool(one[4]) == weighted
        if one_dy is not None:
            np.testing.assert_allclose(one_dy, other_dy, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("sizes", [(3, 4, 5), (1, 7, 1), (16, 1, 9), (64, 33, 32)], ids=str)
def test_products_by_blas_and_onednn(sizes: tuple[int, int, int], dtype: Any) -> None:
    rng = np.random.default_rng(4)
    (m, k, n), kind = sizes, np.dtype(dtype)
    ways = Cpu().ops.algorithms(kind)
    assert "blas" in ways or sys.platform != "linux", "NumPy's wheels have one that is found"
    assert ("onednn" in ways) == (onednn.library() is not None and dtype == np.float32)
    for a_turned, b_turned, accumulate in itertools.product((False, True), repeat=3):
        a = rng.standard_normal((k, m + 3) if a_turned else (m, k)).astype(dtype)
        a = a[:, 2 : m + 2] if a_turned else a  # some columns of a wider matrix
        b = rng.standard_normal((n, k) if b_turned else (k, n)).astype(dtype)
        a, b = a.T if a_turned else a, b.T if b_turned else b
        before = rng.standard_normal((m, n)).astype(dtype)
        for name, way in ways.items():
            out = before.copy()
            run = way(a, b, out, accumulate)
            run()
            out[...] = before
            run()  # as it is called in every step
            np.testing.assert_allclose(out, a @ b + before * accumulate, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("accumulate", [False, True])
def test_products_of_known_arrays_use_what_is_in_them_now(accumulate: bool) -> None:
    rng = np.random.default_rng(5)
    ops = make_device().ops
    pairs = [(rng.standard_normal((6, 4)), rng.standard_normal((6, 3)), np.zeros((4, 3))) for _ in range(3)]
    for turn in range(3):
        for a, b, out in pairs:
            np.multiply(a, 1 + turn, out=a)
            before = out.copy()
            ops.matmul(a, b, out, turn_a=True, accumulate=accumulate)
            np.testing.assert_allclose(out, a.T @ b + before * accumulate, rtol=1e-12)


@pytest.mark.parametrize("accumulate", [False, True])
def test_products_of_nothing(accumulate: bool) -> None:
    ops = make_device().ops
    for m, k, n in ((2, 3, 4), (0, 3, 4), (2, 0, 4), (2, 3, 0)):
        out = np.ones((m, n), np.float32)
        ops.matmul(np.ones((m, k), np.float32), np.ones((k, n), np.float32), out, accumulate=accumulate)
        assert (out == k + accumulate).all()


def test_products_forget_arrays_that_do_not_come_again() -> None:
    ops = Cpu().ops
    for n in range(2 * products.REMEMBERED + 5):
        a, b, out = np.full((2, 5), n, np.float32), np.ones((3, 5), np.float32), np.empty((2, 3), np.float32)
        ops.matmul(a, b, out, turn_b=True)
        assert (out == 5 * n).all()
    assert len(ops._known) <= products.REMEMBERED


# -- nothing optional is needed ---------------------------------------------------------------------------------------

PROGRAM = """
import sys
{block}
from nettorrent_mpi.__main__ import main
sys.argv = ["nettorrent", "train", "--set", "train.epochs=1", "--set", "kernels={kernels}", "--output", {output!r}]
code = 0
try:
    main()
except SystemExit as stopped:
    code = stopped.code or 0
loaded = open("/proc/self/maps").read()
print("LOADED", "numba" in sys.modules and sys.modules["numba"] is not None, "libdnnl" in loaded)
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("block", "kernels", "loaded"),
    [
        ("", "numpy", "False False"),
        ("sys.modules['numba'] = None", "fastest", "False"),  # as if it were not installed
    ],
)
def test_numpy_alone_trains(block: str, kernels: str, loaded: str, tmp_path: Path) -> None:
    program = PROGRAM.format(block=block, kernels=kernels, output=str(tmp_path / "run"))
    if block:
        program = program.replace("import sys\n", "import sys, importlib.util\n", 1).replace(
            block,
            block + "\nfind = importlib.util.find_spec\n"
            "importlib.util.find_spec = lambda name, *more: None if name == 'numba' else find(name, *more)",
        )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"LOADED {loaded}" in done.stdout
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["test_accuracy"] > 0.5
