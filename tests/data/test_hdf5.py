"""HDF5 data sets in every way that HDF5 stores them, and what is wrong with the others."""

from __future__ import annotations

import os
import struct
import time
import warnings
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from nettorrent_mpi.data.dataset import DataOptions, open_dataset
from nettorrent_mpi.data.from_arrays import from_arrays
from nettorrent_mpi.data.rows import Split, private
from nettorrent_mpi.plan.errors import DataError, NetTorrentWarning

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


def read(path: Path, **how: Any) -> Array:
    out = np.empty((ROWS, *SHAPE))
    open_dataset("hdf5", str(path)).train.inputs(**how).batch(np.arange(ROWS), out)
    return out


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
    np.testing.assert_array_equal(dataset.train.targets(), labels())
    expected = x.astype(np.float64) / (255.0 if dtype == "u1" else 1.0)
    allocated: list[int] = []

    def allocate(shape: tuple[int, ...], dtype: np.dtype[Any], fill: Any) -> Array:
        array = private(shape, dtype, fill)
        allocated.append(array.nbytes)
        return array

    for roomy in (True, False):  # read once into memory, or, without room for it, batch by batch
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            inputs = dataset.train.inputs(allocate, lambda size, roomy=roomy: roomy and size == x.nbytes)
        assert allocated == ([] if mapped else [x.nbytes])
        assert ["do not fit" in str(each.message) for each in told] == ([] if mapped or roomy else [True])
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
        ({"x": values("u1"), "y": labels() - 1}, "y: label -1 of row 0; number the classes"),
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
    train = open_dataset("hdf5", str(path)).train
    with pytest.raises(DataError, match="x: row 20 cannot be read") as caught:
        train.inputs()
    assert caught.value.offset == chunk.byte_offset
    with pytest.warns(NetTorrentWarning, match="do not fit"):
        inputs = train.inputs(has_room=lambda size: False)
    out = np.empty((3, *SHAPE))
    inputs.batch(np.array([0, 19, 30]), out)  # other chunks are sound
    with pytest.raises(DataError, match="x: row 25 cannot be read") as caught:
        inputs.batch(np.array([0, 59, 25]), out)
    assert caught.value.offset == chunk.byte_offset


