"""Kernels: every way gives what NumPy gives, the fastest is found and remembered, and nothing optional is needed."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nettorrent_mpi.device.arrays import Array, Workspace
from nettorrent_mpi.device.cpu import choice, onednn, passes, product
from nettorrent_mpi.device.cpu import tuning as trial
from nettorrent_mpi.device.cpu.convolution import Convolution
from nettorrent_mpi.device.cpu.way import Geometry
from nettorrent_mpi.device.cpu.windows import WindowProducts, places
from nettorrent_mpi.nn.losses import make_loss
from nettorrent_mpi.plan import specs


@pytest.fixture
def numpy_only() -> Iterator[Callable[[bool], None]]:
    """numpy_only(True) leaves NumPy alone, until the test ends."""
    yield lambda alone: choice.use("numpy" if alone else "fastest")
    choice.use("fastest")


def geometry(image: tuple[int, int, int], filters: int, kernel: Any, stride: Any, padding: Any) -> Geometry:
    kernel, stride = specs.pair(kernel), specs.pair(stride)
    high, *vertical = places(image[0], kernel[0], stride[0], padding)
    wide, *horizontal = places(image[1], kernel[1], stride[1], padding)
    return Geometry(image, (high, wide, filters), kernel, stride, tuple(vertical), tuple(horizontal))  # type: ignore[arg-type]


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
@pytest.mark.parametrize("rows", [1, 5, 70])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_way_computes_the_same_convolution(shape: Geometry, rows: int, dtype: Any) -> None:
    rng = np.random.default_rng(2)

    def random(*size: int) -> Array:
        return rng.standard_normal(size).astype(dtype)

    x, y, dy = random(rows, *shape.image), random(rows, *shape.output), random(rows, *shape.output)
    kernel = (*shape.kernel, shape.image[2], shape.output[2])
    weight, bias, dw = random(*kernel), random(shape.output[2]), random(*kernel)
    ways = {way.name: way for way in Convolution(shape)._possible(np.dtype(dtype))}
    assert isinstance(ways.pop("windows"), WindowProducts)
    found = {}
    for name, way in [("windows", WindowProducts(shape)), *ways.items()]:
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
        for one, other in zip(results, found["windows"], strict=name != "onednn"):
            scale = np.abs(other).max()
            np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance * scale, err_msg=name)


def test_there_are_all_ways_for_a_kernel_of_3_x_3() -> None:
    ways = {way.name for way in Convolution(GEOMETRIES[0])._possible(np.dtype(np.float32))}
    pytest.importorskip("numba", reason="Numba is not installed")
    if onednn.library() is None:
        pytest.skip("oneDNN is not installed (pip install 'nettorrent_mpi[fast]')")
    assert ways == {"windows", "taps", "rows", "winograd", "onednn"}


LAYERS: dict[str, tuple[list[specs.LayerSpec], tuple[int, ...], bool]] = {  # layers, a row's shape, are the bits alike?
    "relu": ([specs.Linear(units=7, activation="relu")], (5,), False),  # sums of the bias are added in another order
    "sigmoid": ([specs.Linear(units=7), specs.Sigmoid()], (5,), False),
    "pool": ([specs.MaxPool2d(size=2)], (6, 8, 5), True),
    "pool with a rest": ([specs.MaxPool2d(size=3)], (8, 7, 2), True),
    "pool that overlaps": ([specs.MaxPool2d(size=3, stride=2)], (9, 7, 4), False),
    "dropout": ([specs.Dropout(rate=0.4)], (6, 5, 3), True),
    "batch norm": ([specs.BatchNorm()], (5, 4, 3), False),
    "batch norm of vectors": ([specs.BatchNorm()], (11,), False),
    "network": (
        [
            specs.Conv2d(filters=6, kernel=3, padding="same", activation="relu"),
            specs.BatchNorm(),
            specs.MaxPool2d(size=2),
            specs.Dropout(rate=0.2),
            specs.Flatten(),
            specs.Linear(units=3),
        ],
        (6, 6, 2),
        False,
    ),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("training", [True, False])
def test_layers_are_alike_with_numpy_alone(
    name: str, training: bool, bench: Callable[..., Any], numpy_only: Callable[[bool], None]
) -> None:
    pytest.importorskip("numba", reason="Numba is not installed: NumPy is alone anyway")
    layers, shape, same_bits = LAYERS[name]
    made = bench(layers, shape)
    x, dy = made.data(70)  # more rows than are added up in one type
    x[3, ..., 0] = 0.25  # equal numbers in one window
    found = []
    for alone in (True, False):
        numpy_only(alone)
        if training:
            result = made.run(x, dy)
            found.append([result.y, result.dx, *result.grads.values(), *result.params.values()])
        else:
            found.append([made.forward(made.params, x, made.passes(x, False))])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=0 if same_bits else 1e-11, atol=0 if same_bits else 1e-12)


def test_nan_goes_through_a_pool(bench: Callable[..., Any], numpy_only: Callable[[bool], None]) -> None:
    made = bench([specs.MaxPool2d(size=2)], (4, 4, 3))
    x, dy = made.data(2)
    x[0, 0, 0, 0] = x[0, 3, 3, 1] = x[1, 0, 1, 2] = np.nan
    found = []
    for alone in (True, False):
        numpy_only(alone)
        found.append(made.run(x, dy).y)
    np.testing.assert_array_equal(*found)
    assert np.isnan(found[0]).sum() == 3


def test_sigmoid_of_float32() -> None:
    pytest.importorskip("numba", reason="Numba is not installed")
    x = np.concatenate([np.linspace(-120, 120, 100_001), [np.nan, np.inf, -np.inf]]).astype(np.float32)
    y = x.copy()
    passes.sigmoid(y)
    with np.errstate(over="ignore"):
        exact = 1 / (1 + np.exp(-x.astype(np.float64)))
    np.testing.assert_allclose(y, exact, rtol=3e-7, atol=1e-37)
    assert np.isnan(y[-3])
    assert y[-2] == 1


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("outputs", [2, 10])
def test_cross_entropy_is_alike_with_numpy_alone(
    smoothing: float, outputs: int, numpy_only: Callable[[bool], None]
) -> None:
    pytest.importorskip("numba", reason="Numba is not installed: NumPy is alone anyway")
    rng = np.random.default_rng(1)
    y, labels = 9 * rng.standard_normal((33, outputs)), rng.integers(0, outputs, 33)
    y[4] = 1.5  # all the same: the first counts
    y[5, 1] = y[5, 0] = 20
    y[7, 1] = 0.5
    found = []
    for alone in (True, False):
        numpy_only(alone)
        loss = make_loss(specs.CrossEntropy(label_smoothing=smoothing))
        found += [loss.forward(y, labels, 50, Workspace(np.float64), gradient=wanted) for wanted in (True, False)]
        y[7, 1] = np.nan
        found.append(loss.forward(y, labels, 50, Workspace(np.float64)))
        y[7, 1] = 0.5
    for one, other in zip(found[:3], found[3:], strict=True):
        np.testing.assert_allclose(one.loss_sum, other.loss_sum, rtol=1e-12)
        assert one.correct == other.correct
        assert (one.dy is None) == (other.dy is None)
        if one.dy is not None:
            np.testing.assert_allclose(one.dy, other.dy, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("sizes", [(3, 4, 5), (1, 7, 1), (16, 1, 9), (64, 33, 32)], ids=str)
def test_products_by_blas_and_onednn(sizes: tuple[int, int, int], dtype: Any) -> None:
    rng = np.random.default_rng(4)
    (m, k, n), kind = sizes, np.dtype(dtype)
    ways = product._ways(kind)
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
            run = way(a, b, out, accumulate, Workspace(dtype))
            run()
            out[...] = before
            run()  # as it is called in every step
            np.testing.assert_allclose(out, a @ b + before * accumulate, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("accumulate", [False, True])
def test_products_of_known_arrays_use_what_is_in_them_now(accumulate: bool) -> None:
    rng = np.random.default_rng(5)
    workspace = Workspace(np.float64)
    multiply = product.Product(turn_a=True)
    pairs = [(rng.standard_normal((6, 4)), rng.standard_normal((6, 3)), np.zeros((4, 3))) for _ in range(3)]
    for turn in range(3):
        for a, b, out in pairs:
            np.multiply(a, 1 + turn, out=a)
            before = out.copy()
            multiply(a, b, out, workspace, accumulate)
            np.testing.assert_allclose(out, a.T @ b + before * accumulate, rtol=1e-12)


@pytest.mark.parametrize("accumulate", [False, True])
def test_products_of_nothing(accumulate: bool) -> None:
    multiply, workspace = product.Product(), Workspace(np.float32)
    for m, k, n in ((2, 3, 4), (0, 3, 4), (2, 0, 4), (2, 3, 0)):
        out = np.ones((m, n), np.float32)
        multiply(np.ones((m, k), np.float32), np.ones((k, n), np.float32), out, workspace, accumulate)
        assert (out == k + accumulate).all()


def test_products_forget_arrays_that_do_not_come_again() -> None:
    multiply, workspace = product.Product(turn_b=True), Workspace(np.float32)
    for n in range(3 * product.REMEMBERED):
        a, b, out = np.full((2, 5), n, np.float32), np.ones((3, 5), np.float32), np.empty((2, 3), np.float32)
        multiply(a, b, out, workspace)
        assert (out == 5 * n).all()
    assert len(multiply._known) <= product.REMEMBERED


# -- the trial ------------------------------------------------------------------------------------------------------


@pytest.fixture
def findings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of findings, in a folder that is not there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(trial, "_known", {})
    trial._path.cache_clear()
    yield trial._path()
    trial._path.cache_clear()


OUT = np.zeros(3)


def slow() -> None:
    time.sleep(0.01)


def quick() -> None:
    pass


def never() -> None:
    raise AssertionError("tried again")


def test_the_fastest_way_is_found_and_remembered(findings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert trial.fastest("waiting", {"slow": slow, "quick": quick}, OUT) == "quick"
    assert trial.fastest("waiting", {"slow": never, "quick": never}, OUT) == "quick"  # by this process
    monkeypatch.setattr(trial, "_known", {})
    assert trial.fastest("waiting", {"slow": never, "quick": never}, OUT) == "quick"  # by the file
    assert "quick" in json.loads(findings.read_text())[trial._subject()].values()
    assert trial.fastest("waiting", {"slow": slow, "slower": lambda: time.sleep(0.02)}, OUT) == "slow"  # other ways


def test_findings_of_other_versions_do_not_count(findings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial.fastest("waiting", {"slow": slow, "quick": quick}, OUT)
    told = json.loads(findings.read_text())[trial._subject()]
    for text in (json.dumps({"another": told}), "{", "[]", '{"another": 1}', ""):
        findings.write_text(text)
        monkeypatch.setattr(trial, "_known", {})
        assert trial.fastest("waiting", {"slow": quick, "quick": slow}, OUT) == "slow"


def test_findings_of_other_settings_are_kept(findings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for threads in ("1", "2", "1"):  # as of runs with more ranks and with fewer
        monkeypatch.setattr(trial, "_known", {})
        monkeypatch.setattr(trial, "_subject", lambda threads=threads: f"{threads} threads")
        before = findings.read_text() if findings.exists() else ""
        again = threads == "1" and "1 threads" in before
        assert trial.fastest("waiting", {"slow": slow, "quick": never if again else quick}, OUT) == "quick"
    for other in range(2 * trial.SUBJECTS):
        monkeypatch.setattr(trial, "_known", {})
        monkeypatch.setattr(trial, "_subject", lambda other=other: f"subject {other}")
        trial.fastest("waiting", {"slow": quick, "quick": quick}, OUT)
    assert list(json.loads(findings.read_text())) == [
        f"subject {other}" for other in range(trial.SUBJECTS, 2 * trial.SUBJECTS)
    ]


def test_a_way_that_cannot_do_the_size_is_not_chosen(findings: Path) -> None:
    def fail() -> None:
        raise onednn.OneDnnError("no such size")

    assert trial.fastest("failing", {"one": fail, "slow": slow}, OUT) == "slow"


@pytest.mark.parametrize("error", [1.0, np.nan, 0.0])
def test_a_way_that_computes_something_else_is_not_chosen(error: float, findings: Path) -> None:
    out = np.zeros((4, 3), np.float32)

    def right() -> None:
        time.sleep(0.01)
        out[...] = np.arange(12).reshape(4, 3)

    def other() -> None:
        out[...] = np.arange(12).reshape(4, 3)
        out[2, 1] += error

    assert trial.fastest("computing", {"right": right, "other": other}, out) == ("right" if error else "other")


def test_rows_that_are_not_finite_rule_no_way_out(findings: Path) -> None:
    out = np.zeros(3)

    def right() -> None:
        time.sleep(0.01)
        out[...] = np.nan

    assert trial.fastest("computing", {"right": right, "other": lambda: out.fill(np.nan)}, out) == "other"


def test_findings_that_cannot_be_kept_are_found_all_the_same(
    tmp_path: Path, findings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file where the folder would be")
    assert trial.fastest("waiting", {"slow": slow, "quick": quick}, OUT) == "quick"


def _choose(tried: Any, answers: Any) -> None:
    def way() -> None:
        tried.put(1)
        time.sleep(0.005)

    answers.put(trial.fastest("racing", {"one": way, "other": way}, OUT))


def test_processes_of_a_host_choose_alike(findings: Path) -> None:
    context = multiprocessing.get_context("fork")
    tried, answers = context.Queue(), context.Queue()
    processes = [context.Process(target=_choose, args=(tried, answers)) for _ in range(4)]
    for process in processes:
        process.start()
    found = {answers.get(timeout=30) for _ in processes}
    count = 0
    for process in processes:
        process.join(30)
    while not tried.empty():
        count += tried.get()
    assert len(found) == 1
    assert count == 2 * (1 + trial.REPEATS), "more than one of them tried"


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
