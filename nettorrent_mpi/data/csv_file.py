"""Import of tables in text: a row in a line, values separated by commas, semicolons or tabs, one of them the label."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from nettorrent_mpi.data.files import opening
from nettorrent_mpi.data.importing import Imported, Size, check_import, write_rows
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.plan.errors import ConfigError, DataError, listed

ENDINGS = (".csv", ".tsv", ".txt")
USUAL = ("label", "labels", "class", "target", "y", "species", "digit")  # names of columns of labels, unless told
_SEPARATORS = (",", ";", "\t")
_BLOCK = 512  # lines that are converted at once
_REMEDY = "give a text file of rows"
csv.field_size_limit(1 << 20)


class _Table:
    """A _Table is read from a file: `x` (rows, features) float32, and the texts of the labels."""

    def __init__(self, path: Path, label: str | None, header: bool | None):
        self._path = path
        lines = self._lines()
        first = next(lines, None)
        if first is None:
            raise DataError(f"is empty; {_REMEDY}", file=str(path))
        line, words = first
        self.width = len(words)
        if self.width < 2:
            raise DataError("line 1 has one column; separate columns by a comma, a semicolon or a tab", file=str(path))
        self.names: list[str] | None = None
        given = header if header is not None else not any(_is_number(word) for word in words)
        if given:
            self.names = [word.strip() for word in words]
        self._label = self._find_label(label, words)
        self.labels: list[str] = []
        blocks: list[Array] = []
        some: list[tuple[int, list[str]]] = [] if given else [(line, words)]
        for numbered in lines:
            some.append(numbered)
            if len(some) == _BLOCK:
                blocks.append(self._converted(some))
                some = []
        if some:
            blocks.append(self._converted(some))
        if not blocks:
            raise DataError("has a header and no rows", file=str(path))
        self.x = np.concatenate(blocks)

    def _lines(self) -> Iterator[tuple[int, list[str]]]:
        """Yield the words of each line that has any, with its number."""
        try:
            with opening(self._path, _REMEDY) as file:
                text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
                first = text.readline()
                text.seek(0)
                separator = max(_SEPARATORS, key=first.count)
                reader = csv.reader(text, delimiter=separator, strict=True, skipinitialspace=True)
                for words in reader:
                    if words:
                        yield reader.line_num, words
        except UnicodeDecodeError as error:
            raise DataError(f"is no text in UTF-8 ({error.reason}); convert it", file=str(self._path)) from None
        except csv.Error as error:
            line = reader.line_num
            raise DataError(f"line {line} cannot be read ({error}); correct it", file=str(self._path)) from None

    def _find_label(self, asked: str | None, first: Sequence[str]) -> int:
        """Return the number of the column of labels, from 0 on."""
        if self.names is not None:
            wanted = [asked] if asked is not None else list(USUAL)
            known = [name.lower() for name in self.names]
            for name in wanted:
                if name in self.names or name.lower() in known:
                    return self.names.index(name) if name in self.names else known.index(name.lower())
        columns = f"there are {listed(self.names)}" if self.names else f"columns count from 1 to {self.width}"
        if asked is None:
            raise ConfigError(
                f"--label NAME or NUMBER has to say which column of {self._path} has the labels; {columns}"
            )
        number = int(asked) if asked.lstrip("-").isdecimal() else 0
        if not 1 <= abs(number) <= self.width:
            raise ConfigError(f"--label {asked}: {self._path} has no such column; {columns}; -1 is the last one")
        return number - 1 if number > 0 else self.width + number

    def _converted(self, lines: Sequence[tuple[int, list[str]]]) -> Array:
        """Convert some lines, and keep their labels."""
        for line, words in lines:
            if len(words) != self.width:
                text = f"line {line} has {len(words)} columns, and the first one {self.width}; correct it"
                raise DataError(text, file=str(self._path))
            label = words.pop(self._label).strip()
            if not label:
                raise DataError(f"line {line} has no label; add it, or remove the line", file=str(self._path))
            self.labels.append(label)
        try:
            values = np.array([words for _, words in lines], np.float64)
            if np.isfinite(values).all() and (np.abs(values) < np.finfo(np.float32).max).all():
                return values.astype(np.float32)
        except ValueError:
            pass
        raise self._wrong(lines)

    def _wrong(self, lines: Sequence[tuple[int, list[str]]]) -> DataError:
        """Return the error that tells of the first value that is no number."""
        for line, words in lines:
            for at, word in enumerate(words):
                if not _is_number(word):
                    number = at + (at >= self._label)
                    column = self.names[number] if self.names is not None else f"column {number + 1}"
                    what = f"{word.strip()[:40]!r} is no finite number" if word.strip() else "there is no value"
                    text = f"line {line}, {column}: {what}; write numbers in all columns but the label's"
                    return DataError(text, file=str(self._path))
        return DataError("has values that are no numbers", file=str(self._path))


def import_csv(
    source: Path,
    target: Path,
    size: Size | None = None,
    *,
    test: float | Path | None = None,
    label: str | None = None,
    header: bool | None = None,
    overwrite: bool = False,
) -> Imported:
    """Write the rows of a table into the HDF5 file `target`: x (rows, features), y (rows,) the number of the class.

        source: text in UTF-8; the first line may name the columns (`header`: whether it does; None: if none of its
            words is a number).
        label: the name of the column of labels, in upper or lower case, or its number from 1 on, from the end if it is
            negative; None: the one with a name of USUAL. Labels that are numbers and not whole are targets of a
            regression, (rows, 1).
        size: the shape of an image, by which the other columns become one (bytes, where all are 0 to 255).
        test: the fraction of each class that is held out, TEST by default; or another such file with the test rows.

    Raises DataError with file and line, ConfigError (argument out of range), OutputError.
    """
    check_import(target, None if isinstance(test, Path) else test, size, overwrite=overwrite)
    tables = {"": _Table(source, label, header)}
    if isinstance(test, Path):
        tables["_test"] = other = _Table(test, label, header)
        if (other.width, other.names) != (tables[""].width, tables[""].names):
            raise DataError(f"has other columns than {source}; give both the same", file=str(test))
    arrays = {f"x{suffix}": table.x for suffix, table in tables.items()}
    arrays |= _as_targets({f"y{suffix}": table.labels for suffix, table in tables.items()})
    return write_rows(source, target, arrays, size, None if isinstance(test, Path) else test)


def _as_targets(labels: dict[str, list[str]]) -> dict[str, Array]:
    """Convert labels: whole numbers and texts stay classes, other numbers are targets."""
    texts = {name: np.array(each) for name, each in labels.items()}
    every = [word for each in labels.values() for word in each]
    if not all(_is_number(word) for word in every):
        return texts
    numbers = {name: np.array([float(word) for word in each]) for name, each in labels.items()}
    if all((each == np.floor(each)).all() and (np.abs(each) < 1 << 53).all() for each in numbers.values()):
        return {name: each.astype(np.int64) for name, each in numbers.items()}
    return {name: each.astype(np.float32)[:, None] for name, each in numbers.items()}


def _is_number(word: str) -> bool:
    try:
        return abs(float(word)) < float(np.finfo(np.float32).max)
    except ValueError:
        return False
