"""Import of a folder of images, one sub-folder per class, into an HDF5 data set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np

from nettorrent_mpi.data.images import ImageReader
from nettorrent_mpi.data.importing import TEST, Imported, check_import, held_out, new_data_file
from nettorrent_mpi.plan.errors import DataError, listed

_TRAINING, _TESTING, _VALIDATION = ("train", "training"), ("test", "testing"), ("val", "valid", "validation")
_CLUTTER = ("thumbs.db", "desktop.ini", "__macosx")  # what Windows and macOS leave in folders


class _Image(NamedTuple):
    path: Path
    label: int


class _Notes:
    """Counts what is worth a line, with the first example of each."""

    def __init__(self) -> None:
        self._found: dict[str, list[str]] = {}

    def add(self, what: str, where: Path | str) -> None:
        """Count one more case of `what`."""
        self._found.setdefault(what, []).append(str(where))

    def lines(self) -> tuple[str, ...]:
        return tuple(
            f"{what}: {len(where):,} ({where[0]}{', ...' if len(where) > 1 else ''})"
            for what, where in self._found.items()
        )


def import_folder(
    directory: Path,
    target: Path,
    size: tuple[int, int] | None = None,
    *,
    test: float | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Imported:
    """Write the images of `directory`/CLASS/ into the HDF5 file `target`: x (rows, height, width, channels) uint8, y
    (rows,) the index of the class among the sorted sub-folder names, which the attribute `classes` lists.

        directory: every file below a class has to be an image of 8 bits per channel; names that begin with a dot, and
            what operating systems leave in folders, are ignored. If all are grey there is one channel, otherwise three
            (RGB). A `directory` with train/CLASS/ and test/CLASS/ (or val/) is divided already.
        size: (height, width) to scale to (bilinear); without it all images must have one size.
        test: the fraction of each class, drawn by a fixed seed, that goes to x_test and y_test; by default TEST.
        progress: called as progress(images done, images).

    The file appears complete or not at all: it is written under another name first. Raises DataError (folder or image
    unusable), ConfigError (an argument out of range), OutputError (target exists, cannot be written, Pillow missing).
    """
    check_import(target, test, size, overwrite=overwrite)
    reader, notes = ImageReader(), _Notes()
    classes, train, held = _divided(directory, test, notes)
    if len(classes) == 1:
        text = f"holds one class, {classes[0]}, so there is nothing to tell apart; name the folder of the classes"
        raise DataError(text, file=str(directory))
    shape = _common_shape(reader, [*train, *held], size, notes)
    for what, images in (("training", train), ("test", held)):
        for label in sorted(set(range(len(classes))) - {image.label for image in images}):
            notes.add(f"classes without {what} images", classes[label])
    total, done = len(train) + len(held), 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    with new_data_file(target, classes) as file:
        for images, suffix in ((train, ""), (held, "_test")):
            if images:
                _write(reader, file, images, suffix, shape, step, notes)
    return Imported(len(train), len(held), shape, tuple(classes), notes.lines())


def _divided(directory: Path, test: float | None, notes: _Notes) -> tuple[list[str], list[_Image], list[_Image]]:
    """Return (sorted names of the classes, training images, test images)."""
    if not directory.is_dir():
        raise DataError("no such folder; name the one that holds a sub-folder per class", file=str(directory))
    try:
        given = _given_split(directory)
        if given is None:
            classes, by_class = _by_class([directory], notes)
            return classes, *_drawn(classes, by_class, TEST if test is None else test)
        if test is not None:
            text = "holds train/ and test/, which divide the images already: leave out --test"
            raise DataError(text, file=str(directory))
        train, held = given
        for folder in train[1:]:
            notes.add("folders whose images join the training rows", folder)
        classes, by_class = _by_class(train, notes)
        names, by_test_class = _by_class([held], notes)
    except OSError as error:
        raise DataError(f"cannot be read ({error}); grant access to it", file=str(directory)) from error
    strangers = [name for name in names if name not in classes]
    if strangers:
        text = f"has classes that {train[0]} lacks: {listed(strangers)} (there are {listed(classes)})"
        raise DataError(f"{text}; give both the same classes", file=str(held))
    label = {name: number for number, name in enumerate(classes)}
    named = [(label[name], paths) for name, paths in zip(names, by_test_class, strict=True)]
    images = [_Image(path, number) for number, paths in enumerate(by_class) for path in paths]
    return classes, images, [_Image(path, number) for number, paths in sorted(named) for path in paths]


def _drawn(classes: Sequence[str], by_class: Sequence[list[Path]], test: float) -> tuple[list[_Image], list[_Image]]:
    """Draw the fraction `test` of each class."""
    train: list[_Image] = []
    held: list[_Image] = []
    for label, (name, paths) in enumerate(zip(classes, by_class, strict=True)):
        chosen = held_out(name, len(paths), test)
        for index, path in enumerate(paths):
            (held if index in chosen else train).append(_Image(path, label))
    return train, held


def _given_split(directory: Path) -> tuple[list[Path], Path] | None:
    """Return the folders of training images and the one of test images, where the sub-folders are named like that and
    hold sub-folders themselves; otherwise they are classes."""
    folders = {path.name.lower(): path for path in _visible(directory) if path.is_dir()}
    by_part = [[folders[name] for name in names if name in folders] for names in (_TRAINING, _TESTING, _VALIDATION)]
    train, test, validation = by_part
    apart = len(train) == 1 and test + validation and sum(map(len, by_part)) == len(folders)
    if not apart or not all(any(path.is_dir() for path in _visible(folder)) for folder in folders.values()):
        return None
    return (train + validation, test[0]) if test else (train, validation[0])


def _by_class(directories: Sequence[Path], notes: _Notes) -> tuple[list[str], list[list[Path]]]:
    """Return (sorted names of the classes, the sorted images of each) of folders with the same classes."""
    found: dict[str, list[Path]] = {}
    for directory in directories:
        for path in _visible(directory):
            if path.is_dir():
                # A name in another encoding than the system's becomes readable text.
                name = path.name.encode(errors="surrogateescape").decode(errors="backslashreplace")
                images = list(_images(path, notes, frozenset()))
                if not images:
                    raise DataError("holds no images; fill or remove this class", file=str(path))
                found.setdefault(name, []).extend(images)
            else:
                notes.add("files left out beside the folders of the classes", path)
    if not found:
        raise DataError("holds no sub-folders; put the images of each class into one", file=str(directories[0]))
    numbers = all(name.isdecimal() for name in found)
    names = sorted(found, key=(lambda name: (int(name), name)) if numbers else None)
    return names, [found[name] for name in names]


def _images(folder: Path, notes: _Notes, above: frozenset[Path], deep: bool = False) -> Iterator[Path]:
    """Yield the files below a class's folder, in the order of their names."""
    above |= {folder.resolve()}
    for path in _visible(folder):
        if path.is_dir():
            if path.resolve() in above:
                notes.add("links left out that lead to a folder above", path)
            else:
                yield from _images(path, notes, above, deep=True)
        elif path.is_file():
            if deep:
                notes.add("images in folders inside their class", path)
            yield path
        else:
            what = "links left out that lead nowhere" if path.is_symlink() else "entries left out that are no files"
            notes.add(what, path)


