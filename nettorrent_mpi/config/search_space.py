"""The parameters of a search: what each trial draws a value of."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nettorrent_mpi.config.mistakes import Mistake, Mistakes, shown
from nettorrent_mpi.config.translation import nearest
from nettorrent_mpi.plan.records import dataclass

Label = str | int | float | bool | None  # what a trial calls the value that it has drawn
Point = Mapping[str, Label]  # the labels of all parameters, by their names
_RANGE = ("low", "high", "step", "log")
MOST_POINTS = 1_000_000


@dataclass(frozen=True)
class Choice:
    """A Choice is a parameter with given values, each with its label. `named`: each value is a mapping of settings."""

    labels: tuple[Label, ...]
    values: tuple[Any, ...]
    named: bool = False

    @property
    def grid(self) -> tuple[Label, ...]:
        """All labels."""
        return self.labels

    def draw(self, chance: random.Random) -> Label:
        """Draw a label, each alike."""
        return self.labels[chance.randrange(len(self.labels))]

    def value(self, label: Label) -> Any:
        """Return the value with this label."""
        return self.values[[(type(each), each) for each in self.labels].index((type(label), label))]


@dataclass(frozen=True)
class NumberRange:
    """A NumberRange is a parameter with the numbers from `low` to `high`, both included: whole ones if both are whole,
    only those that are multiples of `step` above low, or, with `log`, drawn by their logarithms. A number is its own
    label."""

    low: float
    high: float
    step: float | None = None
    log: bool = False

    @property
    def whole(self) -> bool:
        """Whether the numbers are whole ones."""
        return all(isinstance(each, int) for each in (self.low, self.high, self.step or 1))

    @property
    def grid(self) -> tuple[Label, ...] | None:
        """All numbers; None if they are not to be counted."""
        step = self.step or (1 if self.whole and not self.log else None)
        if step is None:
            return None
        return tuple(self._on_grid(number, step) for number in range(self._count(step)))

    def draw(self, chance: random.Random) -> Label:
        """Draw a number."""
        step = self.step or (1 if self.whole else None)
        if self.log:
            half = 0.5 if self.whole else 0.0
            drawn = math.exp(chance.uniform(math.log(self.low - half), math.log(self.high + half)))
            drawn = min(max(drawn, self.low), self.high)
            return round(drawn) if self.whole else drawn
        if step is not None:
            return self._on_grid(chance.randrange(self._count(step)), step)
        return chance.uniform(self.low, self.high)

    def value(self, label: Label) -> Any:
        """Return the number itself."""
        return label

    @property
    def top(self) -> float:
        """The highest number that can be drawn."""
        return self.high if self.step is None else self._on_grid(self._count(self.step) - 1, self.step)

    def _count(self, step: float) -> int:
        return math.floor((self.high - self.low) / step + 1e-9) + 1

    def _on_grid(self, number: int, step: float) -> float:
        found = self.low + number * step
        return found if self.whole else float(f"{found:.12g}")  # 0.3, not 0.30000000000000004


Parameter = Choice | NumberRange


def read_parameters(given: Any) -> dict[str, Parameter]:
    """Read the section `parameters`. Raises Mistake or Mistakes, whose paths begin below it."""
    if not isinstance(given, Mapping) or not given:
        raise Mistake(f"wants a mapping from settings to their values, not {shown(given) if given else 'an empty one'}")
    read: dict[str, Parameter] = {}
    wrong: list[Mistake] = []
    for name, value in given.items():
        try:
            read[name] = _parameter(value)
        except Mistake as mistake:
            wrong.append(Mistake(mistake.text, name, *mistake.path))
    if wrong:
        raise Mistakes(wrong)
    return read


def _parameter(value: Any) -> Parameter:
    if isinstance(value, Mapping) and set(_RANGE) & set(value):
        return _range(value)
    if isinstance(value, Mapping) and value and all(isinstance(each, Mapping) for each in value.values()):
        return Choice(tuple(value), tuple(value.values()), named=True)
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise Mistake(
            "wants a list of values, a range as {low: 1, high: 8}, or names with the settings of each, not "
            + (" and ".join(map(str, value)) if isinstance(value, Mapping) and value else shown(value))
        )
    if not value:
        raise Mistake("must not be empty")
    labels = [each if isinstance(each, Label) else json.dumps(each) for each in value]
    for index, label in enumerate(labels):
        if any(label == other and type(label) is type(other) for other in labels[:index]):
            raise Mistake(f"names {label} twice", index)
    return Choice(tuple(labels), tuple(value))


def _range(value: Mapping[str, Any]) -> NumberRange:
    for key, given in value.items():
        if key not in _RANGE:
            raise Mistake(f"unknown key; {nearest(key, _RANGE)}", key)
        if key == "log":
            if not isinstance(given, bool):
                raise Mistake(f"wants true or false, not {shown(given)}", key)
        elif isinstance(given, bool) or not isinstance(given, int | float):
            raise Mistake(f"wants a number, not {shown(given)}", key)
    for key in ("low", "high"):
        if key not in value:
            raise Mistake("is missing", key)
    found = NumberRange(value["low"], value["high"], value.get("step"), value.get("log", False))
    if found.low >= found.high:
        raise Mistake(f"must be more than low ({found.low}), not {found.high}", "high")
    if found.log and found.low <= 0:
        raise Mistake(f"must be more than 0 with log, not {found.low}", "low")
    if found.log and found.step is not None:
        raise Mistake("is not possible with log: leave one out", "step")
    if found.step is not None and not 0 < found.step <= found.high - found.low:
        raise Mistake(f"must be more than 0 and at most {found.high - found.low:.12g}, not {found.step}", "step")
    return found


def points_of(parameters: Mapping[str, Parameter]) -> int:
    """Return the number of points of the grid. Raises Mistakes for parameters that have no grid, or too many points."""
    grids = {name: parameter.grid for name, parameter in parameters.items()}
    uncounted = [name for name, grid in grids.items() if grid is None]
    if uncounted:
        raise Mistakes([Mistake("a grid needs a list of values, or a step", name) for name in uncounted], "parameters")
    count = math.prod(len(grid or ()) for grid in grids.values())
    if count > MOST_POINTS:
        raise Mistake(f"makes a grid of {count:,} points: {MOST_POINTS:,} is the most", "parameters")
    return count


def grid_point(parameters: Mapping[str, Parameter], number: int) -> dict[str, Label]:
    """Return a point of the grid; the last parameter varies fastest."""
    point: dict[str, Label] = {}
    for name, parameter in reversed(list(parameters.items())):
        grid = parameter.grid
        assert grid is not None
        number, position = divmod(number, len(grid))
        point[name] = grid[position]
    return {name: point[name] for name in parameters}


def samples(parameter: Parameter) -> Iterator[Label]:
    """Yield what a parameter can be in the extreme: each value of a choice, the ends of a range."""
    yield from parameter.labels if isinstance(parameter, Choice) else (parameter.low, parameter.top)
