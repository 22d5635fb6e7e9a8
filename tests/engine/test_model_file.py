"""A damaged file of whole arrays is found to be damaged, whichever bit of it is another one."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from nettorrent_mpi.engine.model_file import read_arrays, verify, write_arrays
from nettorrent_mpi.plan.errors import DataError

FLIPS = 150


@pytest.fixture
def file(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    layers = {"linear1/weight": random.normal(size=(5, 3)), "linear1/bias": random.normal(size=3), "none": np.empty(0)}
    attributes = {"model": json.dumps({"name": "größer"}, ensure_ascii=False), "config": "c" * 300, "step": 7}
    write_arrays(tmp_path / "file.h5", {"parameters": layers, "optimizer/m": layers}, attributes)
    assert verify(tmp_path / "file.h5") == attributes
    np.testing.assert_array_equal(read_arrays(tmp_path / "file.h5")["linear1/weight"], layers["linear1/weight"])
    return tmp_path / "file.h5"


def test_a_flipped_bit_is_found(file: Path) -> None:
    data, random = file.read_bytes(), np.random.default_rng(1)
    for place in random.choice(len(data), FLIPS, replace=False):
        flipped = bytearray(data)
        flipped[place] ^= 1 << int(random.integers(8))
        file.write_bytes(flipped)
        with pytest.raises(DataError, match=r"file\.h5: is not a whole file of nettorrent_mpi \([^\n]*$"):
            verify(file)


def test_a_truncated_file_is_found(file: Path) -> None:
    data = file.read_bytes()
    for size in range(0, len(data), 500):
        file.write_bytes(data[:size])
        with pytest.raises(DataError, match="is not a whole file"):
            verify(file)


def test_a_zeroed_array_is_found(file: Path) -> None:
    """Zeros have a fletcher32 of zero: HDF5 reads a block that a disk has lost as it reads any other."""
    with h5py.File(file) as opened:
        places = [opened[f"parameters/linear1/{name}"].id.get_chunk_info(0) for name in ("weight", "bias")]
    data = file.read_bytes()
    for chunk in places:
        zeroed = bytes(chunk.size)
        file.write_bytes(data[: chunk.byte_offset] + zeroed + data[chunk.byte_offset + chunk.size :])
        for read in (verify, read_arrays):
            with pytest.raises(DataError, match="is not the one that was written"):
                read(file)


@pytest.mark.parametrize(("chunk", "mask"), [(b"ab", 0), (b"ab", 1), (b"ab", 2), (bytes(20), 1), (bytes(20), 0)])
def test_chunks_of_other_lengths(file: Path, chunk: bytes, mask: int) -> None:
    """HDF5 2.0 crashes, or gives what lies behind them in memory."""
    with h5py.File(file, "a") as opened:
        opened["parameters/linear1/bias"].id.write_direct_chunk((0,), chunk, mask)
    for read in (verify, read_arrays):
        with pytest.raises(DataError, match="is not stored whole"):
            read(file)
