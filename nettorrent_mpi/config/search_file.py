"""Reads what a search of hyperparameters tries, and makes the configuration of each trial.

    base: configs/letters.yaml
    parameters:
      layers: [1, 2, 3]                                       # a name of its own, used as $layers
      units: {low: 32, high: 256, log: true}
      train.optimizer.adam.lr: {low: 1e-4, high: 1e-2, log: true}
    settings:
      model.layers:
        - flatten
        - repeat: {times: $layers, layers: [{linear: {units: $units, activation: relu}}]}
        - linear: 26
    sampler: tpe
    trials: 50

A trial has the base, then `settings`, then its parameters: a name that `settings` use as `$name` is a value there, any
other is a setting. A value of a parameter may be a mapping of settings with a name.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field, fields, replace
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal, cast

from pydantic import TypeAdapter, ValidationError

from nettorrent_mpi.config import overrides, reading, yaml_lines
from nettorrent_mpi.config.mistakes import Known, Mistake, Mistakes, explain, shown
from nettorrent_mpi.config.search_space import (
    Choice,
    Label,
    Parameter,
    Point,
    grid_point,
    points_of,
    read_parameters,
    samples,
)
from nettorrent_mpi.config.sections import Bounds, Config, Count, Read, Section
from nettorrent_mpi.config.translation import nearest
from nettorrent_mpi.config.written import section, strictly
from nettorrent_mpi.config.yaml_lines import Document, Path
from nettorrent_mpi.plan.errors import ConfigError
from nettorrent_mpi.plan.records import dataclass

MOST_REPEATS = 1_000


@dataclass(frozen=True, kw_only=True)
class MedianRule(Section):
    """The median rule ends a trial whose best accuracy so far is below the median of the complete trials after as many
    epochs: not before `startup_trials` are complete, and not in its first `warmup_epochs` epochs."""

    startup_trials: Annotated[int, Bounds(ge=1)] = 5
    warmup_epochs: Annotated[float, Bounds(ge=0)] = 0


def _prune(value: Any) -> MedianRule | None:
    if value in ("median", "none"):
        return MedianRule() if value == "median" else None
    if isinstance(value, dict) and set(value) == {"median"} and isinstance(value["median"], dict):
        try:
            return section(MedianRule, value["median"])
        except Mistakes as wrong:
            raise Mistakes(wrong.found, "median") from None
    raise Mistake(f"must be none, median, or median with startup_trials, warmup_epochs or both, not {shown(value)}")


def _base(value: Any) -> Any:
    if (isinstance(value, str) and value) or (isinstance(value, dict) and value):
        return value
    raise Mistake(f"wants the file of a configuration, or a configuration, not {shown(value)}")


def _settings(value: Any) -> Any:
    if isinstance(value, dict):
        return value
    raise Mistake(f"wants a mapping from settings to their values, not {shown(value)}")


@dataclass(frozen=True, kw_only=True)
class SearchSections(Section):
    """The sections of the file. `trials` counts those of the whole study, whoever runs them."""

    base: Annotated[Any, Read(_base)]
    parameters: Annotated[Any, Read(read_parameters)]  # Parameters by their names
    settings: Annotated[Any, Read(_settings)] = field(default_factory=dict)
    sampler: Literal["grid", "random", "tpe"] = "random"
    trials: Count | None = None
    seed: Annotated[int, Bounds(ge=0)] = 1
    prune: Annotated[MedianRule | None, Read(_prune)] = None
    output: str | None = None

    def _mistakes(self) -> Iterator[Mistake]:
        if self.sampler != "grid" and self.trials is None:
            yield Mistake(f"{self.sampler} needs it: add trials: 50, say", "trials")
        if self.sampler == "grid":
            count = points_of(self.parameters)
            if self.trials is not None and self.trials != count:
                yield Mistake(f"the grid has {count:,} points, and all are tried: leave it out", "trials")


_KNOWN = Known(
    {(): [f.name for f in fields(SearchSections)], ("prune", "median"): [f.name for f in fields(MedianRule)]},
    lambda path: None,
)


@dataclass(frozen=True)
class Search:
    """A Search is what a file says, with its `base` read and changed by `--set`."""

    sections: SearchSections
    base: Document
    document: Document  # of the file itself

    @property
    def parameters(self) -> dict[str, Parameter]:
        """The parameters by their names, in the order of the file."""
        return cast("dict[str, Parameter]", self.sections.parameters)

    @property
    def trials(self) -> int:
        """The number of trials."""
        return points_of(self.parameters) if self.sections.sampler == "grid" else self.sections.trials or 0

    def grid_point(self, number: int) -> dict[str, Label]:
        """Return a point of the grid."""
        return grid_point(self.parameters, number)

    def plain(self) -> dict[str, Any]:
        """Return the search as a file holds it, with its base inside."""
        given = {name: value for name, value in self.document.value.items() if name != "output"}
        return {**given, "base": self.base.value}

    def text(self) -> str:
        """Return the text of such a file."""
        return yaml_lines.write(self.plain())

    def config(self, point: Point, output: str | None = None) -> Config:
        """Return the configuration of a trial, whose run folder is `output`. Raises ConfigError."""
        document = Document(copy.deepcopy(self.base.value), dict(self.base.places), list(self.base.wrong))
        document.unread.update(self.base.unread)
        chosen: set[Path] = set()
        for key, value, path in self._changes(point):
            place = self.document.place(path)
            setting = yaml_lines.path_of(key)
            if "" in setting:
                raise self.document.error("wants settings as --set has them, with dots: train.batch_size", path)
            overrides.change(document, setting, value, place, chosen)
        if output is not None:
            document.value["output"] = output
        config = reading.check(document, document.wrong)
        if config.data.validation == 0:
            raise document.error(
                "is 0: trials are compared by their accuracy on validation rows, never on the test set; add "
                "validation: 0.1",
                ("data", "validation"),
            )
        return config

    @property
    def first(self) -> dict[str, Label]:
        """The first value of each parameter."""
        return {name: next(samples(parameter)) for name, parameter in self.parameters.items()}

    def check(self) -> None:
        """Raise the ConfigError of the first parameter none of whose values makes a configuration."""
        first = self.first
        for name, parameter in self.parameters.items():
            problem: ConfigError | None = None
            for label in samples(parameter):
                try:
                    self.config({**first, name: label})
                    problem = None
                    break
                except ConfigError as error:
                    problem = problem or error
            if problem is not None:
                raise problem

    def _changes(self, point: Point) -> Iterator[tuple[str, Any, Path]]:
        """Yield (setting, value, place in the file) of all that a trial changes, in order."""
        values: dict[str, Any] = {}
        settings: list[tuple[str, Any, Path]] = [
            (key, value, ("settings", key)) for key, value in self.sections.settings.items()
        ]
        for name, parameter in self.parameters.items():
            value = parameter.value(point[name])
            if isinstance(parameter, Choice) and parameter.named:
                place = ("parameters", name, str(point[name]))
                settings += [(key, each, (*place, key)) for key, each in value.items()]
            else:
                values[name] = value
        used: set[str] = set()
        yield from [(key, self._filled(value, values, used, place), place) for key, value, place in settings]
        yield from [(name, value, ("parameters", name)) for name, value in values.items() if name not in used]

    def _filled(self, value: Any, values: Mapping[str, Any], used: set[str], place: Path) -> Any:
        """Put the parameters' values in the place of their names; note those that were `used`."""
        if isinstance(value, str) and value.startswith("$"):
            name = value[1:]
            if name not in values:
                raise self.document.error(f"there is no parameter {name!r}; {nearest(name, values)}", place)
            used.add(name)
            return copy.deepcopy(values[name])
        if isinstance(value, dict):
            return {key: self._filled(each, values, used, (*place, key)) for key, each in value.items()}
        if not isinstance(value, list):
            return value
        filled: list[Any] = []
        for index, each in enumerate(value):
            here = (*place, index)
            if isinstance(each, dict) and set(each) == {"repeat"}:
                filled += self._repeated(each["repeat"], values, used, (*here, "repeat"))
            else:
                filled.append(self._filled(each, values, used, here))
        return filled

    def _repeated(self, repeat: Any, values: Mapping[str, Any], used: set[str], place: Path) -> list[Any]:
        if not isinstance(repeat, dict) or set(repeat) != {"times", "layers"} or not isinstance(repeat["layers"], list):
            raise self.document.error("wants {times: a number or $name, layers: a list of layers}", place)
        times = self._filled(repeat["times"], values, used, (*place, "times"))
        if isinstance(times, bool) or not isinstance(times, int) or not 0 <= times <= MOST_REPEATS:
            what = f"wants a whole number from 0 to {MOST_REPEATS:,}, not {shown(times)}"
            raise self.document.error(what, (*place, "times"))
        layers = self._filled(repeat["layers"], values, used, (*place, "layers"))
        return [layer for _ in range(times) for layer in copy.deepcopy(layers)]


