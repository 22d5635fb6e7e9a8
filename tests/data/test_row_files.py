"""Rows for predictions are read from NumPy's files and from HDF5."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from nettorrent_mpi.data.row_files import open_row_file
from nettorrent_mpi.plan.errors import DataError

X = np.random.default_rng(0).normal(size=(10, 4, 3)).astype(np.float32)
BYTES = (100 * np.abs(X)).astype(np.uint8)


def read(path: Path, array: str | None = None, most: int = 4) -> Any:
    found = open_row_file(path, array)
    blocks = [*found.blocks(most)]
    assert [len(block) for block in blocks] == [most] * (found.rows // most) + [found.rows % most] * (
        found.rows % most > 0
    )
    whole = np.concatenate([np.zeros((0, *found.shape), blocks[0].dtype if blocks else found.dtype), *blocks])
    assert (whole.shape, whole.dtype.isnative) == ((found.rows, *found.shape), True)
    return whole


@pytest.mark.parametrize("x", [X, BYTES, X.astype(">f8"), X.astype(np.float16)])
def test_all_kinds_have_the_same_rows(tmp_path: Path, x: Any) -> None:
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "x.npz", x=x, other=x[:3])
    np.savez_compressed(tmp_path / "only.npz", pixels=x)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["x"] = x
        file.create_dataset("packed", data=x, compression="gzip", chunks=(3, 4, 3))
        file["x_test"] = x[:5]
    for path, array in (("x.npy", None), ("x.npz", None), ("only.npz", None), ("x.h5", "x"), ("x.h5", "packed")):
        np.testing.assert_array_equal(read(tmp_path / path, array), x)
    np.testing.assert_array_equal(read(tmp_path / "x.h5"), x[:5])
    np.testing.assert_array_equal(read(tmp_path / "x.npz", "other"), x[:3])


def refusal(path: Path, array: str | None = None) -> str:
    with pytest.raises(DataError) as found:
        read(path, array)
    assert str(found.value).startswith(f"{path}: "), found.value
    return str(found.value).removeprefix(f"{path}: ")


def test_refusals(tmp_path: Path) -> None:
    np.savez(tmp_path / "several.npz", a=X, b=X)
    told = "has none of the arrays x_test and x; there are a, b: choose one by its name"
    assert refusal(tmp_path / "several.npz") == told
    assert refusal(tmp_path / "several.npz", "c") == "has no array c; there are a, b: choose one by its name"
    np.savez(tmp_path / "none.npz")
    assert refusal(tmp_path / "none.npz") == "has none of the arrays x_test and x; there is none"
    path = tmp_path / "x.npy"
    assert refusal(path) == "no such file; give a file that is there, and whole"
    for x, told in (
        (X.astype(np.int32), "the array holds int32; write it as uint8, or as float32 or float64"),
        (np.array([None]), "the array holds object; write it as uint8, or as float32 or float64"),
        (X[0, 0], "the array has shape (3,); write (rows, features) or (rows, height, width, channels)"),
        (np.zeros((2, 0)), "the array has shape (2, 0); write (rows, features) or (rows, height, width, channels)"),
        (np.asfortranarray(X), "holds its array by columns; save numpy.ascontiguousarray(x)"),
    ):
        np.save(path, x, allow_pickle=True)
        assert refusal(path) == told
    np.save(path, X)
    assert refusal(path, "x") == "holds one array, without a name: leave out x"
    path.write_bytes(path.read_bytes()[:-17])
    assert refusal(path) == "ends in row 9 of 10: it is truncated; give a file that is there, and whole"
    path.write_bytes(b"nothing")
    assert refusal(path).startswith("is no whole .npy (ValueError: EOF: reading magic string, expected 8 bytes got 7")
    (tmp_path / "x.npz").write_bytes(b"nothing")
    assert refusal(tmp_path / "x.npz").startswith("is no whole .npz (File is not a zip file)")
    (tmp_path / "x.h5").write_bytes(b"nothing")
    with pytest.raises(DataError, match="not an HDF5 file: no signature"):
        open_row_file(tmp_path / "x.h5")


def test_a_file_that_promises_more_than_it_holds(tmp_path: Path) -> None:
    """A header of 10**12 rows is read as far as the file goes."""
    header = np.lib.format.header_data_from_array_1_0(X)
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive, archive.open("x.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {**header, "shape": (10**12, 4, 3)})
        member.write(X.tobytes())
    assert refusal(tmp_path / "x.npz").startswith("ends in row 10 of 1,000,000,000,000: it is truncated")
