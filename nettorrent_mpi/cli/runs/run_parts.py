"""The parts of a run: each began with a command, or when ranks were lost, and has a layout of its own."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

from nettorrent_mpi.cli.runs.values import is_count, items, one_line, text
from nettorrent_mpi.plan.errors import UserError
from nettorrent_mpi.plan.records import dataclass


@dataclass(frozen=True)
class RunPart:
    """A RunPart has the steps from `first` to `last`, counted from 1; that of the latest part is the latest step.

    about: what run.json says of it.
    config: its complete configuration; empty if that is not known.
    """

    number: int  # from 1
    first: int
    last: int
    about: Mapping[str, Any]
    config: str

    @property
    def name(self) -> str:
        """Its number and its steps."""
        if self.last < self.first:
            return f"part {self.number}, from step {self.first:,} on"
        return f"part {self.number}, steps {self.first:,} to {self.last:,}"

    @property
    def where(self) -> str:
        """Its number of ranks and its layout, in one line."""
        ranks = self.about.get("ranks")
        many = f"{ranks:,} rank{'s' * (ranks > 1)}" if is_count(ranks) else ""
        return ", ".join(filter(None, (many, text(self.about.get("layout")))))

    @property
    def command(self) -> str:
        """The command by which it began, with the variables of its environment; empty if that is not known."""
        arguments, environment, ranks = (self.about.get(name) for name in ("arguments", "environment", "ranks"))
        if not isinstance(arguments, list):
            return ""
        given = environment.items() if isinstance(environment, dict) else ()
        start = ["mpirun", "-n", str(ranks)] if is_count(ranks, least=2) else []
        words = [*start, "nettorrent", *(text(word) for word in arguments if isinstance(word, str))]
        return " ".join([*(f"{one_line(name)}={shlex.quote(text(value))}" for name, value in given), shlex.join(words)])

    @cached_property
    def settings(self) -> dict[str, str]:
        """The configuration by dotted keys."""
        try:
            return settings_of(self.config, f"the configuration of part {self.number}")
        except UserError:
            return {}


def parts_of(about: Mapping[str, Any], config: str, step: int) -> list[RunPart]:
    """Return the parts that run.json tells of; the latest one has `config`, and has come to `step`."""
    after = about.get("after")
    begins = after if is_count(after, least=0) else 0
    parts: list[RunPart] = []
    for told in items(about.get("earlier")):
        first, last = told.get("after"), told.get("until")
        begun = parts[-1].last if parts else 0
        if is_count(first, least=begun) and is_count(last, least=first + 1) and last <= begins:
            known = told.get("config")
            parts.append(RunPart(len(parts) + 1, first + 1, last, told, known if isinstance(known, str) else ""))
    return [*parts, RunPart(len(parts) + 1, begins + 1, step, about, config)]


def settings_of(config: str, file: str) -> dict[str, str]:
    """Return every value of a configuration with its dotted key. Raises UserErrors, which name the file."""
    from nettorrent_mpi.config import yaml_lines

    return dict(_flat(yaml_lines.read(config, file).value, ()))


def _flat(value: Any, at: tuple[str | int, ...]) -> Iterator[tuple[str, str]]:
    """Yield every value of a configuration with its dotted key."""
    from nettorrent_mpi.config.yaml_lines import dotted

    inner: Iterator[tuple[Any, Any]] = iter(())
    if isinstance(value, dict) and value:
        inner = iter(value.items())
    elif isinstance(value, list) and any(isinstance(each, dict | list) for each in value):
        inner = iter(enumerate(value))
    else:
        yield one_line(dotted(at)), one_line("none" if value is None else str(value))
        return
    for key, each in inner:
        yield from _flat(each, (*at, key if isinstance(key, int) else str(key)))
