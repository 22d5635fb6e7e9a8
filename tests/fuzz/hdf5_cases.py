"""HDF5 files that HDF5 itself writes, with types, shapes, filters, links and attributes that no reader expects."""

from __future__ import annotations

import os
import signal
import tempfile
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import h5py
import numpy as np

SECRET = b"SECRET OF ANOTHER FILE " * 9  # what lies beside the case's folder: no file may make its reader read it
OUTSIDE = "../secret"  # holds it; ../secret.h5 has it as x and as parameters/linear1/weight
_TYPES: list[Any] = [
    "u1", "<f4", ">f8", "<f2", "i1", "<i8", ">u4", "u8", "bool", "S5", "V7", "c8", "g", "(2,)f4", "(3000,3000)u1",
    [("a", "i4"), ("b", "f8")], h5py.string_dtype(), h5py.string_dtype("ascii", 3), h5py.vlen_dtype("f4"),
    h5py.ref_dtype, h5py.regionref_dtype, h5py.enum_dtype({"no": 0, "yes": 1}, "i1"), h5py.opaque_dtype("M8[s]"),
]  # fmt: skip
_SIZES = [0, 1, 2, 7, 60, 1 << 20, 1 << 31, 1 << 40, (1 << 62) + 3]
_FILES = [
    "other.h5",
    "fifo",
    "/dev/zero",
    OUTSIDE,
    "../secret.h5",
    "data.h5",
    "missing.h5",
    ".",
    "",
    "link.h5",
    "é\udc80",
]
_FILTERS: list[dict[str, Any]] = [
    {}, {}, {"compression": "gzip"}, {"compression": "lzf"}, {"fletcher32": True}, {"scaleoffset": 0},
    {"shuffle": True, "compression": 9}, {"fillvalue": 7},
]  # fmt: skip
_LABELS: list[Any] = [
    ["a", "b", "c", "d"], ["a"] * 4, [], "abcd", 4, np.zeros((2, 2)), np.bytes_(b"a\0b\xff"), h5py.Empty("S1"),
    ["\x1b[31mred", "b\nc", "d\r", "\u202e"], np.array([b"\xff\xfe", b"b", b"c", b"d"]), [f"n{i}" for i in range(3000)],
    np.array(["x" * 30000] * 2, "S30000"), np.arange(4.0), [True, False], np.array([b"a"] * 4, "V1"),
]  # fmt: skip
_LARGEST = 8 << 20  # bytes of a case
NAMES = ["x", "y", "x_test", "y_test"]


def strange(random: Random, names: list[str]) -> bytes:
    """Make a file in which some of the data sets of these names are strange; nothing where HDF5 fails to.

    HDF5 2.0 crashes at writing some of them, so a process of its own makes it.
    """
    number = random.getrandbits(32)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = Path(folder) / "data.h5"
        process = os.fork()
        if not process:
            signal.alarm(20)  # ends it
            try:
                make_strange(path, Random(number), names)
            finally:
                os._exit(0)
        made = os.waitpid(process, 0)[1] == 0
        return path.read_bytes() if made and path.stat().st_size < _LARGEST else b""


def make_strange(path: Path, random: Random, names: list[str]) -> None:
    """Make the file."""
    version = random.choice(["earliest", "v108", "v110", "latest"])
    with h5py.File(path, "w", libver=(version, "latest"), track_order=random.random() < 0.5) as file:
        for name in names:
            if random.randint(0, 9) or name in ("x", "y"):
                with suppress(Exception):  # HDF5 does not write everything
                    (_plain if random.randint(0, 2) else _strange)(random, file, name)
        for name in ("classes", "model", "data"):
            if random.random() < 0.5:
                with suppress(Exception):
                    file.attrs[name] = random.choice(_LABELS)
        if random.randint(0, 9) == 0:
            file["loop"] = file  # a group that contains itself
            file["a/b/c/d"] = h5py.SoftLink("/a")


