"""Import of a folder of images, one sub-folder per class, into an HDF5 data set.

It needs Pillow (the extra `images`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import h5py
import numpy as np

from nettorrent_mpi.data.files import replacing
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.random import generator
from nettorrent_mpi.plan.errors import ConfigError, DataError, OutputError

_GREY, _COLOUR = ("1", "L"), ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")


class Imported(NamedTuple):
    """The result of `import_folder`."""

    rows: int
    test_rows: int
    shape: tuple[int, int, int]
    classes: tuple[str, ...]


class _Image(NamedTuple):
    path: Path
    label: int


def import_folder(
    directory: Path,
    target: Path,
    size: tuple[int, int] | None = None,
    *,
    test: float = 0.0,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Imported:
    """Write the images of `directory`/CLASS/ into the HDF5 file `target`: x (rows, height, width, channels) uint8, y
    (rows,) the index of the class among the sorted sub-folder names, which the attribute `classes` lists.

        directory: files and folders whose names begin with a dot are ignored; every other file in a class has to be an
            image of 8 bits per channel. If all are grey there is one channel, otherwise three (RGB).
        size: (height, width) to scale to (bilinear); without it all images must have one size.
        test: the fraction of each class, drawn by `seed`, that goes to x_test and y_test.
        progress: called as progress(images done, images).

    The file appears complete or not at all: it is written under another name first. Raises DataError (folder or image
    unusable), ConfigError (an argument out of range), OutputError (target exists, cannot be written, Pillow missing).
    """
    if not 0.0 <= test < 1.0:
        raise ConfigError(f"the fraction of test images is at least 0 and below 1, not {test}")
    if size is not None and min(size) < 1:
        raise ConfigError(f"the size of the images is at least 1 x 1, not {size[0]} x {size[1]}")
    if target.exists() and not overwrite:
        raise OutputError(f"{target} exists; give another name or allow it to be overwritten")
    pillow = _pillow()
    classes, by_class = _list(directory)
    train: list[_Image] = []
    held: list[_Image] = []
    for name, images in zip(classes, by_class, strict=True):
        order = generator(0, "import", name).permutation(len(images))
        chosen = set(order[: round(len(images) * test)].tolist())
        for index, image in enumerate(images):
            (held if index in chosen else train).append(image)
    shape = _common_shape(pillow, [image for images in by_class for image in images], size)

    total, done = len(train) + len(held), 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    try:
        with replacing(target) as part, h5py.File(part, "w") as file:
            file.attrs["classes"] = classes
            for images, suffix in ((train, ""), (held, "_test")):
                if images:
                    _write(pillow, file, images, suffix, shape, step)
    except OSError as error:
        raise OutputError(f"cannot write {target} ({error}); free space or choose another place") from error
    return Imported(len(train), len(held), shape, tuple(classes))


def _pillow() -> ModuleType:
    try:
        from PIL import Image
    except ImportError as error:
        text = "reading images needs Pillow; install it with the extra `images`: pip install 'nettorrent_mpi[images]'"
        raise OutputError(text) from error
    return Image


def _list(directory: Path) -> tuple[list[str], list[list[_Image]]]:
    """Return (sorted names of the classes, the sorted images of each)."""
    if not directory.is_dir():
        raise DataError("no such folder; name the one that holds a sub-folder per class", file=str(directory))
    try:
        folders = sorted(path for path in directory.iterdir() if path.is_dir() and not path.name.startswith("."))
        if not folders:
            raise DataError("holds no sub-folders; put the images of each class into one", file=str(directory))
        by_class = []
        for label, folder in enumerate(folders):
            files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
            if not files:
                raise DataError("holds no images; fill or remove this class", file=str(folder))
            by_class.append([_Image(path, label) for path in files])
    except OSError as error:
        raise DataError(f"cannot be read ({error}); grant access to it", file=str(directory)) from error
    return [folder.name for folder in folders], by_class


def _common_shape(pillow: ModuleType, images: list[_Image], size: tuple[int, int] | None) -> tuple[int, int, int]:
    """Return the shape of a row; reads the headers of all images, so that errors occur before anything is written."""
    channels = 1
    first: tuple[int, int] | None = None
    for path, _ in images:
        with _readable(path), pillow.open(path) as image:
            (width, height), mode = image.size, image.mode
        if mode not in _COLOUR:
            text = f"has pixels of kind {mode}, not 8 bits per channel; convert or remove it"
            raise DataError(text, file=str(path))
        channels = channels if mode in _GREY else 3
        first = first or (height, width)
        if size is None and (height, width) != first:
            text = (
                f"is {height} x {width}, but {images[0].path} is {first[0]} x {first[1]}; give a size to scale all to"
            )
            raise DataError(text, file=str(path))
    assert first is not None
    return (*(size or first), channels)


def _write(
    pillow: ModuleType,
    file: h5py.File,
    images: list[_Image],
    suffix: str,
    shape: tuple[int, int, int],
    step: Callable[[], None],
) -> None:
    # Contiguous and unfiltered, so that the reader can map it into memory; early, so that its place is known.
    rows = file.create_dataset(f"x{suffix}", (len(images), *shape), np.uint8)
    file.create_dataset(f"y{suffix}", data=np.array([image.label for image in images], np.int64))
    for row, (path, _) in enumerate(images):
        rows[row] = _pixels(pillow, path, shape)
        step()


def _pixels(pillow: ModuleType, path: Path, shape: tuple[int, int, int]) -> Array:
    height, width, channels = shape
    with _readable(path), pillow.open(path) as image:
        converted = image.convert("L" if channels == 1 else "RGB")
        if converted.size != (width, height):
            converted = converted.resize((width, height), pillow.Resampling.BILINEAR)
        return np.asarray(converted, np.uint8).reshape(shape)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn whatever Pillow raises for a broken image into a DataError that names it."""
    try:
        yield
    except Exception as error:
        raise DataError(f"cannot be read as an image ({error}); remove or replace it", file=str(path)) from error
