"""The command `nettorrent predict`: what the network of a run takes pictures and rows to be."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nettorrent_mpi.cli.characters import Characters
from nettorrent_mpi.data.handwriting import HANDS, LONGEST, hand_of, ink_of_picture, on_light_paper
from nettorrent_mpi.data.images import ImageReader
from nettorrent_mpi.data.row_files import ENDINGS, open_row_file
from nettorrent_mpi.data.scaling import UNIT
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.engine.trained_network import TrainedNetwork, load
from nettorrent_mpi.plan.errors import ConfigError, DataError, listed, readable, warn

BLOCK = 256  # rows, or pictures, that are answered together
FAILED = DataError.exit_code
NONE = "none"  # the value of --like for pictures that are taken as they are


class _Block(NamedTuple):
    """Rows that are answered together, and the place of each: its file, and its number in a file of rows."""

    places: list[dict[str, Any]]
    x: Array


class _Failure(NamedTuple):
    """A file that cannot be read."""

    file: str
    error: DataError


def predict(run: str, files: Sequence[str], *, top: int, array: str | None, like: str | None, as_json: bool) -> int:
    """Write what the network of RUN takes each picture, and each row of the other files, to be. Returns the exit code:
    FAILED if a file could not be read. Raises UserErrors for all else.

    like: whose preparation pictures get, one of HANDS, or NONE; None: that of the data set that the network was trained
    on.
    """
    if top < 1:
        raise ConfigError(f"--top {top}: it has to be at least 1")
    network, code, separator = load(run), 0, "[\n"
    pictures = Pictures(network, like)
    for block in _blocks(network, pictures, files, array):
        if isinstance(block, _Failure):
            code = FAILED
            sys.stderr.write(f"nettorrent: error: {block.error}\n")
            answers = [{"file": block.file, "error": str(block.error)}]
        else:
            answers = [*_answers(network, block, top)]
        for answer in answers:
            if as_json:
                sys.stdout.write(separator + json.dumps(answer))
                separator = ",\n"
            elif "error" not in answer:
                sys.stdout.write(_line(answer) + "\n")
    if as_json:
        sys.stdout.write("\n]\n" if separator != "[\n" else "[]\n")
    pictures.tell()
    return code


class Pictures:
    """Pictures become rows of a network's data set. `like` is as in `predict`; raises ConfigError and UserError for one
    that does not fit the network."""

    def __init__(self, network: TrainedNetwork, like: str | None = None):
        if like is not None and like not in (*HANDS, NONE):
            raise ConfigError(f"--like {like}: there are {', '.join((*HANDS, NONE))}")
        self._network = network
        self._reader: ImageReader | None = None
        handwriting = like != NONE and (like is not None or hand_of(network.trained_on.name) is not None)
        self._characters = Characters(network, like) if handwriting else None
        self._as_they_are = self._prepared = self._inverted = 0
        self._stretched: list[str] = []

    def row(self, path: Path) -> Array:
        """Return the pixels of a picture (height, width, channels), bytes as in the data set of the network. Raises
        DataError."""
        self._reader = self._reader or ImageReader()
        if self._characters is None:
            pixels, stretched = picture(self._network, self._reader, path)
            self._stretched += [str(path)] if stretched else []
            return pixels
        facts, shape = self._reader.facts(path), self._network.shape
        shrunk = min(1.0, LONGEST / max(facts.height, facts.width))
        height, width = (max(1, round(shrunk * side)) for side in (facts.height, facts.width))
        grey = self._reader.pixels(path, (height, width, 1))[0][..., 0]
        light = on_light_paper(grey)
        if (height, width) == shape[:2] and not light and self._network.trained_on.unit is not None:
            self._as_they_are += 1
            return picture(self._network, self._reader, path)[0]
        character = self._characters.prepared(ink_of_picture(grey))
        if character is None:
            text = f"nothing stands out from its paper; --like {NONE} takes pictures as they are"
            raise DataError(text, file=str(path))
        self._prepared += 1
        self._inverted += light
        return self._characters.row(character)

    def tell(self) -> None:
        """Say in one line how the pictures were prepared, and warn of what is doubtful about it."""
        if self._stretched:
            height, width, _ = self._network.shape
            warn(f"pictures stretched to {height} x {width} from another shape: {listed(self._stretched)}")
        if self._characters is None or not self._prepared + self._as_they_are:
            return
        told = []
        if self._prepared:
            many = f"{self._prepared:,} picture{'s' * (self._prepared > 1)}"
            inverted = f", {self._inverted:,} of them dark on light paper: inverted" if self._inverted else ""
            told.append(f"{many} prepared as those of {self._characters.like}{inverted}")
        if self._as_they_are:
            side = self._network.shape[0]
            told.append(f"{self._as_they_are:,} of {side} x {side}, light on dark, taken as they are")
        sys.stderr.write(f"nettorrent: {'; '.join(told)} (see --like)\n")


def _blocks(
    network: TrainedNetwork, pictures: Pictures, files: Sequence[str], array: str | None
) -> Iterator[_Block | _Failure]:
    """Read all files in their order."""
    rows: list[tuple[str, Array]] = []

    def waiting() -> Iterator[_Block]:
        if rows:
            yield _Block([{"file": name} for name, _ in rows], np.stack([pixels for _, pixels in rows]))
            rows.clear()

    for name in files:
        try:
            if Path(name).suffix.lower() in ENDINGS:
                yield from waiting()
                yield from _rows(network, name, array)
            else:
                rows.append((name, pictures.row(Path(name))))
                if len(rows) == BLOCK:
                    yield from waiting()
        except DataError as error:
            yield from waiting()
            yield _Failure(name, error)
    yield from waiting()


def _rows(network: TrainedNetwork, name: str, array: str | None) -> Iterator[_Block]:
    """Read a file of rows."""
    path = Path(name)
    found = open_row_file(path, array)
    if not network.takes(found.shape):
        text = f"{found.name or 'its array'} has rows of {found.shape}; the network reads rows of {network.shape}"
        raise DataError(text, file=name)
    first = 0
    for x in found.blocks(BLOCK):
        yield _Block([{"file": name, "row": first + i} for i in range(len(x))], x)
        first += len(x)


def picture(network: TrainedNetwork, reader: ImageReader, path: Path) -> tuple[Array, bool]:
    """Return the pixels of a picture (height, width, channels), bytes as in the data set of the network, and whether it
    was stretched to that shape. Raises DataError."""
    shape, unit = network.shape, network.trained_on.unit
    if len(shape) != 3 or shape[-1] not in (1, 3):
        raise DataError(f"the network reads rows of {shape}, which are no pictures: give rows", file=str(path))
    if unit is None:
        text = "the network was trained on floating-point values, whose scale a picture does not tell: give rows"
        raise DataError(text, file=str(path))
    facts = reader.facts(path)
    pixels, _ = reader.pixels(path, (shape[0], shape[1], shape[2]))
    return np.rint(pixels * (UNIT / unit)).astype(np.uint8), facts.height * shape[1] != facts.width * shape[0]


def _answers(network: TrainedNetwork, block: _Block, top: int) -> Iterator[dict[str, Any]]:
    """Yield what is told of each row."""
    outputs = network.outputs(block.x)
    if not network.classes:
        for place, row in zip(block.places, outputs, strict=True):
            yield {**place, "outputs": row.tolist()}
        return
    name = "probability" if network.answers.tells_probabilities else "output"
    scores = network.answers.scores(outputs)
    labels, order = network.answers.labels(outputs), np.argsort(-scores, axis=1, kind="stable")[:, :top]
    for place, label, row, best in zip(block.places, labels, scores, order, strict=True):
        ranked = [{"class": network.classes[i], name: float(row[i])} for i in best]
        yield {**place, "label": int(label), **ranked[0], "top": ranked}


def _line(answer: dict[str, Any]) -> str:
    """Write an answer for people."""
    place = answer["file"] + (f" row {answer['row']}" if "row" in answer else "")
    if "outputs" in answer:
        told = [f"{value:.6g}" for value in answer["outputs"]]
    else:
        told = [
            f"{each['class']} {100 * each['probability']:.1f} %"
            if "probability" in each
            else f"{each['class']} {each['output']:.4g}"
            for each in answer["top"]
        ]
    return readable(f"{place}: {', '.join(told)}")