def _plain(random: Random, file: h5py.File, name: str) -> None:
    rows = 9 if "test" in name else 60
    numbers = np.random.default_rng(0)
    if name.startswith("y"):
        file[name] = np.arange(rows) % 4
    elif name.startswith("x"):
        file.create_dataset(name, data=numbers.integers(0, 256, (rows, 6, 5, 3), np.uint8), **random.choice(_FILTERS))
    else:
        file[name] = numbers.normal(size=(8, 4) if "weight" in name else 4).astype(np.float32)


def _strange(random: Random, file: h5py.File, name: str) -> None:
    how = random.choice(["array", "array", "sizes", "link", "external", "virtual", "group", "type", "damaged"])
    kind = random.choice(_TYPES)
    named = random.choice(_FILES)
    rows = 9 if "test" in name else 60
    if how == "array":
        shape = random.choice([(), (rows,), (rows, 2), (rows, 0), (0, 3), (rows, 6, 5, 3), (2,) * 32])
        file.create_dataset(name, shape, kind, **(random.choice(_FILTERS) if shape else {}))
        if 0 < np.prod(shape) < 10_000:
            file[name][...] = np.zeros(shape, file[name].dtype)
    elif how == "sizes":
        shape = tuple(random.choices(_SIZES, k=random.randint(1, 4)))
        chunks = tuple(min(max(size, 1), random.choice([1, 64, 65536])) for size in shape)
        options = random.choice(_FILTERS)
        if random.random() < 0.5:
            options = {**options, "chunks": chunks}
        file.create_dataset(name, shape, kind, maxshape=shape if random.random() < 0.5 else None, **options)
        small = np.prod(file[name].chunks or [1 << 40]) < 1 << 20
        if random.random() < 0.5 and small and file[name].dtype.kind in "uif":  # HDF5 2.0 crashes with others
            file[name][(0,) * len(shape)] = np.zeros((), file[name].dtype)[()]
    elif how == "link":
        target = random.choice(["/x", "/y", f"/{name}", "/", "/loop/loop/x", "/far/x", "missing", "a" * 5000])
        outside = h5py.ExternalLink(named, target)
        if random.random() < 0.5:
            file["far"] = h5py.ExternalLink(named, "/")
        file[name] = outside if random.random() < 0.5 else h5py.SoftLink(target)
    elif how == "external":
        sizes = [0, 10, rows * 90, 1 << 40, h5py.h5f.UNLIMITED]
        pieces = [(random.choice(_FILES), random.choice([0, 5, 1 << 40]), random.choice(sizes)) for _ in range(2)]
        shape = random.choice([(rows,), (rows, 90), (rows, 6, 5, 3), (len(SECRET),), (2, len(SECRET) // 2)])
        file.create_dataset(name, shape, kind, external=pieces[: random.randint(1, 2)])
    elif how == "virtual":
        shape = (rows, 6, 5, 3) if name.startswith("x") else (rows,)
        layout = h5py.VirtualLayout(shape, kind)
        for first in range(0, rows, 20):
            source = random.choice([*_FILES, "%b.h5", "%b%s%n", "%%"])
            layout[first : first + 20] = h5py.VirtualSource(
                source, random.choice(["x", "y", name, "/", "far/x", "%b"]), (20, *shape[1:])
            )
        file.create_virtual_dataset(name, layout, fillvalue=random.choice([None, 5]))
    elif how == "group":
        for depth in range(random.choice([1, 3, 200])):
            file.create_group(name + "/g" * depth)
        file[name].attrs["classes"] = "a"
    elif how == "type":
        file[name] = np.dtype(kind)
    else:
        shape = (rows, 6, 5, 3) if name.startswith("x") else (rows,)
        options = random.choice(_FILTERS[2:])
        data = file.create_dataset(name, shape, "u1", chunks=(min(rows, 20), *shape[1:]), **options)
        for first in range(0, rows, 20):
            size = random.choice([0, 1, 50, 5000])
            data.id.write_direct_chunk((first, *(0,) * len(shape[1:])), b"\x78\x9c" + bytes(size), random.randint(0, 3))
