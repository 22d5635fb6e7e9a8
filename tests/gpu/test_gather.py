"""Rows gathered on a GPU are those of data/rows.py and data/augment.py, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from nettorrent_mpi.data.augment import Augment
from nettorrent_mpi.data.rows import Inputs, take_from
from nettorrent_mpi.data.scaling import UNIT, Scaling
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.gpu.gather import GpuGatherOperations, work_type
from tests.gpu.compared import dtype_of
from tests.gpu.host import build
from tests.gpu.kernel_cases import Bench, planted, same, typed

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="g++ is not installed")

ROWS = 40
KEYS = [987654321987, 0xFFFFFFFFFFFFFFF1]


def stored(kind: str, shape: tuple[int, ...]) -> Array:
    rng = np.random.default_rng(3)
    if kind == "uint8":
        return rng.integers(0, 256, (ROWS, *shape), np.uint8)
    x = rng.standard_normal((ROWS, *shape)).astype(kind)
    x.reshape(-1)[5] = np.nan
    return x


def gathered(
    bench: Bench[GpuGatherOperations],
    x: Array,
    numbers: Array,
    name: str,
    scaling: Scaling,
    names: Sequence[str] = (),
    key: int = 0,
    *,
    resident: bool = True,
) -> Array:
    out = bench.like(np.empty((numbers.size, *x.shape[1:]), dtype_of(name)))
    factor, shift = (values.astype(work_type(out)) for values in (scaling.factor, -scaling.offset))
    size = max(factor.size, shift.size)
    factor, shift = (np.broadcast_to(values, size).copy() for values in (factor, shift))
    rows, *given = map(bench.up, (x if resident else x[numbers], numbers, factor, shift, np.array([key], "u8")))
    flip, crop = "flip" in names, "crop" in names
    bench.ops.gather(rows, given[0], out, *given[1:3], key=given[3], flip=flip, crop=crop, resident=resident)
    return bench.down(out)


def wanted(x: Array, numbers: Array, name: str, scaling: Scaling, names: Sequence[str] = (), key: int = 0) -> Array:
    out = np.empty((numbers.size, *x.shape[1:]), "f4" if name == "bfloat16" else name)
    augment = Augment(names, x.shape[1:]) if names else None
    Inputs(take_from(x), ROWS, x.shape[1:], x.dtype, scaling).batch(numbers, out, augment, key)
    return out


def scalings(kind: str, shape: tuple[int, ...]) -> list[Scaling]:
    unit, c = UNIT if kind == "uint8" else 1.0, shape[-1]
    means = np.linspace(0.1, 0.6, c).tolist()
    return [Scaling(shape, unit), Scaling(shape, unit, 0.4, 0.3), Scaling(shape, unit, means, [0.2 + m for m in means])]


@typed
@pytest.mark.parametrize("kind", ["uint8", "float32", "float64"])
@pytest.mark.parametrize("shape", [(17,), (8, 9, 3), (2, 3, 1), (1,), (13, 11, 16), (3, 5)])
def test_rows(name: str, kind: str, shape: tuple[int, ...]) -> None:
    bench, x = Bench(GpuGatherOperations, seed=2), stored(kind, shape)
    for count in (0, 1, 20):
        numbers = np.random.default_rng(count).integers(0, ROWS, count)
        for scaling in scalings(kind, shape):
            expected = wanted(x, numbers, name, scaling)
            for resident in (True, False):
                same(gathered(bench, x, numbers, name, scaling, resident=resident), expected)


@pytest.mark.parametrize("names", [("flip",), ("crop",), ("flip", "crop")], ids="+".join)
@pytest.mark.parametrize("kind", ["uint8", "float32"])
@pytest.mark.parametrize("shape", [(8, 9, 3), (3, 2, 1), (12, 1, 2)])
def test_augmented_images(names: tuple[str, ...], kind: str, shape: tuple[int, ...]) -> None:
    bench, x, numbers = Bench(GpuGatherOperations, seed=1), stored(kind, shape), np.arange(ROWS)[::-1].copy()
    scaling = scalings(kind, shape)[2]
    for key in KEYS:
        expected = wanted(x, numbers, "float32", scaling, names, key)
        for resident in (True, False):
            same(gathered(bench, x, numbers, "float32", scaling, names, key, resident=resident), expected)


@pytest.mark.parametrize("kind", ["int64", "float32", "float64", "uint8"])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (5, 7), (0,)])
def test_targets(kind: str, shape: tuple[int, ...]) -> None:
    bench = Bench(GpuGatherOperations, seed=1)
    source = np.random.default_rng(2).integers(0, 200, (ROWS, *shape)).astype(kind)
    for count in (0, 1, 33):
        numbers = np.random.default_rng(count).integers(0, ROWS, count)
        out = bench.like(source[numbers])
        bench.ops.take_rows(bench.up(source), bench.up(numbers), out)
        np.testing.assert_array_equal(bench.down(out), source[numbers])


def test_rows_whose_memory_is_not_aligned() -> None:
    bench, source = Bench(GpuGatherOperations), np.random.default_rng(2).integers(0, 200, (ROWS, 16), np.uint8)
    memory = bench.up(np.zeros(source.nbytes + 1, np.uint8))
    moved = memory[1:].reshape(source.shape)
    bench.device.upload(moved, source)
    out = bench.like(source[:3])
    bench.ops.take_rows(moved, bench.up(np.array([4, 0, ROWS - 1])), out)
    np.testing.assert_array_equal(bench.down(out), source[[4, 0, ROWS - 1]])


@pytest.mark.parametrize(("rows", "batch_size", "epochs"), [(37, 10, 2), (40, 10, 3), (5, 7, 2), (700, 300, 2)])
def test_rows_of_a_step(rows: int, batch_size: int, epochs: int) -> None:
    bench, rng = Bench(GpuGatherOperations, seed=1), np.random.default_rng(1)
    per_epoch = -(-rows // batch_size)
    orders = np.stack([rng.permutation(rows) for _ in range(epochs)])
    keys = rng.integers(0, 1 << 63, epochs).astype(np.uint64) + np.uint64(1 << 62)
    given, key = list(map(bench.up, (orders, keys))), bench.like(keys[:1])
    numbers = bench.like(np.empty(batch_size, np.int64))
    sizes = {"steps_per_epoch": per_epoch, "batch_size": batch_size}
    for step in range(2 * epochs * per_epoch):
        epoch, batch = divmod(step, per_epoch)
        part = orders[epoch % epochs, batch * batch_size : (batch + 1) * batch_size]
        for key_or_none in (key, None):
            bench.ops.rows_of_step(bench.up(np.array([float(step)])), *given, numbers, key_or_none, **sizes)
        found = bench.down(numbers)
        np.testing.assert_array_equal(found[: part.size], part)
        assert found.min() >= 0
        assert found.max() < rows
        assert bench.down(key)[0] == keys[epoch % epochs]


FAULTS = {
    "the other side": ("turn ? wide - 1 - w : w", "turn ? wide - w : w"),
    "a pixel beyond the edge": ("w >= 0 && w < wide)", "w >= 0)"),
    "the place for the number": ("splitmix((u64)row * GOLDEN", "splitmix((u64)b * GOLDEN"),
}


@pytest.mark.long
@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_faults_in_gathering_are_found(fault: str | None) -> None:
    text = planted("Dropout|Rows|Norms", *FAULTS[fault]) if fault else None
    bench, x, numbers = Bench(GpuGatherOperations, 1, text), stored("uint8", (8, 9, 3)), np.arange(ROWS)[::-1].copy()
    scaling = scalings("uint8", (8, 9, 3))[1]
    found = gathered(bench, x, numbers, "float32", scaling, ("flip", "crop"), KEYS[0])
    right = np.array_equal(found, wanted(x, numbers, "float32", scaling, ("flip", "crop"), KEYS[0]))
    assert right == (fault is None)
