"""Opening a data set by its name.

    mnist, fashion_mnist   ROOT/mnist, ROOT/fashion_mnist: IDX files, 28 x 28 x 1, 10 classes
    letters                ROOT/letters: EMNIST letters, IDX files, 28 x 28 x 1, 26 classes (stored as 1..26)
    cifar10                ROOT/cifar-10-batches-bin: binary version, 32 x 32 x 3, 10 classes
    digits                 in the package (see digits/README.md): 8 x 8 x 1, 10 classes
    hdf5                   ROOT is the file: see hdf5.py
    synthetic              made from a seed: see synthetic.py

Opening is cheap (headers and sizes of files) and finds what can be found early, equally on every rank; the values are
read by the ranks that need them. Nothing here reads pickled data.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nettorrent_mpi.data.augment import Augment
from nettorrent_mpi.data.cifar import CLASSES as CIFAR_CLASSES
from nettorrent_mpi.data.cifar import SHAPE as CIFAR_SHAPE
from nettorrent_mpi.data.cifar import CifarFiles
from nettorrent_mpi.data.idx import IdxFile, open_idx
from nettorrent_mpi.data.rows import Allocate, Array, Inputs, Memory, Scaling, Shape, Split, private
from nettorrent_mpi.data.synthetic import SyntheticRows
from nettorrent_mpi.plan.errors import ConfigError, DataError

if TYPE_CHECKING:
    from nettorrent_mpi.data.hdf5 import Hdf5Split

__all__ = ["Allocate", "Augment", "Dataset", "Inputs", "Options", "Split", "names", "open_dataset", "private"]

_BYTE = np.dtype(np.uint8)
_UNIT = 1.0 / 255.0  # bytes become 0..1


@dataclass(frozen=True)
class Options:
    """Options of `data:` in the configuration that concern the data set itself.

    mean, std: subtracted from and divided into the values after these were scaled to 0..1 (floating HDF5 data are taken
        as they are): one number, or one for each channel.
    transposed (letters): the images are stored column by column. The publisher's EMNIST files are; set it to see the
        letters upright. Files that were put upright already need it false.
    rows, test_rows, shape, classes, seed (synthetic): 10,000 and 1,000 rows of shape (28, 28, 1) in 10 classes, from
        seed 0, unless told.
    """

    mean: float | Sequence[float] | None = None
    std: float | Sequence[float] | None = None
    transposed: bool = False
    rows: int | None = None
    test_rows: int | None = None
    shape: Sequence[int] | None = None
    classes: int | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Dataset:
    """An opened data set. `shape` is that of one row; `classes` is None where the targets are not labels."""

    name: str
    shape: Shape
    classes: int | None
    train: Split
    test: Split | None


def open_dataset(name: str, root: str | None, *, options: Options | None = None) -> Dataset:
    """Opens data set `name` under the folder (for hdf5: the file) `root`; digits and synthetic need none.

    Raises ConfigError for an unknown name, a missing root and options that this data set does not have; DataError for
    files that are missing, truncated or not of the right kind, as far as headers and sizes tell.
    """
    opener = _OPENERS.get(name)
    if opener is None:
        near = difflib.get_close_matches(name, _OPENERS, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"unknown data set {name!r}; {hint}there are {', '.join(_OPENERS)}", key="data.name")
    options = options or Options()
    allowed = {"mean", "std", *_OWN_OPTIONS.get(name, ())}
    for option in fields(options):
        if option.name not in allowed and getattr(options, option.name) != option.default:
            owners = ", ".join(owner for owner, own in _OWN_OPTIONS.items() if option.name in own)
            raise ConfigError(f"data set {name} has no such option (only {owners})", key=f"data.{option.name}")
    if name in _WITHOUT_ROOT:
        return opener(name, Path(), options)
    if not root:
        what = "an HDF5 file" if name == "hdf5" else f"the folder that holds {_FOLDERS[name]}/"
        raise ConfigError(f"data set {name} needs it: {what}", key="data.root")
    return opener(name, Path(root).expanduser(), options)


def names() -> tuple[str, ...]:
    """All names that open_dataset knows."""
    return tuple(_OPENERS)


def _open_idx_set(name: str, root: Path, options: Options) -> Dataset:
    remedy = f"run `nettorrent data fetch {name}` or set data.root to the folder that holds {_FOLDERS[name]}/"
    prefixes = ("emnist-letters-train", "emnist-letters-test") if name == "letters" else ("train", "t10k")
    classes, first = (26, 1) if name == "letters" else (10, 0)
    return _idx_dataset(name, root / _FOLDERS[name], prefixes, classes, first, _UNIT, options, remedy)


def _open_digits(name: str, root: Path, options: Options) -> Dataset:
    folder = Path(__file__).parent / "digits"
    remedy = "install the package again"
    return _idx_dataset(name, folder, ("train", "test"), 10, 0, 1.0 / 16.0, options, remedy)


def _idx_dataset(
    name: str,
    folder: Path,
    prefixes: tuple[str, str],
    classes: int,
    first: int,
    unit: float,
    options: Options,
    remedy: str,
) -> Dataset:
    def split(prefix: str) -> Split:
        images = open_idx(folder, f"{prefix}-images-idx3-ubyte", 3, remedy)
        labels = open_idx(folder, f"{prefix}-labels-idx1-ubyte", 1, remedy)
        rows, height, width = images.shape
        if labels.shape != (rows,):
            text = f"has {labels.shape[0]} labels, but {images.path.name} has {rows} images; {remedy}"
            raise DataError(text, file=str(labels.path), offset=4)
        if options.transposed and height != width:
            raise ConfigError(f"images of {height} x {width} cannot be transposed in place", key="data.transposed")
        shape = (height, width, 1)
        scaling = Scaling(shape, unit, options.mean, options.std)

        def open_rows(allocate: Allocate) -> Memory:
            return Memory(allocate((rows, *shape), _BYTE, lambda out: _read_images(images, options.transposed, out)))

        return Split(rows, shape, _BYTE, scaling, open_rows, lambda: labels.labels(classes, first))

    train, test = split(prefixes[0]), split(prefixes[1])
    if train.shape != test.shape:
        raise DataError(f"test images are {test.shape}, training images {train.shape}; {remedy}", file=str(folder))
    return Dataset(name, train.shape, classes, train, test)


def _read_images(images: IdxFile, transposed: bool, out: Array) -> None:
    images.read(out)
    if transposed:
        for first in range(0, len(out), 1024):  # in blocks, so that the copy that it takes stays small
            block = out[first : first + 1024]
            block[...] = block.transpose(0, 2, 1, 3).copy()


def _open_cifar10(name: str, root: Path, options: Options) -> Dataset:
    remedy = f"run `nettorrent data fetch {name}` or set data.root to the folder that holds {_FOLDERS[name]}/"
    folder = root / _FOLDERS[name]
    scaling = Scaling(CIFAR_SHAPE, _UNIT, options.mean, options.std)

    def split(file_names: Sequence[str]) -> Split:
        files = CifarFiles([folder / file_name for file_name in file_names], remedy)

        def open_rows(allocate: Allocate) -> Memory:
            return Memory(allocate((files.rows, *CIFAR_SHAPE), _BYTE, files.images))

        return Split(files.rows, CIFAR_SHAPE, _BYTE, scaling, open_rows, files.labels)

    train = split([f"data_batch_{number}.bin" for number in range(1, 6)])
    return Dataset(name, CIFAR_SHAPE, CIFAR_CLASSES, train, split(["test_batch.bin"]))


def _open_hdf5(name: str, root: Path, options: Options) -> Dataset:
    from nettorrent_mpi.data.hdf5 import open_hdf5  # loads h5py, which no other data set needs

    train, test, classes = open_hdf5(root)
    unit = _UNIT if train.dtype == np.uint8 else 1.0
    scaling = Scaling(train.shape, unit, options.mean, options.std)

    def split(part: Hdf5Split) -> Split:
        # The rows stay in the file, so there is nothing to allocate.
        return Split(
            part.rows, part.shape, part.dtype, scaling, lambda allocate: part.open_rows(), lambda: part.targets(classes)
        )

    return Dataset(name, train.shape, classes, split(train), split(test) if test else None)


def _open_synthetic(name: str, root: Path, options: Options) -> Dataset:
    shape = tuple(options.shape) if options.shape is not None else (28, 28, 1)
    classes = 10 if options.classes is None else options.classes
    rows = 10_000 if options.rows is None else options.rows
    test_rows = 1_000 if options.test_rows is None else options.test_rows
    for option, value, least in (("rows", rows, 1), ("test_rows", test_rows, 0), ("classes", classes, 1)):
        if value < least:
            raise ConfigError(f"at least {least}, not {value}", key=f"data.{option}")
    if not shape or min(shape) < 1:
        raise ConfigError(f"dimensions of at least 1, like [28, 28, 1] or [64], not {list(shape)}", key="data.shape")
    scaling = Scaling(shape, _UNIT, options.mean, options.std)

    def split(part: str, count: int) -> Split:
        made = SyntheticRows(options.seed or 0, part, count, shape, classes)

        def open_rows(allocate: Allocate) -> Memory:
            return Memory(allocate((count, *shape), _BYTE, made.fill))

        return Split(count, shape, _BYTE, scaling, open_rows, made.labels)

    return Dataset(name, shape, classes, split("train", rows), split("test", test_rows) if test_rows else None)


_OPENERS: dict[str, Callable[[str, Path, Options], Dataset]] = {
    "digits": _open_digits,
    "mnist": _open_idx_set,
    "fashion_mnist": _open_idx_set,
    "letters": _open_idx_set,
    "cifar10": _open_cifar10,
    "hdf5": _open_hdf5,
    "synthetic": _open_synthetic,
}
_FOLDERS = {
    "mnist": "mnist",
    "fashion_mnist": "fashion_mnist",
    "letters": "letters",
    "cifar10": "cifar-10-batches-bin",
}
_WITHOUT_ROOT = ("digits", "synthetic")
_OWN_OPTIONS = {
    "letters": ("transposed",),
    "synthetic": ("rows", "test_rows", "shape", "classes", "seed"),
}