def read_search(path: str, changes: Sequence[str] = ()) -> Search:
    """Read a search, with `changes` of its base as `--set` makes them. Raises ConfigError, which names file, line and
    key, before any trial: also for a parameter that is no setting."""
    document = yaml_lines.read(reading.text_of(path, "configs/search"), path)
    if document.wrong:
        raise ConfigError.several(document.wrong)
    if not isinstance(document.value, dict):
        raise document.error(f"wants base, parameters and trials, not {shown(document.value)}: is it a search?")
    try:
        sections = cast("SearchSections", strictly(TypeAdapter(SearchSections), document.value))
    except ValidationError as error:
        found = explain(error, document.value, _KNOWN)
        raise ConfigError.several([document.error(each.text, each.path) for each in found]) from None
    if sections.output is None:
        sections = replace(sections, output=f"runs/tune-{FilePath(path).stem}")
    search = Search(sections, _read_base(sections.base, document), document)
    wrong = overrides.apply(search.base, changes)
    if wrong:
        raise ConfigError.several(wrong)
    search.check()
    return search


def _read_base(base: Any, document: Document) -> Document:
    if isinstance(base, dict):
        inside = {path[1:]: place for path, place in document.places.items() if path[:1] == ("base",)}
        return Document(copy.deepcopy(base), inside)
    try:
        read = yaml_lines.read(reading.text_of(base), base)
    except ConfigError as error:
        raise document.error(str(error), ("base",)) from None
    if not isinstance(read.value, dict):
        raise ConfigError.several(read.wrong or [read.error("is no configuration")])
    return read


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return the sections in which two searches, as `plain` gives them, differ in other than their number of trials."""
    kept = sorted({*one, *other} - {"trials", "output"})
    return [name for name in kept if json.dumps(one.get(name)) != json.dumps(other.get(name))]


def read_plain(text: str, file: str) -> dict[str, Any]:
    """Return what the text of a search holds. Raises ConfigError."""
    value = yaml_lines.read(text, file).value
    return value if isinstance(value, dict) else {}
