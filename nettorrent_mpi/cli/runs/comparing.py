"""The settings of runs are compared: a value counts where it differs, or where somebody has set it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, NamedTuple

from nettorrent_mpi.cli.runs.values import one_line
from nettorrent_mpi.plan.errors import UserError
from nettorrent_mpi.plan.specs import Spec


class Setting(NamedTuple):
    """A value of a configuration, and whether it is what it would be if nobody had set it."""

    text: str
    usual: bool = False


def settings_given(config: str, file: str) -> dict[str, Setting] | None:
    """Return the settings of a configuration's text by their dotted keys, the kind of an optimizer, a layer, ... by the
    key at which it stands; None where it is no configuration of this version."""
    from nettorrent_mpi.config.reading import loads

    try:
        return dict(_flat(loads(config, file), ()))
    except UserError:
        return None


def as_written(values: Mapping[str, str]) -> dict[str, Setting]:
    """Return settings of which is known only what the file says."""
    return {key: Setting(value) for key, value in values.items()}


def _flat(section: Any, at: tuple[str | int, ...], *, usual: bool = False) -> Iterator[tuple[str, Setting]]:
    from nettorrent_mpi.config.yaml_lines import dotted

    if isinstance(section, Spec):
        yield dotted(at), Setting(section.kind, usual)
        at = (*at, section.kind)
    for each in fields(section):
        value, here = getattr(section, each.name), (*at, each.name)
        default = each.default if each.default_factory is MISSING else each.default_factory()
        if is_dataclass(value):
            yield from _flat(value, here, usual=value == default)
        elif isinstance(value, tuple) and value and all(map(is_dataclass, value)):
            for number, inner in enumerate(value):
                yield from _flat(inner, (*here, number))
        else:
            yield dotted(here), Setting(one_line("none" if value is None else str(value)), value == default)


def differ(values: Sequence[Setting | None]) -> bool:
    """Whether runs differ in a setting. One that only some have, as options of their optimizer, counts where it was
    set."""
    there = [each for each in values if each is not None]
    if len(there) < len(values):
        return not all(each.usual for each in there)
    return len({each.text for each in there}) > 1