def test_a_compressed_chunk_is_read_once_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row by row it would be decompressed again for each row of the batch."""
    path = tmp_path / "set.h5"
    x = np.random.default_rng(0).integers(0, 256, (400, 16, 16), np.uint8)
    write(path, x, np.arange(400) % 3, chunks=(200, 4, 4), compression="gzip")
    assert open_dataset("hdf5", str(path)).notes == ()
    with pytest.warns(NetTorrentWarning):
        inputs = open_dataset("hdf5", str(path)).train.inputs(has_room=lambda size: False)
    read, direct = [], h5py.Dataset.read_direct
    monkeypatch.setattr(h5py.Dataset, "read_direct", lambda *how: read.append(how[2]) or direct(*how))
    out, rows = np.empty((100, 16, 16), np.float32), np.random.default_rng(1).permutation(400)[:100]
    inputs.batch(rows, out)
    np.testing.assert_array_equal(np.rint(out * 255), x[rows])
    assert len(read) == 2
    assert read[0].stop <= 200 <= read[1].start


def test_what_is_read_in_one_go_is_told(tmp_path: Path) -> None:
    path = tmp_path / "set.h5"
    with h5py.File(path, "w") as file:
        x = np.full((20000, 28, 28, 1), 7, np.uint8)
        file.create_dataset("x", data=x, chunks=(2500, 28, 28, 1), compression="gzip")
        file["y"] = np.arange(20000) % 10
    (note,) = open_dataset("hdf5", str(path)).notes
    assert note.startswith(f"{path}: x is compressed (gzip), so its 15.7 MB are read into memory once")
    assert "h5repack -l CONTI -f NONE set.h5 NEW.h5" in note


def test_rows_behind_links_and_in_other_files(tmp_path: Path) -> None:
    """They come from the file that has them; one that is missing is an error, where HDF5 reads zeros."""
    other, path = tmp_path / "other.h5", tmp_path / "set.h5"
    x = values("u1")
    write(other, x, labels())
    with h5py.File(path, "w") as file:
        file["x"], file["y"] = h5py.ExternalLink("other.h5", "/x"), labels()
        file["more"] = np.full(5000, 99, np.uint8)

    def read() -> Array:
        out = np.empty((ROWS, *SHAPE))
        open_dataset("hdf5", str(path)).train.inputs().batch(np.arange(ROWS), out)
        return np.rint(out * 255)

    np.testing.assert_array_equal(read(), x)
    other.rename(tmp_path / "away.h5")
    with pytest.raises(DataError, match=r"x is a link to /x of other\.h5, which is not there"):
        read()
    layout = h5py.VirtualLayout(x.shape, np.uint8)
    layout[...] = h5py.VirtualSource("other.h5", "x", x.shape)
    with h5py.File(path, "w") as file:
        file.create_virtual_dataset("x", layout)
        file["y"] = labels()
    with pytest.raises(DataError, match=r"x is put together from files, one of them other\.h5, which is not there"):
        read()
    (tmp_path / "away.h5").rename(other)
    np.testing.assert_array_equal(read(), x)
    layout[40:] = h5py.VirtualSource("other.h5", "z", (20, *SHAPE))
    with h5py.File(path, "w") as file:
        file.create_virtual_dataset("x", layout)
        file["y"] = labels()
    with pytest.raises(DataError, match=r"x is put together from data sets, but .*other\.h5 has no z"):
        read()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda file: h5py.ExternalLink("../outside.h5", "/x"), "x is a link to /x of .*outside of this file's folder"),
        (lambda file: h5py.ExternalLink("pipe", "/x"), "pipe: cannot be read: it is no plain file"),
        (lambda file: h5py.SoftLink("/far/x"), "x is a link to / of .*outside of this file's folder"),
        (lambda file: h5py.SoftLink("/x"), "x is behind more than 32 links"),
        (lambda file: h5py.SoftLink("far/z"), "x is a link to / of .*outside of this file's folder"),
    ],
)
def test_links_that_lead_elsewhere(tmp_path: Path, make: Any, text: str) -> None:
    """A file that somebody else made does not decide which other files are read."""
    (tmp_path / "set").mkdir()
    write(tmp_path / "outside.h5", values("u1"), labels())
    os.mkfifo(tmp_path / "set" / "pipe")
    with h5py.File(tmp_path / "set" / "set.h5", "w") as file:
        file["far"] = h5py.ExternalLink("../outside.h5", "/")
        file["x"], file["y"] = make(file), labels()
    with pytest.raises(DataError, match=text):
        open_dataset("hdf5", str(tmp_path / "set" / "set.h5"))


def test_rows_outside_of_hdf5(tmp_path: Path) -> None:
    """External storage could be any file of the user's."""
    path = tmp_path / "set.h5"
    (tmp_path / "x.raw").write_bytes(values("u1").tobytes())
    with h5py.File(path, "w") as file:
        file.create_dataset("x", (ROWS, *SHAPE), np.uint8, external=[(tmp_path / "x.raw", 0, h5py.h5f.UNLIMITED)])
        file["y"] = labels()
    with pytest.raises(DataError, match=r"x is stored in .*x\.raw, outside of HDF5; write its values into this file"):
        open_dataset("hdf5", str(path))


def test_sizes_that_the_file_cannot_hold(tmp_path: Path) -> None:
    path = tmp_path / "set.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("x", (1 << 40, 30), np.uint8, chunks=(100, 30))[:100] = 1
        file.create_dataset("y", (1 << 40,), np.int64, chunks=(100,))[:100] = 1
    with pytest.raises(DataError, match=r"x has 32,985,348,833,280 bytes by its shape .* cannot hold them"):
        open_dataset("hdf5", str(path))


def test_values_that_nobody_wrote(tmp_path: Path) -> None:
    path = tmp_path / "set.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("x", (ROWS, *SHAPE), np.uint8)
        file["y"] = labels()
    with pytest.raises(DataError, match="x has a shape, but no values were written"):
        open_dataset("hdf5", str(path))
    with h5py.File(path, "w") as file:
        file.create_dataset("x", (ROWS, *SHAPE), np.uint8, chunks=(20, *SHAPE))
        file["x"][:20] = 1
        file["y"] = labels()
    with pytest.warns(NetTorrentWarning, match=r"x: 2 of 3 chunks were never written"):
        open_dataset("hdf5", str(path))


