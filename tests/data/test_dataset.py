"""Files as their publishers lay them out, written here, come back row for row; whatever is wrong with them is told."""

from __future__ import annotations

import gzip
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nettorrent_mpi.data.augment import Augment
from nettorrent_mpi.data.dataset import DataOptions, open_dataset
from nettorrent_mpi.data.rows import Dataset
from nettorrent_mpi.data.scaling import Scaling
from nettorrent_mpi.plan.errors import ConfigError, DataError

Array = np.ndarray[Any, Any]
ROWS, TEST_ROWS = 50, 20


def idx(values: Array) -> bytes:
    return struct.pack(f">4B{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()


def images(rows: int, *shape: int) -> Array:
    return np.random.default_rng(rows).integers(0, 256, (rows, *shape), np.uint8)


def write_mnist(folder: Path, *, compressed: bool = True) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, rows in (("train", ROWS), ("t10k", TEST_ROWS)):
        for kind, values in (
            ("images-idx3", images(rows, 28, 28)),
            ("labels-idx1", np.arange(rows, dtype=np.uint8) % 10),
        ):
            data = idx(values)
            path = folder / f"{prefix}-{kind}-ubyte"
            if compressed:
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(data, mtime=0))
            else:
                path.write_bytes(data)


def write_cifar(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate([*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin"]):
        records = np.random.default_rng(number).integers(0, 256, (7 + number, 3073), np.uint8)
        records[:, 0] %= 10
        (folder / name).write_bytes(records.tobytes())


def gather(dataset: Dataset, indices: Any, dtype: Any = np.float32, **more: Any) -> Array:
    out = np.full((len(indices), *dataset.shape), np.nan, dtype)
    dataset.train.inputs().batch(np.asarray(indices), out, **more)
    return out


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("root")
    write_mnist(folder / "mnist")
    write_cifar(folder / "cifar-10-batches-bin")
    return folder


@pytest.mark.parametrize("compressed", [True, False])
def test_idx_round_trip(tmp_path: Path, compressed: bool) -> None:
    write_mnist(tmp_path / "mnist", compressed=compressed)
    dataset = open_dataset("mnist", str(tmp_path))
    assert (dataset.shape, dataset.classes, dataset.train.rows) == ((28, 28, 1), 10, ROWS)
    assert dataset.test is not None
    assert dataset.test.rows == TEST_ROWS
    np.testing.assert_array_equal(dataset.train.targets(), np.arange(ROWS) % 10)
    assert dataset.train.targets().dtype == np.int64
    chosen = [3, 49, 3, 0]
    expected = images(ROWS, 28, 28)[chosen, ..., None] / 255.0
    np.testing.assert_allclose(gather(dataset, chosen, np.float64), expected, rtol=1e-15)
    np.testing.assert_allclose(gather(dataset, chosen, np.float32), expected, rtol=2e-7)


def test_gzip_of_several_members_and_padding(tmp_path: Path) -> None:
    write_mnist(tmp_path / "mnist")
    path = tmp_path / "mnist" / "train-images-idx3-ubyte.gz"
    data = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(data[:1000]) + gzip.compress(data[1000:]) + bytes(512))
    dataset = open_dataset("mnist", str(tmp_path))
    np.testing.assert_allclose(gather(dataset, range(ROWS))[..., 0], images(ROWS, 28, 28) / 255.0, rtol=2e-7)


def test_letters_count_from_one_and_may_be_transposed(tmp_path: Path) -> None:
    folder = tmp_path / "letters"
    folder.mkdir()
    labels = np.arange(26, dtype=np.uint8) + 1
    for part in ("train", "test"):
        (folder / f"emnist-letters-{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images(26, 28, 28))))
        (folder / f"emnist-letters-{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    upright = open_dataset("letters", str(tmp_path))
    turned = open_dataset("letters", str(tmp_path), options=DataOptions(transposed=True))
    assert upright.classes == 26
    np.testing.assert_array_equal(upright.train.targets(), np.arange(26))
    np.testing.assert_array_equal(gather(upright, range(26)), gather(turned, range(26)).transpose(0, 2, 1, 3))


def test_cifar_planes_become_channels(root: Path) -> None:
    dataset = open_dataset("cifar10", str(root))
    files = [root / "cifar-10-batches-bin" / f"data_batch_{n}.bin" for n in range(1, 6)]
    records = np.concatenate([np.fromfile(file, np.uint8).reshape(-1, 3073) for file in files])
    assert dataset.train.rows == len(records) == 45
    np.testing.assert_array_equal(dataset.train.targets(), records[:, 0])
    values = gather(dataset, range(45))
    for row, y, x, channel in ((0, 0, 0, 0), (44, 31, 31, 2), (20, 5, 9, 1)):
        assert values[row, y, x, channel] == pytest.approx(records[row, 1 + channel * 1024 + y * 32 + x] / 255.0)


def test_cifar_100_has_fine_and_coarse_labels(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    records = np.random.default_rng(3).integers(0, 256, (6, 3074), np.uint8)
    records[:, 0], records[:, 1] = [0, 19, 5, 7, 3, 1], [99, 0, 42, 53, 7, 1]
    for name in ("train.bin", "test.bin"):
        (folder / name).write_bytes(records.tobytes())
    fine, coarse = (open_dataset(name, str(tmp_path)) for name in ("cifar100", "cifar100_coarse"))
    assert (fine.classes, coarse.classes) == (100, 20)
    assert fine.class_names is not None
    assert coarse.class_names is not None
    np.testing.assert_array_equal(fine.train.targets(), records[:, 1])
    np.testing.assert_array_equal(coarse.train.targets(), records[:, 0])
    assert [fine.class_names[label] for label in (0, 42, 53, 99)] == ["apple", "leopard", "orange", "worm"]
    assert [coarse.class_names[label] for label in (0, 7, 19)] == ["aquatic_mammals", "insects", "vehicles_2"]
    value = gather(fine, [5])[0, 3, 4, 2]
    assert value == pytest.approx(records[5, 2 + 2048 + 3 * 32 + 4] / 255.0)
    (folder / "train.bin").write_bytes(records.tobytes()[:3073])
    with pytest.raises(DataError, match="not a whole number of records of 3074 bytes; run `nettorrent data fetch"):
        open_dataset("cifar100", str(tmp_path))
    records[2, 1] = 100
    (folder / "train.bin").write_bytes(records.tobytes())
    with pytest.raises(DataError, match=r"label 100 of record 2 is not in 0\.\.99"):
        open_dataset("cifar100", str(tmp_path)).train.targets()


@pytest.mark.parametrize(
    ("part", "classes", "last"),
    [("balanced", 47, "t"), ("bymerge", 47, "t"), ("byclass", 62, "z"), ("digits", 10, "9"), ("mnist", 10, "9")],
)
def test_parts_of_emnist_count_from_zero(tmp_path: Path, part: str, classes: int, last: str) -> None:
    folder = tmp_path / "emnist"
    folder.mkdir()
    labels = np.arange(classes, dtype=np.uint8)
    for split in ("train", "test"):
        (folder / f"emnist-{part}-{split}-images-idx3-ubyte.gz").write_bytes(
            gzip.compress(idx(images(classes, 28, 28)))
        )
        (folder / f"emnist-{part}-{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    dataset = open_dataset(f"emnist_{part}", str(tmp_path), options=DataOptions(transposed=True))
    assert dataset.class_names is not None
    assert (dataset.classes, dataset.class_names[-1], dataset.class_names[9]) == (classes, last, "9")
    np.testing.assert_array_equal(dataset.train.targets(), np.arange(classes))
    turned = gather(dataset, range(classes))[..., 0]
    np.testing.assert_allclose(turned, images(classes, 28, 28).transpose(0, 2, 1) / 255.0, rtol=2e-7)


def test_digits_ship_with_the_package() -> None:
    dataset = open_dataset("digits", None)
    assert dataset.test is not None
    assert (dataset.shape, dataset.classes) == ((8, 8, 1), 10)
    assert (dataset.train.rows, dataset.test.rows) == (1438, 359)
    values = gather(dataset, range(1438))
    assert values.min() == 0.0
    assert values.max() == 1.0
    # The first image of the source, a zero: its first two lines of pixels.
    np.testing.assert_array_equal(values[0, :2, :, 0] * 16, [[0, 0, 5, 13, 9, 1, 0, 0], [0, 0, 13, 15, 10, 15, 5, 0]])
    np.testing.assert_array_equal(dataset.train.targets()[:8], [0, 1, 2, 3, 5, 6, 7, 8])
    np.testing.assert_array_equal(dataset.test.targets()[:2], [4, 9])


def test_synthetic_is_a_function_of_its_seed_and_can_be_learned() -> None:
    def make(seed: int) -> Dataset:
        return open_dataset(
            "synthetic", None, options=DataOptions(rows=900, test_rows=100, shape=(64,), classes=5, seed=seed)
        )

    dataset = make(3)
    assert (dataset.shape, dataset.classes, dataset.train.rows) == ((64,), 5, 900)
    values = gather(dataset, range(900))
    np.testing.assert_array_equal(values, gather(make(3), range(900)))
    assert not np.array_equal(values, gather(make(4), range(900)))
    labels = dataset.train.targets()
    assert sorted(set(labels.tolist())) == [0, 1, 2, 3, 4]
    means = np.stack([values[labels == label].mean(axis=0) for label in range(5)])
    assert dataset.test is not None
    tested = np.empty((100, 64), np.float32)
    dataset.test.inputs().batch(np.arange(100), tested)
    nearest = ((tested[:, None] - means) ** 2).sum(axis=2).argmin(axis=1)
    assert (nearest == dataset.test.targets()).mean() > 0.95


def test_normalisation_per_channel_and_for_all(root: Path) -> None:
    plain = gather(open_dataset("cifar10", str(root)), range(20), np.float64)
    mean, std = [0.49, 0.48, 0.45], [0.25, 0.24, 0.26]
    each = open_dataset("cifar10", str(root), options=DataOptions(mean=mean, std=std))
    np.testing.assert_allclose(gather(each, range(20), np.float64), (plain - mean) / std, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(gather(each, range(20)), (plain - mean) / std, rtol=1e-5, atol=1e-5)
    one = open_dataset("cifar10", str(root), options=DataOptions(mean=0.5, std=0.25))
    np.testing.assert_allclose(gather(one, range(20), np.float64), (plain - 0.5) / 0.25, rtol=1e-12, atol=1e-13)


def test_any_division_of_a_batch_gives_the_same_rows(root: Path) -> None:
    dataset = open_dataset("cifar10", str(root), options=DataOptions(mean=0.5))
    augment = Augment(["flip", "crop"], dataset.shape)
    indices = np.random.default_rng(0).permutation(45)
    inputs = dataset.train.inputs()
    whole = np.empty((45, 32, 32, 3), np.float32)
    inputs.batch(indices, whole, augment, key=99)
    for cuts in ([1], [22], [5, 6, 40], [0, 45], list(range(1, 45))):
        parts = np.full_like(whole, np.nan)
        for start, stop in zip([0, *cuts], [*cuts, 45], strict=True):
            inputs.batch(indices[start:stop], parts[start:stop], augment, key=99)
        np.testing.assert_array_equal(parts, whole)


def test_the_steady_state_allocates_nothing(root: Path) -> None:
    dataset = open_dataset("cifar10", str(root), options=DataOptions(mean=[0.1, 0.2, 0.3]))
    inputs = dataset.train.inputs()
    augment = Augment(["flip", "crop"], dataset.shape)
    out = np.empty((32, 32, 32, 3), np.float32)
    orders = [np.random.default_rng(n).permutation(45)[:32] for n in range(20)]
    for way in (None, augment):
        inputs.batch(orders[0], out, way, 1)
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            for order in orders:
                inputs.batch(order, out, way, 1)
            now, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        # NumPy makes room for 6,144 numbers while it broadcasts factors per channel; the stored batch is 98,304 bytes.
        assert peak - before < 32_000
        assert now - before < 2000


def test_rows_go_where_the_caller_allocates_them(root: Path) -> None:
    asked = []

    def allocate(shape: tuple[int, ...], dtype: np.dtype[Any], fill: Callable[[Array], None]) -> Array:
        array = np.zeros(shape, dtype)
        fill(array)
        asked.append((shape, dtype, array))
        return array

    for name, shape in (("mnist", (ROWS, 28, 28, 1)), ("cifar10", (45, 32, 32, 3))):
        inputs = open_dataset(name, str(root)).train.inputs(allocate)
        assert asked[-1][:2] == (shape, np.dtype(np.uint8))
        asked[-1][2][7] = 255  # the very memory is used, not a copy of it
        out = np.empty((1, *shape[1:]), np.float32)
        inputs.batch(np.array([7]), out)
        assert (out == 1.0).all()


# What is wrong with a file, the text and the byte that the error names.


def opened_and_read(name: str, root: Path) -> None:
    dataset = open_dataset(name, str(root))
    for split in (dataset.train, dataset.test):
        assert split is not None
        split.inputs()
        split.targets()


def damaged(root: Path, name: str) -> DataError:
    with pytest.raises(DataError) as caught:
        opened_and_read(name, root)
    return caught.value


@pytest.mark.parametrize("keep", [0, 1, 9, 30, 20_000, -8, -1])
def test_truncated_gzip(tmp_path: Path, keep: int) -> None:
    write_mnist(tmp_path / "mnist")
    path = tmp_path / "mnist" / "train-images-idx3-ubyte.gz"
    data = path.read_bytes()[:keep]
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        open_dataset("mnist", str(tmp_path))
    assert caught.value.file == str(path)
    assert caught.value.offset == (len(data) if keep not in (0, 1) else 0)
    assert "nettorrent data fetch mnist" in str(caught.value)


def test_one_flipped_byte_in_gzip_is_found_when_it_is_read(tmp_path: Path) -> None:
    write_mnist(tmp_path / "mnist")
    path = tmp_path / "mnist" / "train-images-idx3-ubyte.gz"
    data = path.read_bytes()
    assert len(data) > 30_000
    for place in (25_000, len(data) - 6):  # in the (stored) values; in the checksum itself
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :])
        dataset = open_dataset("mnist", str(tmp_path))
        with pytest.raises(DataError, match="corrupt gzip data") as caught:
            dataset.train.inputs()
        assert caught.value.offset is not None
        assert len(data) - 8 <= caught.value.offset < len(data)
    place = 40  # within the table of codes of the first block
    path.write_bytes(data[:10] + b"\xff" * 30 + data[place:])
    error = damaged(tmp_path, "mnist")
    assert error.offset is not None
    assert 10 <= error.offset < place


@pytest.mark.parametrize("compressed", [True, False])
def test_wrong_headers(tmp_path: Path, compressed: bool) -> None:
    name = "train-images-idx3-ubyte" + (".gz" if compressed else "")
    pack = gzip.compress if compressed else bytes
    good = idx(images(ROWS, 28, 28))
    cases = [
        (b"\x89PNG" + good[4:], 0, "89 50 4e 47"),
        (good[:3] + b"\x01" + good[4:], 0, "not an IDX file of bytes in 3 dimensions"),
        (good[:10], 10, "header"),
        (good[:4] + bytes(4) + good[8:], 4, "empty"),
        (good[:-5], len(good) - 5, "truncated"),
        (good + b"more", len(good), "more than its header says"),
        (good[:4] + struct.pack(">I", ROWS - 1) + good[8:], len(good) - 784, "more than its header says"),
    ]
    for content, offset, text in cases:
        write_mnist(tmp_path / "mnist", compressed=compressed)
        (tmp_path / "mnist" / name).write_bytes(pack(content))
        with pytest.raises(DataError, match=text) as caught:
            open_dataset("mnist", str(tmp_path))
        assert (caught.value.file, caught.value.offset) == (str(tmp_path / "mnist" / name), offset)


def test_a_header_whose_product_no_integer_holds(tmp_path: Path) -> None:
    (tmp_path / "mnist").mkdir()
    header = struct.pack(">4B3I", 0, 0, 8, 3, 64, 2**29, 2**29)
    (tmp_path / "mnist" / "train-images-idx3-ubyte").write_bytes(header)
    with pytest.raises(
        DataError, match=r"truncated: 16 bytes, but shape \(64, 536870912, 536870912\) makes 184467440737"
    ):
        open_dataset("mnist", str(tmp_path))


def test_labels_that_do_not_fit(tmp_path: Path) -> None:
    write_mnist(tmp_path / "mnist", compressed=False)
    path = tmp_path / "mnist" / "train-labels-idx1-ubyte"
    labels = np.arange(ROWS, dtype=np.uint8) % 10
    path.write_bytes(idx(labels[:-1]))
    with pytest.raises(DataError, match=r"49 labels, but .* has 50 images"):
        open_dataset("mnist", str(tmp_path))
    labels[13] = 10
    path.write_bytes(idx(labels))
    dataset = open_dataset("mnist", str(tmp_path))
    with pytest.raises(DataError, match=r"label 10 of row 13 is not in 0\.\.9") as caught:
        dataset.train.targets()
    assert path.read_bytes()[caught.value.offset] == 10


def test_a_file_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    write_mnist(tmp_path / "mnist", compressed=False)
    dataset = open_dataset("mnist", str(tmp_path))
    path = tmp_path / "mnist" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match="truncated") as caught:
        dataset.train.inputs()
    assert caught.value.offset == 5000


def test_missing_files(tmp_path: Path) -> None:
    for name, folder in (("mnist", "mnist"), ("cifar10", "cifar-10-batches-bin"), ("letters", "letters")):
        with pytest.raises(DataError, match=f"no such file; run `nettorrent data fetch {name}`") as caught:
            open_dataset(name, str(tmp_path))
        assert folder in str(caught.value.file)
    (tmp_path / "mnist" / "train-images-idx3-ubyte").mkdir(parents=True)
    with pytest.raises(DataError, match="cannot be read"):
        open_dataset("mnist", str(tmp_path))


def test_damaged_cifar(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-bin"
    write_cifar(folder)
    path = folder / "data_batch_2.bin"
    good = path.read_bytes()
    for size in (0, 1, len(good) - 1):
        path.write_bytes(good[:size])
        with pytest.raises(DataError, match="truncated") as caught:
            open_dataset("cifar10", str(tmp_path))
        assert (caught.value.file, caught.value.offset) == (str(path), size)
    path.write_bytes(good[: 3 * 3073] + b"\x0a" + good[3 * 3073 + 1 :])
    error = damaged(tmp_path, "cifar10")
    assert (error.file, error.offset) == (str(path), 3 * 3073)
    assert "label 10 of record 3" in str(error)
    path.write_bytes(good)
    dataset = open_dataset("cifar10", str(tmp_path))
    path.write_bytes(good[:5000])
    with pytest.raises(DataError, match="truncated within a record") as caught:
        dataset.train.inputs()
    assert caught.value.offset == 5000
    path.write_bytes(good[:3073])
    with pytest.raises(DataError, match="became shorter"):
        dataset.train.inputs()


def test_mistakes_in_the_configuration(root: Path) -> None:
    cases: list[tuple[str, str | None, DataOptions, str, str]] = [
        ("mnist", str(root), DataOptions(std=0.0), "data.std", "above 0"),
        (
            "cifar10",
            str(root),
            DataOptions(mean=(125.3, 123.0, 113.9)),
            "data.mean",
            "scaled to 0..1 .* divide it by 255",
        ),
        ("cifar10", str(root), DataOptions(mean=0.5, std=63.0), "data.std", "divide it by 255"),
        ("mnist", str(root), DataOptions(mean=float("nan")), "data.mean", "finite"),
        ("cifar10", str(root), DataOptions(mean=[0.5, 0.5]), "data.mean", "or 3, one for each channel"),
    ]
    for name, where, options, key, text in cases:
        with pytest.raises(ConfigError, match=text) as caught:
            open_dataset(name, where, options=options)
        assert caught.value.key == key


def test_scaling_does_not_touch_what_is_right_already() -> None:
    x = np.array([[0.1, -7.0]], np.float32)
    Scaling((2,)).apply(x)
    np.testing.assert_array_equal(x, np.array([[0.1, -7.0]], np.float32))


REAL = [
    ("mnist", (28, 28, 1), 60_000, 10_000, 0.1307, 0.3081),
    ("cifar10", (32, 32, 3), 50_000, 10_000, 0.4734, 0.2516),
    ("letters", (28, 28, 1), None, None, None, None),
]


@pytest.mark.parametrize(("name", "shape", "rows", "test_rows", "mean", "std"), REAL)
def test_real_files(
    name: str, shape: tuple[int, ...], rows: int | None, test_rows: int | None, mean: float | None, std: float | None
) -> None:
    where = os.environ.get("NETTORRENT_DATA")
    if not where:
        pytest.skip("NETTORRENT_DATA does not name a folder of real data sets")
    dataset = open_dataset(name, where)
    assert dataset.test is not None
    assert dataset.shape == shape
    if rows is not None:
        assert (dataset.train.rows, dataset.test.rows) == (rows, test_rows)
    inputs, labels = dataset.train.inputs(), dataset.train.targets()
    assert sorted(set(labels.tolist())) == list(range(dataset.classes or 0))
    values = np.empty((10_000, *shape), np.float32)
    inputs.batch(np.random.default_rng(0).permutation(dataset.train.rows)[:10_000], values)
    if mean is not None:  # the figures that everybody normalises with
        assert values.mean() == pytest.approx(mean, rel=0.02)
        assert values.std() == pytest.approx(std, rel=0.02)
