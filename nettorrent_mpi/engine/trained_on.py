"""A network's files say what it was trained on: model.h5, checkpoints and the run folder's summary.

Weights mean nothing without it: where classes are numbered otherwise, or inputs have another scale, answers are wrong.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self

from nettorrent_mpi.data.files import parsed
from nettorrent_mpi.data.rows import BYTE, Dataset
from nettorrent_mpi.engine.setup import Setup
from nettorrent_mpi.plan.errors import ConfigError, DataError, listed
from nettorrent_mpi.plan.records import dataclass

ATTRIBUTE = "data"  # of the files


@dataclass(frozen=True)
class TrainedOn:
    """A TrainedOn says what the labels and the inputs of a data set mean."""

    name: str  # of the data set, as in a configuration
    rows: int  # for training, those held back for validation included
    classes: int | None
    class_names: tuple[str, ...] | None
    mean: tuple[float, ...]  # one for all channels, or one for each
    std: tuple[float, ...]
    transposed: bool
    shape: tuple[int, ...]  # of one row
    unit: float | None  # by which bytes are multiplied, before `mean` and `std` apply; None: the rows are not bytes

    @classmethod
    def of(cls, setup: Setup) -> Self:
        """Describe the data set of a run."""
        train, names = setup.dataset.train, setup.dataset.class_names
        transposed, scaling = setup.config.data.transposed, train.scaling
        unit = scaling.unit if train.dtype == BYTE else None
        name, classes, shape = setup.dataset.name, setup.dataset.classes, setup.dataset.shape
        return cls(name, train.rows, classes, names, scaling.mean, scaling.std, transposed, shape, unit)

    @classmethod
    def read(cls, attributes: Mapping[str, Any], path: str) -> Self:
        """Read what `text` wrote among the attributes of a file. Raises DataError."""
        try:
            found = parsed(attributes[ATTRIBUTE])
            names, classes = found["class_names"], found["classes"]
            means, stds = (tuple(float(value) for value in found[name]) for name in ("mean", "std"))
            if not isinstance(found["name"], str):
                raise ValueError
            if not isinstance(found["rows"], int) or not isinstance(classes, int | None) or not all((means, stds)):
                raise ValueError
            if names is not None and not all(isinstance(name, str) for name in names):
                raise ValueError
            texts = None if names is None else tuple(names)
            shape, unit = tuple(int(length) for length in found["shape"]), found["unit"]
            if not shape or min(shape) < 1 or (unit is not None and not 0 < float(unit) < math.inf):
                raise ValueError
            transposed, unit = bool(found["transposed"]), None if unit is None else float(unit)
            return cls(found["name"], found["rows"], classes, texts, means, stds, transposed, shape, unit)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            text = f"does not say what it was trained on (attribute {ATTRIBUTE}): is it a file of nettorrent_mpi?"
            raise DataError(text, file=path) from error

    def text(self) -> str:
        """Write it as JSON."""
        return json.dumps(asdict(self))

    def check_prepared_alike(self, now: TrainedOn, path: str) -> None:
        """Raise ConfigError unless inputs are prepared now as they were then."""
        for key in ("mean", "std", "transposed"):
            before, given = getattr(self, key), getattr(now, key)
            if before != given:
                raise ConfigError(
                    f"{_plain(given)} is not what the network of {path} was trained with ({_plain(before)}); give the "
                    "same",
                    key=f"data.{key}",
                )
        if None not in (self.unit, now.unit) and self.unit != now.unit:
            raise ConfigError(
                f"its bytes are multiplied by {now.unit:.6g}, and the network of {path} was trained on bytes "
                f"multiplied by {self.unit:.6g}; use data whose values mean the same, or floating-point values",
                key="data.name",
            )

    def check_same_rows(self, now: TrainedOn, data: str, path: str) -> None:
        """Raise DataError unless there are as many training rows as then: their number decides which row is where in
        an epoch, and which are held back for validation."""
        if self.rows != now.rows:
            raise DataError(
                f"has {now.rows:,} training rows, but the checkpoint {path} was made with {self.rows:,}; resume with "
                "the same data, or start anew without --resume",
                file=data,
            )

    def numbered_alike(self, dataset: Dataset, path: str, *, part: bool) -> tuple[Dataset, str | None]:
        """Return the data set with its classes numbered as those that the network was trained on, and a warning if
        that was doubtful or changed something. With `part` some of the classes may be missing.

        Raises DataError where names differ.
        """
        data = dataset.file or dataset.name
        before, now = self.class_names, dataset.class_names
        if before == now or dataset.classes is None:
            return dataset, None
        if before is None or now is None:
            has, lacks = (path, data) if now is None else (data, path)
            text = f"{has} names its classes ({listed(before or now or ())}), {lacks} does not: they are taken to be "
            return dataset, text + "the same, in the same order"
        strangers = set(now) - set(before)
        if strangers or (not part and len(before) != len(now)):
            raise DataError(
                f"has the classes {listed(now)}, but the network of {path} was trained on {listed(before)}; "
                + ("use data of the same classes" if not part else "use data of those classes, or of some of them"),
                file=data,
            )
        if len(now) == len(before):
            text = f"numbers its classes otherwise ({listed(now)}) than the network does ({listed(before)})"
        else:
            text = f"has only some ({listed(now)}) of the classes that the network was trained on ({listed(before)})"
        return dataset.numbered_as(before), f"{data} {text}: they are taken by their names"


def fit(setup: Setup, attributes: Mapping[str, Any], path: Path, *, resumed: bool = False) -> tuple[Setup, str | None]:
    """Return the setup with its data set's classes numbered as those of the network in the file at `path`, and a
    warning if that was doubtful or changed something.

    Raises DataError and ConfigError if the network's answers to these data would mean nothing, or if the training that
    is `resumed` would not see the same rows.
    """
    dataset, file = setup.dataset, str(path)
    before, now = TrainedOn.read(attributes, file), TrainedOn.of(setup)
    before.check_prepared_alike(now, file)
    if resumed:
        before.check_same_rows(now, dataset.file or dataset.name, file)
    fitted, warning = before.numbered_alike(dataset, file, part=not resumed)
    return replace(setup, dataset=fitted), warning


def _plain(value: Any) -> str:
    if isinstance(value, tuple) and len(set(value)) == 1:
        value = value[0]
    return json.dumps(value)