def test_a_filter_that_this_library_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "set.h5"
    write(path, values("u1"), labels(), compression="lzf")
    data = path.read_bytes()
    assert data.count(b"lzf\0") == 1
    at = data.index(b"lzf\0")
    head = data[:at].rindex((32000).to_bytes(2, "little"))
    path.write_bytes(data[:head] + (32004).to_bytes(2, "little") + data[head + 2 :])
    with pytest.raises(DataError, match=r"x is compressed by filter 32004 \(lzf\), which this HDF5 library lacks"):
        open_dataset("hdf5", str(path))


@pytest.mark.parametrize(
    ("classes", "text"),
    [
        (2, "classes is '2', but has to list"),
        ("no,yes", "classes is 'no,yes', but has to list"),
        (np.array([2]), r"classes is '\[2\]', but has to list"),
        (h5py.Empty("f4"), "classes is empty, but has to list"),
        (np.array([], "S3"), "classes is empty, but has to list"),
        (["a", "b", "a", "c"], r"names 'a' twice \(0 and 2\)"),
    ],
)
def test_class_names_that_are_none(tmp_path: Path, classes: Any, text: str) -> None:
    path = tmp_path / "set.h5"
    write(path, values("u1"), labels())
    with h5py.File(path, "a") as file:
        file.attrs["classes"] = classes
    with pytest.raises(DataError, match=text) as caught:
        open_dataset("hdf5", str(path))
    assert caught.value.file == str(path)


def test_labels_that_leave_classes_without_rows_are_told(tmp_path: Path) -> None:
    write(tmp_path / "set.h5", values("u1"), labels() + 1)
    assert open_dataset("hdf5", str(tmp_path / "set.h5")).notes == (
        f"{tmp_path}/set.h5: no row of y has label 0: are the classes numbered 0, 1, 2, ...?",
    )
    write(tmp_path / "set.h5", values("u1"), 7 * labels())
    (note,) = open_dataset("hdf5", str(tmp_path / "set.h5")).notes
    assert "no row of y has label 1, and 17 more of 0..21" in note


@pytest.mark.parametrize(
    ("y", "text"),
    [
        (2 * (np.arange(ROWS) % 2) - 1, "y: label -1 of row 0; number the classes 0, 1, 2, "),
        (np.where(np.arange(ROWS) > 4, np.uint64(2**63 + 1), np.uint64(0)), "y: label 9223372036854775809 of row 5;"),
    ],
)
def test_labels_that_cannot_be_classes(tmp_path: Path, y: Array, text: str) -> None:
    write(tmp_path / "set.h5", values("u1"), y)
    with pytest.raises(DataError, match=text):
        open_dataset("hdf5", str(tmp_path / "set.h5"))
    with h5py.File(tmp_path / "set.h5", "a") as file:
        file.attrs["classes"] = ["no", "yes"]
    with pytest.raises(DataError, match=text[:20]):
        open_dataset("hdf5", str(tmp_path / "set.h5")).train.targets()
    with pytest.raises(DataError, match=text):
        from_arrays(values("u1"), y)


def test_whatever_hdf5_raises_is_a_data_error(tmp_path: Path) -> None:
    """Names in a damaged heap, chunks that are not gzip's, an object without its header."""
    path = tmp_path / "set.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=values("u1"), chunks=(20, *SHAPE), compression="gzip")
        file.create_dataset("y", data=labels(), chunks=(20,), compression="gzip")
        places = {name: file[name].id.get_chunk_info(1).byte_offset for name in "xy"}
        file.attrs["classes"] = ["a", "b", "c", "d"]
    good = path.read_bytes()
    assert good.count(b"GCOL") == 1

    def damaged(at: int) -> Split:
        path.write_bytes(good[:at] + bytes(8) + good[at + 8 :])
        return open_dataset("hdf5", str(path)).train

    with pytest.raises(DataError, match="truncated or corrupt HDF5 file"):
        damaged(good.index(b"GCOL"))
    with pytest.raises(DataError, match="truncated or corrupt HDF5 file"):
        damaged(good.index(b"TREE"))
    with pytest.raises(DataError, match="x: row 20 cannot be read"):
        damaged(places["x"]).inputs()
    with pytest.raises(DataError, match="y cannot be read"):
        damaged(places["y"]).targets()


def test_a_damaged_heap_of_texts(tmp_path: Path) -> None:
    """HDF5 2.0 goes round in it for ever, and no signal ends that."""
    path = tmp_path / "set.h5"
    write(path, values("u1"), labels())
    with h5py.File(path, "a") as file:
        file.attrs["classes"] = ["a", "b", "c", "d"]
    good = path.read_bytes()
    assert open_dataset("hdf5", str(path)).class_names == ("a", "b", "c", "d")
    heap = good.index(b"GCOL")
    for place in (24, 25, 30, 31, 48, 72, 96, 112, 120, 121, 122, 127):
        for bit in range(8):
            damaged = bytearray(good)
            damaged[heap + place] ^= 1 << bit
            path.write_bytes(damaged)
            with suppress(DataError):
                assert open_dataset("hdf5", str(path)).classes == 4


