"""HDF5 data sets in every way that HDF5 stores them, and what is wrong with the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from nettorrent_mpi.data.dataset import DataOptions, open_dataset
from nettorrent_mpi.plan.errors import DataError

ROWS, SHAPE = 60, (6, 5, 3)
Array = np.ndarray[Any, Any]


def values(dtype: Any) -> Array:
    generator = np.random.default_rng(0)
    if np.dtype(dtype) == np.uint8:
        return generator.integers(0, 256, (ROWS, *SHAPE), np.uint8)
    return generator.standard_normal((ROWS, *SHAPE)).astype(dtype)


def labels() -> Array:
    return np.arange(ROWS) % 4


def write(path: Path, x: Array, y: Array, file_options: dict[str, Any] | None = None, **x_options: Any) -> None:
    with h5py.File(path, "w", **(file_options or {})) as file:
        file.create_dataset("x", data=x, **x_options)
        file["y"] = y


LAYOUTS: list[tuple[str, dict[str, Any], dict[str, Any], bool]] = [
    ("contiguous", {}, {}, True),
    ("after a user block", {"userblock_size": 512}, {}, True),
    ("latest format", {"libver": "latest"}, {}, True),
    ("chunked", {}, {"chunks": (7, 6, 5, 3)}, False),
    ("compressed", {}, {"compression": "gzip", "shuffle": True}, False),
    ("with checksums", {}, {"fletcher32": True}, False),
]


@pytest.mark.parametrize("dtype", ["u1", "<f4", ">f4", "<f8", "<f2"])
@pytest.mark.parametrize(("layout", "file_options", "x_options", "mapped"), LAYOUTS)
def test_round_trip(
    tmp_path: Path, layout: str, file_options: dict[str, Any], x_options: dict[str, Any], mapped: bool, dtype: str
) -> None:
    path = tmp_path / "set.h5"
    x = values(dtype)
    write(path, x, labels(), file_options, **x_options)
    dataset = open_dataset("hdf5", str(path))
    assert (dataset.shape, dataset.classes, dataset.train.rows, dataset.test) == (SHAPE, 4, ROWS, None)
    take = dataset.train.open_rows(lambda *_: pytest.fail("nothing to allocate"))
    assert take.__qualname__.startswith("take_from" if mapped else "_take_through_hdf5")
    np.testing.assert_array_equal(dataset.train.targets(), labels())
    inputs = dataset.train.inputs()
    expected = x.astype(np.float64) / (255.0 if dtype == "u1" else 1.0)
    for indices in ([5], [59, 0, 30], [7, 7, 3, 7], list(range(ROWS)), []):
        out = np.full((len(indices), *SHAPE), np.nan)
        inputs.batch(np.array(indices, np.intp), out)
        np.testing.assert_allclose(out, expected[indices], rtol=1e-15, err_msg=layout)


def test_test_set_names_and_floating_targets(tmp_path: Path) -> None:
    path = tmp_path / "set.h5"
    with h5py.File(path, "w") as file:
        file["x"], file["y"] = values("f4"), labels()
        file["x_test"], file["y_test"] = values("f4")[:10], labels()[:10]
        file.attrs["classes"] = ["a", "b", "c", "d", "never seen"]
    dataset = open_dataset("hdf5", str(path), options=DataOptions(mean=1.0, std=2.0))
    assert dataset.test is not None
    assert (dataset.test.rows, dataset.classes) == (10, 5)
    out = np.empty((10, *SHAPE), np.float32)
    dataset.test.inputs().batch(np.arange(10), out)
    np.testing.assert_allclose(out, (values("f4")[:10] - 1.0) / 2.0, rtol=1e-5, atol=1e-6)

    targets = np.random.default_rng(1).standard_normal((ROWS, 2)).astype(">f4")
    write(path, values("f4"), targets)
    dataset = open_dataset("hdf5", str(path))
    assert dataset.classes is None
    read = dataset.train.targets()
    assert read.dtype.isnative
    np.testing.assert_array_equal(read, targets)


def test_a_test_set_may_hold_the_largest_label(tmp_path: Path) -> None:
    path = tmp_path / "set.h5"
    with h5py.File(path, "w") as file:
        file["x"], file["y"] = values("u1"), labels()
        file["x_test"], file["y_test"] = values("u1")[:2], np.array([6, 0], np.uint8)
    assert open_dataset("hdf5", str(path)).classes == 7


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ({"x": values("u1")}, r"no data set y \(there is: x\)"),
        ({"y": labels()}, r"no data set x \(there is: y\)"),
        ({}, r"no data set x \(there is: nothing\)"),
        ({"x": values("u1"), "y": labels()[:-1]}, "x has 60 rows but y has 59"),
        ({"x": values("u1"), "y": labels(), "x_test": values("u1")}, "no data set y_test"),
        ({"x": values("u1"), "y": labels(), "y_test": labels()}, "no data set x_test"),
        (
            {"x": values("u1"), "y": labels(), "x_test": values("f4"), "y_test": labels()},
            r"x_test has rows of \(6, 5, 3\) float32, x of \(6, 5, 3\) uint8",
        ),
        ({"x": values("u1").astype(np.int16), "y": labels()}, "x holds int16; write it as uint8 or floating"),
        ({"x": values("u1")[:, 0, 0, 0], "y": labels()}, r"x has shape \(60,\)"),
        ({"x": values("u1")[:0], "y": labels()[:0]}, r"x has shape \(0, 6, 5, 3\)"),
        ({"x": values("u1"), "y": labels().astype(float)}, r"y holds float64 of shape \(60,\)"),
        ({"x": values("u1"), "y": labels()[:, None]}, r"y holds int64 of shape \(60, 1\)"),
        ({"x": values("u1"), "y": labels() - 1}, "y: label -1 of row 0"),
    ],
)
def test_contents_that_are_not_a_data_set(tmp_path: Path, parts: dict[str, Array], text: str) -> None:
    path = tmp_path / "set.h5"
    with h5py.File(path, "w") as file:
        for name, data in parts.items():
            file[name] = data
    with pytest.raises(DataError, match=text) as caught:
        open_dataset("hdf5", str(path))
    assert caught.value.file == str(path)


def test_labels_beyond_the_named_classes(tmp_path: Path) -> None:
    path = tmp_path / "set.h5"
    write(path, values("u1"), labels())
    with h5py.File(path, "a") as file:
        file.attrs["classes"] = ["a", "b", "c"]
    with pytest.raises(DataError, match=r"y: label 3 of row 3 is not in 0\.\.2"):
        open_dataset("hdf5", str(path)).train.targets()


def test_missing_truncated_and_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "set.h5"
    with pytest.raises(DataError, match=r"no such file; set data\.root to an HDF5 file"):
        open_dataset("hdf5", str(path))
    with pytest.raises(DataError, match="cannot be read"):
        open_dataset("hdf5", str(tmp_path))
    write(path, values("u1"), labels())
    good = path.read_bytes()
    path.write_bytes(b"PK\x03\x04" + good[4:])
    with pytest.raises(DataError, match="not an HDF5 file") as caught:
        open_dataset("hdf5", str(path))
    assert caught.value.offset == 0
    for size in (600, 3000, len(good) - 1):
        path.write_bytes(good[:size])
        with pytest.raises(DataError, match="truncated or corrupt") as caught:
            open_dataset("hdf5", str(path))
        assert (caught.value.file, caught.value.offset) == (str(path), size)


def test_a_file_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    path = tmp_path / "set.h5"
    write(path, values("u1"), labels())
    dataset = open_dataset("hdf5", str(path))
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DataError, match="truncated") as caught:
        dataset.train.inputs()
    assert caught.value.offset == 3000


def test_a_flipped_byte_under_a_checksum_names_row_and_chunk(tmp_path: Path) -> None:
    path = tmp_path / "set.h5"
    write(path, values("u1"), labels(), chunks=(10, *SHAPE), fletcher32=True)
    with h5py.File(path) as file:
        chunk = file["x"].id.get_chunk_info_by_coord((20, 0, 0, 0))
    data = bytearray(path.read_bytes())
    data[chunk.byte_offset + 5] ^= 1
    path.write_bytes(data)
    inputs = open_dataset("hdf5", str(path)).train.inputs()
    out = np.empty((3, *SHAPE))
    inputs.batch(np.array([0, 19, 30]), out)  # other chunks are sound
    with pytest.raises(DataError, match="x: row 25 cannot be read") as caught:
        inputs.batch(np.array([0, 59, 25]), out)
    assert caught.value.offset == chunk.byte_offset