def _visible(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if not p.name.startswith(".") and p.name.lower() not in _CLUTTER)


def _common_shape(
    reader: ImageReader, images: Sequence[_Image], size: tuple[int, int] | None, notes: _Notes
) -> tuple[int, int, int]:
    """Return the shape of a row; reads the headers of all images, so that errors occur before anything is written."""
    channels = 1
    first: tuple[int, int] | None = None
    for path, _ in images:
        found = reader.facts(path)
        height, width = found.height, found.width
        channels = channels if found.grey else 3
        first = first or (height, width)
        if size is None and (height, width) != first:
            where = f"{images[0].path} is {first[0]} x {first[1]}"
            text = f"is {height} x {width}, but {where}; give a --size, HEIGHTxWIDTH, to scale all to"
            raise DataError(text, file=str(path))
        if size is not None and height * size[1] != width * size[0]:
            notes.add(f"images stretched to {size[0]} x {size[1]} from another shape", path)
        if found.turned:
            notes.add("images turned upright, as their EXIF orientation says", path)
        if found.frames > 1:
            notes.add("images of which only the first frame is taken", path)
    assert first is not None
    return (*(size or first), channels)


def _write(
    reader: ImageReader,
    file: h5py.File,
    images: list[_Image],
    suffix: str,
    shape: tuple[int, int, int],
    step: Callable[[], None],
    notes: _Notes,
) -> None:
    # Contiguous and unfiltered, so that the reader can map it into memory; early, so that its place is known.
    rows = file.create_dataset(f"x{suffix}", (len(images), *shape), np.uint8)
    file.create_dataset(f"y{suffix}", data=np.array([image.label for image in images], np.int64))
    for row, (path, _) in enumerate(images):
        rows[row], transparent = reader.pixels(path, shape)
        if transparent:
            notes.add("transparent images laid over white", path)
        step()