GZIP, SHUFFLE, FLETCHER = {"compression": "gzip"}, {"shuffle": True}, {"fletcher32": True}
PACKED = zlib.compress(b"ab")
SUMMED = PACKED + struct.pack("<I", 0)  # a checksum that is not looked at before the length


@pytest.mark.parametrize(
    ("how", "chunk", "mask", "text"),
    [
        ({}, b"ab", 0, "has 2 bytes for 1,800"),
        (FLETCHER, b"ab", 0, "has 2 bytes"),  # HDF5 2.0 crashes with these
        (FLETCHER, b"ab", 2, "has 2 bytes"),
        (FLETCHER, bytes(1800), 0, "has 1,800 bytes"),
        (SHUFFLE, b"ab", 0, "has 2 bytes"),
        (GZIP, b"ab", 1, "has 2 bytes"),
        (GZIP, PACKED, 0, "has 2 of 1,800 bytes once it is unpacked"),
        (GZIP, zlib.compress(bytes(10**6)), 0, "has more than 1,800 bytes"),
        (GZIP | SHUFFLE | FLETCHER, b"a", 0, "has 1 bytes"),
        (GZIP | SHUFFLE | FLETCHER, SUMMED, 0, "has 2 of 1,800 bytes"),
        (GZIP | SHUFFLE | FLETCHER, SUMMED, 2, "bytes for 1,800"),
        ({"compression": "lzf"}, bytes(10_000), 0, "has 10,000 bytes"),
    ],
)
@pytest.mark.parametrize("virtual", [False, True])
def test_chunks_of_other_lengths(
    tmp_path: Path, how: dict[str, Any], chunk: bytes, mask: int, text: str, virtual: bool
) -> None:
    """HDF5 2.0 gives what lies behind a chunk in memory, or crashes."""
    path = tmp_path / "set.h5"
    shape = (20, *SHAPE)
    with h5py.File(tmp_path / "part.h5" if virtual else path, "w") as file:
        x = file.create_dataset("x", (ROWS, *SHAPE), "u1", chunks=shape, **how)
        x[...] = 7
        x.id.write_direct_chunk((20, 0, 0, 0), chunk, mask)
    with h5py.File(path, "a") as file:
        file["y"] = np.arange(ROWS) % 3
        if virtual:
            layout = h5py.VirtualLayout((ROWS, *SHAPE), "u1")
            layout[...] = h5py.VirtualSource("part.h5", "x", (ROWS, *SHAPE))
            file.create_virtual_dataset("x", layout)
    for room in (True, False):
        with pytest.raises(DataError, match=text):
            read(path, has_room=lambda size, room=room: room)


@pytest.mark.parametrize("how", [{"scaleoffset": 2, "chunks": (20, *SHAPE)}])
def test_filters_that_do_not_look(tmp_path: Path, how: dict[str, Any]) -> None:
    write(tmp_path / "set.h5", values("<f4"), labels(), **how)
    with pytest.raises(DataError, match="x is packed by scale-offset or n-bit"):
        open_dataset("hdf5", str(tmp_path / "set.h5"))


@pytest.mark.slow
def test_many_chunks_do_not_take_their_square_in_time(tmp_path: Path) -> None:
    path = tmp_path / "set.h5"
    x = np.zeros((10_000, 2), np.uint8)
    write(path, x, np.arange(len(x)) % 3, chunks=(1, 2), compression="gzip")
    before = time.process_time()
    open_dataset("hdf5", str(path)).train.inputs()
    assert time.process_time() - before < 8  # half a second; looking for each chunk among all: half a minute


def test_more_chunks_than_bytes(tmp_path: Path) -> None:
    """HDF5 looks for each of them, which takes hours."""
    path = tmp_path / "set.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("x", (1 << 20, 8), "u1", chunks=(1, 1), compression="gzip")[0, 0] = 1
        file["y"] = np.arange(1 << 10) % 3
    with pytest.raises(DataError, match="x is cut into 8,388,608 chunks"):
        open_dataset("hdf5", str(path))
