"""Reads a configuration from YAML. What it may contain is defined in config.sections.

Errors name the file, line and key, and suggest a correction. Values that are not possible are rejected, so nothing in a
configuration is ever silently ignored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path as FilePath
from typing import Any, cast

from pydantic import TypeAdapter, ValidationError

from nettorrent_mpi.config import overrides as changes
from nettorrent_mpi.config import yaml_lines
from nettorrent_mpi.config.default import DEFAULT, SHIPPED
from nettorrent_mpi.config.mistakes import Known, explain, nearest, shown
from nettorrent_mpi.config.sections import Config, Data, Layout, Model, StopAt, Swarm, Train
from nettorrent_mpi.config.written import options_at, strictly
from nettorrent_mpi.config.yaml_lines import Document, Path
from nettorrent_mpi.plan import exchange_specs as choices
from nettorrent_mpi.plan.errors import ConfigError

# Every key of every section by its path, for the hints after an unknown key; config.written knows those of specs.
_SECTIONS: dict[Path, Any] = {
    (): Config,
    ("data",): Data,
    ("model",): Model,
    ("train",): Train,
    ("train", "stop_at"): StopAt,
    ("layout",): Layout,
    ("layout", "swarms", "*"): Swarm,
    ("exchange", "gossip", "consensus"): choices.Consensus,
}
_KNOWN = Known({path: [f.name for f in fields(section)] for path, section in _SECTIONS.items()}, options_at)


def load(path: str | None, overrides: Sequence[str] = ()) -> Config:
    """Read the configuration in the file at `path` (None: DEFAULT), changed by each KEY=VALUE of `overrides`.

    Raises ConfigError for every mistake of the user's, the unreadable file included.
    """
    if path is None:
        return loads(DEFAULT, SHIPPED, overrides, output="runs/digits")
    try:
        text = FilePath(path).read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(_no_file(path), file=path) from None
    except IsADirectoryError:
        raise ConfigError("is a folder; name the file in it", file=path) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"not a text in UTF-8 (byte {error.start}): is it a configuration?", file=path) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(f"cannot be read: {reason}", file=path) from None
    return loads(text, path, overrides, output=f"runs/{FilePath(path).stem}")


def loads(text: str, file: str, overrides: Sequence[str] = (), output: str | None = None) -> Config:
    """Read the configuration in `text`, which messages call `file`; `output` is the run folder if it names none."""
    document = yaml_lines.read(text, file)
    if document.value is None:
        raise ConfigError("is empty; a configuration needs at least data and model", file=file)
    if not isinstance(document.value, dict):
        raise document.error(f"wants a mapping (key: value), not {shown(document.value)}: is it a configuration?")
    changes.apply(document, overrides)
    if document.value.get("output") is None and output is not None:
        document.value["output"] = output
    return _check(document)


def from_plain(data: dict[str, Any]) -> Config:
    """Read the configuration that `config.writing.to_plain` wrote."""
    return _check(Document(data))


@cache
def _adapter() -> TypeAdapter[Any]:
    return TypeAdapter(Config)


def _check(document: Document) -> Config:
    try:
        return cast("Config", strictly(_adapter(), document.value))
    except ValidationError as error:
        found = explain(error, document.value, _KNOWN)
    # the first in the order of the file; what --set brought comes after it
    found.sort(key=lambda f: document.place(f.path).line or math.inf)
    first, others = found[0], len(found) - 1
    more = f" (and {others} more mistake{'s' if others > 1 else ''})" if others else ""
    raise document.error(first.text + more, first.path)


def _no_file(path: str) -> str:
    beside = FilePath(path).parent
    near = []
    if beside.is_dir():
        files = sorted(str(p) for p in beside.iterdir() if p.suffix in (".yaml", ".yml"))
        near = [hint for hint in [nearest(path, files)] if hint.startswith("did")] if files else []
    return "there is no such file" + (f"; {near[0]}" if near else "")
