"""Data sets are opened by their names.

    mnist, fashion_mnist   ROOT/mnist, ROOT/fashion_mnist: IDX files, 28 x 28 x 1, 10 classes
    letters                ROOT/letters: EMNIST letters, IDX files, 28 x 28 x 1, 26 classes (stored as 1..26)
    emnist_balanced, emnist_byclass, emnist_bymerge, emnist_digits, emnist_mnist
                           ROOT/emnist: IDX files, 28 x 28 x 1; 47, 62, 47, 10 and 10 classes
    cifar10                ROOT/cifar-10-batches-bin: binary version, 32 x 32 x 3, 10 classes
    cifar100, cifar100_coarse
                           ROOT/cifar-100-binary: binary version, 32 x 32 x 3, 100 classes in 20 superclasses
    digits                 in the package (see digits/README.md): 8 x 8 x 1, 10 classes
    hdf5                   ROOT is the file: see hdf5.py
    synthetic              generated from a seed: see synthetic.py

`register_dataset` adds others; plan/data_specs.py says what a configuration may contain for each. Opening is cheap
(headers and sizes of files) and detects most errors early, alike on every rank; the values are read by the ranks that
need them. Nothing here reads pickled data.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NoReturn, TypeAlias

from nettorrent_mpi.data import cifar
from nettorrent_mpi.data.idx import IdxFile, open_idx
from nettorrent_mpi.data.rows import Dataset, Split
from nettorrent_mpi.data.scaling import UNIT, Scaling
from nettorrent_mpi.data.synthetic import SyntheticRows
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.plan.data_specs import DATASETS, EMNIST, OWN_OPTIONS, SYNTHETIC, DatasetSpec
from nettorrent_mpi.plan.errors import ConfigError, DataError
from nettorrent_mpi.plan.records import dataclass

_DIGITS, _LETTERS = "0123456789", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_CLOTHES = ("T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


@dataclass(frozen=True)
class DataOptions:
    """The options of `data:` in a configuration that concern the data set itself.

    mean, std: values x become (x - mean) / std after they were scaled to 0..1 (floating-point data are not scaled):
        one number, or one for each channel.
    transposed (letters, emnist_...): the images are stored column by column, as in the publisher's EMNIST files; set it
        to get upright letters. Files that are upright already need it false.
    rows, test_rows, shape, classes (synthetic): by default 10,000 and 1,000 rows of shape (28, 28, 1) in 10 classes.
    seed: the run's, for generated data.
    """

    mean: float | Sequence[float] | None = None
    std: float | Sequence[float] | None = None
    transposed: bool = False
    rows: int | None = None
    test_rows: int | None = None
    shape: Sequence[int] | None = None
    classes: int | None = None
    seed: int = 0


Opener: TypeAlias = Callable[[str | None, DataOptions], Dataset]
"""opener(root, options) opens a data set: every rank calls it and gets the same. Raises DataError and ConfigError."""


def open_dataset(name: str, root: str | None, *, options: DataOptions | None = None, planning: bool = False) -> Dataset:
    """Open data set `name` under the folder (for hdf5: the file) `root`; digits and synthetic need none.

    The configuration has checked that there is such a data set, with this root and these options. Raises DataError for
    files that are missing, truncated or of the wrong kind, as far as headers and sizes show. For `planning`, the
    published size stands in for files that are missing (`Dataset.missing`).
    """
    options = options or DataOptions()
    try:
        return replace(_OPENERS[name](root, options), name=name)
    except DataError as error:
        published = DATASETS[name].published
        if not planning or published is None or error.file is None or os.path.exists(error.file):
            raise
        missing, shape = error, published.shape
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror or error})", file=str(error.filename or root)) from error

    def fail(*_: Array) -> NoReturn:
        raise missing

    def split(rows: int) -> Split:
        return Split.of_bytes(rows, shape, Scaling(shape, UNIT, options.mean, options.std), fail, fail)

    train, test = split(published.rows), split(published.test_rows)
    return Dataset(name, shape, published.classes, train, test, missing=missing)


def register_dataset(name: str, *, needs_root: bool = False, options: Sequence[str] = ()) -> Callable[[Opener], Opener]:
    """Let configurations name a custom data set: a decorator of the function that opens it.

        @nt.register_dataset("mine")
        def open_mine(root: str | None, options: nt.DataOptions) -> nt.Dataset:
            with np.load(f"{root}/mine.npz") as file:
                return nt.from_arrays(file["x"], file["y"], mean=options.mean, std=options.std)

    and then `data: {name: mine, root: ...}`. Every rank registers it before the configuration is read, and calls the
    function. `needs_root`: `data.root` is required. `options`: those of `transposed`, `rows`, `test_rows`, `shape` and
    `classes` that the function uses; any other in the configuration is an error. Registering a custom name again
    replaces it. Raises ConfigError for the name of a data set of the package, and for unknown options.
    """
    unknown = [option for option in options if option not in OWN_OPTIONS]
    if unknown:
        raise ConfigError(f"data set {name}: no such option {unknown[0]!r}; there are {', '.join(OWN_OPTIONS)}")
    if name in _BUILT_IN:
        raise ConfigError(f"data set {name} comes with the package; choose another name for yours", key="data.name")

    def register(opener: Opener) -> Opener:
        DATASETS[name] = DatasetSpec(f"what {name} is read from", needs_root, tuple(options))
        _OPENERS[name] = opener
        return opener

    return register


def _open_digits(root: str | None, options: DataOptions) -> Dataset:
    folder = Path(__file__).parent / "digits"
    return _open_idx_files(folder, ("train", "test"), _DIGITS, 0, 1.0 / 16.0, options, "install the package again")


def _open_mnist(name: str, root: str | None, options: DataOptions) -> Dataset:
    names = _CLOTHES if name == "fashion_mnist" else _DIGITS
    return _open_idx_files(_folder(root, name), ("train", "t10k"), names, 0, UNIT, options, _remedy(name, name))


def _open_letters(root: str | None, options: DataOptions) -> Dataset:
    prefixes = ("emnist-letters-train", "emnist-letters-test")
    remedy = _remedy("letters", "letters")
    return _open_idx_files(_folder(root, "letters"), prefixes, _LETTERS, 1, UNIT, options, remedy)


def _open_emnist(part: str, root: str | None, options: DataOptions) -> Dataset:
    """Open a part of EMNIST other than the letters (G. Cohen et al., EMNIST: an extension of MNIST to handwritten
    letters, 2017). Its files have the classes in the order of their characters' ASCII codes, from 0 on."""
    name, merged = f"emnist_{part}", part in ("balanced", "bymerge")  # c, i, j, ... join their capitals
    small = "abdefghnqrt" if merged else _LETTERS.lower()
    names = _DIGITS if part in ("digits", "mnist") else _DIGITS + _LETTERS + small
    prefixes = (f"emnist-{part}-train", f"emnist-{part}-test")
    return _open_idx_files(_folder(root, "emnist"), prefixes, names, 0, UNIT, options, _remedy(name, "emnist"))


def _folder(root: str | None, name: str) -> Path:
    return _path(root) / name


def _path(root: str | None) -> Path:
    assert root is not None
    try:
        return Path(root).expanduser()
    except RuntimeError:
        raise ConfigError(f"{root}: this machine knows no such user's folder", key="data.root") from None


def _remedy(name: str, folder: str) -> str:
    return f"run `nettorrent data fetch {name}` or set data.root to the folder that holds {folder}/"


def _open_idx_files(
    folder: Path,
    prefixes: tuple[str, str],
    names: Sequence[str],
    first: int,
    unit: float,
    options: DataOptions,
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
        fill = partial(_read_images, images, options.transposed)
        return Split.of_bytes(rows, shape, scaling, fill, partial(labels.labels, len(names), first))

    train, test = split(prefixes[0]), split(prefixes[1])
    if train.shape != test.shape:
        raise DataError(f"test images are {test.shape}, training images {train.shape}; {remedy}", file=str(folder))
    return Dataset("", train.shape, len(names), train, test, class_names=tuple(names))


def _read_images(images: IdxFile, transposed: bool, out: Array) -> None:
    images.read(out)
    if transposed:
        for first in range(0, len(out), 1024):  # in blocks, so that the copy stays small
            block = out[first : first + 1024]
            block[...] = block.transpose(0, 2, 1, 3).copy()


def _open_cifar10(root: str | None, options: DataOptions) -> Dataset:
    files = ([f"data_batch_{number}.bin" for number in range(1, 6)], ["test_batch.bin"])
    return _open_cifar("cifar10", "cifar-10-batches-bin", files, cifar.CLASSES, 1, 0, root, options)


def _open_cifar100(name: str, root: str | None, options: DataOptions) -> Dataset:
    which, names = (0, cifar.COARSE) if name == "cifar100_coarse" else (1, cifar.FINE)
    return _open_cifar(name, "cifar-100-binary", (["train.bin"], ["test.bin"]), names, 2, which, root, options)


def _open_cifar(
    name: str,
    inside: str,
    files: tuple[Sequence[str], Sequence[str]],
    names: tuple[str, ...],
    labels_each: int,
    which: int,
    root: str | None,
    options: DataOptions,
) -> Dataset:
    remedy, folder = _remedy(name, inside), _folder(root, inside)
    scaling = Scaling(cifar.SHAPE, UNIT, options.mean, options.std)

    def split(file_names: Sequence[str]) -> Split:
        paths = [folder / file_name for file_name in file_names]
        read = cifar.CifarFiles(paths, remedy, len(names), labels_each, which)
        return Split.of_bytes(read.rows, cifar.SHAPE, scaling, read.images, read.labels)

    return Dataset("", cifar.SHAPE, len(names), split(files[0]), split(files[1]), class_names=names)


def _open_hdf5(root: str | None, options: DataOptions) -> Dataset:
    from nettorrent_mpi.data.hdf5 import open_hdf5  # loads h5py, which no other data set needs

    return open_hdf5(_path(root), options.mean, options.std)


def _open_synthetic(root: str | None, options: DataOptions) -> Dataset:
    given = SYNTHETIC | {name: value for name, value in vars(options).items() if value is not None}
    rows, test_rows, shape, classes = given["rows"], given["test_rows"], tuple(given["shape"]), given["classes"]
    scaling = Scaling(shape, UNIT, options.mean, options.std)

    def split(part: str, count: int) -> Split:
        made = SyntheticRows(options.seed, part, count, shape, classes)
        return Split.of_bytes(count, shape, scaling, made.fill, made.labels)

    return Dataset("", shape, classes, split("train", rows), split("test", test_rows) if test_rows else None)


_OPENERS: dict[str, Opener] = {
    "digits": _open_digits,
    "mnist": partial(_open_mnist, "mnist"),
    "fashion_mnist": partial(_open_mnist, "fashion_mnist"),
    "letters": _open_letters,
    **{f"emnist_{part}": partial(_open_emnist, part) for part in EMNIST},
    "cifar10": _open_cifar10,
    **{name: partial(_open_cifar100, name) for name in ("cifar100", "cifar100_coarse")},
    "hdf5": _open_hdf5,
    "synthetic": _open_synthetic,
}
_BUILT_IN = frozenset(_OPENERS)
