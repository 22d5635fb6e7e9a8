"""Reads a configuration from YAML. What it may contain is defined in config.sections.

Errors name the file, line and key, and suggest a correction. Values that are not possible are rejected, so nothing in a
configuration is ever silently ignored.
"""

from __future__ import annotations

import codecs
import difflib
import math
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path as FilePath
from typing import Any, cast

from pydantic import TypeAdapter, ValidationError

from nettorrent_mpi.config import overrides as changes
from nettorrent_mpi.config import yaml_lines
from nettorrent_mpi.config.default import DEFAULT, SHIPPED
from nettorrent_mpi.config.mistakes import Known, Mistake, Mistakes, explain, shown
from nettorrent_mpi.config.sections import (
    Checkpoint,
    Config,
    Data,
    Layout,
    Model,
    StopAt,
    Swarm,
    Train,
    WatchdogTimes,
    watchdog_times,
)
from nettorrent_mpi.config.written import options_at, parse, strictly
from nettorrent_mpi.config.yaml_lines import Document, Path
from nettorrent_mpi.plan import exchange_specs as choices
from nettorrent_mpi.plan.errors import ConfigError, UserError, listed
from nettorrent_mpi.plan.specs import Spec

# Every key of every section by its path, for the hints after an unknown key; config.written knows those of specs.
_SECTIONS: dict[Path, Any] = {
    (): Config,
    ("data",): Data,
    ("model",): Model,
    ("train",): Train,
    ("train", "stop_at"): StopAt,
    ("checkpoint",): Checkpoint,
    ("watchdog",): WatchdogTimes,
    ("layout",): Layout,
    ("layout", "swarms", "*"): Swarm,
    ("exchange", "gossip", "consensus"): choices.Consensus,
}
EXAMPLES = "configs"  # the folder of configurations in a checkout
_MOST_BYTES = 1_000_000  # of a file
_KNOWN = Known({path: [f.name for f in fields(section)] for path, section in _SECTIONS.items()}, options_at)


def load(path: str | None, overrides: Sequence[str] = ()) -> Config:
    """Read the configuration in the file at `path` (None: DEFAULT), changed by each KEY=VALUE of `overrides`.

    Raises ConfigError for every mistake of the user's, the unreadable file included.
    """
    if path is None:
        return loads(DEFAULT, SHIPPED, overrides, output="runs/digits")
    return loads(text_of(path), path, overrides, output=f"runs/{FilePath(path).stem}")


def placed(error: UserError, path: str | None, overrides: Sequence[str] = ()) -> UserError:
    """Return an error about a value of the configuration that `load` has read, with its file and line."""
    if error.key is None or (isinstance(error, ConfigError) and error.file is not None):
        return error
    document = yaml_lines.read(text_of(path), path) if path is not None else yaml_lines.read(DEFAULT, SHIPPED)
    changes.apply(document, overrides)
    made = document.error(str(error).removeprefix(f"{error.key}: "), yaml_lines.path_of(error.key))
    made.agreed = error.agreed
    return made


def text_of(path: str, examples: str = EXAMPLES) -> str:
    """Return the text of a file; `examples` is the folder with files of its kind in a checkout. Raises ConfigError."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):  # a pipe or a device may never end
            raise ConfigError("cannot be read: it is no plain file", file=path)
        if status.st_size > _MOST_BYTES:
            text = f"has {status.st_size:,} bytes, and a configuration at most {_MOST_BYTES:,}: is it one?"
            raise ConfigError(text, file=path)
        return FilePath(path).read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(_no_file(path, examples), file=path) from None
    except IsADirectoryError:
        raise ConfigError("is a folder; name the file in it", file=path) from None
    except UnicodeDecodeError as error:
        wide = error.object[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        found = "is in UTF-16" if wide else f"not a text in UTF-8 (byte {error.start})"
        raise ConfigError(f"{found}: save it as UTF-8, if it is a configuration", file=path) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(f"cannot be read: {reason}", file=path) from None


def loads(text: str, file: str, overrides: Sequence[str] = (), output: str | None = None) -> Config:
    """Read the configuration in `text`, which messages call `file`; `output` is the run folder if it names none."""
    document = yaml_lines.read(text, file)
    if document.value is None and not document.wrong:
        raise ConfigError("is empty; a configuration needs at least data and model", file=file)
    if not isinstance(document.value, dict):
        if document.wrong:
            raise ConfigError.several(document.wrong)
        raise document.error(f"wants a mapping (key: value), not {shown(document.value)}: is it a configuration?")
    if {"base", "parameters"} <= set(document.value):
        raise document.error("is a search of hyperparameters: nettorrent tune runs it")
    wrong = [*document.wrong, *changes.apply(document, overrides)]
    if document.value.get("output") is None and output is not None:
        document.value["output"] = output
    return check(document, wrong)


def from_plain(data: dict[str, Any]) -> Config:
    """Read the configuration that `config.writing.to_plain` wrote."""
    return check(Document(data))


def exchange_of(value: Any, error: Callable[[str, Path], ConfigError] | None = None) -> Spec:
    """Check how replicas agree, as a configuration says it: a name, a name with options, or a spec. Raises ConfigError;
    `error` makes one of a text and a path that begins with "exchange", where the value was read from a file."""
    error = Document({"exchange": value}).error if error is None else error
    try:
        return parse(value, choices.EXCHANGES, "exchange")
    except (Mistake, Mistakes) as mistakes:
        found = explain(mistakes, {"exchange": value}, _KNOWN, ("exchange",))
        raise ConfigError.several([error(each.text, each.path) for each in found]) from None


def watchdog_of(value: Any) -> WatchdogTimes | None:
    """Check the times of a watchdog, as a configuration says them: "none" (None), a mapping, or
    WatchdogTimes. Raises ConfigError."""
    try:
        found = watchdog_times(value)
    except (Mistake, Mistakes) as error:
        wrong = explain(error, {"watchdog": value}, _KNOWN, ("watchdog",))
        document = Document({"watchdog": value})
        raise ConfigError.several([document.error(each.text, each.path) for each in wrong]) from None
    return None if found == "none" else cast("WatchdogTimes", found)


@cache
def _adapter() -> TypeAdapter[Any]:
    return TypeAdapter(Config)


def check(document: Document, wrong: Sequence[ConfigError] = ()) -> Config:
    """Return the configuration in a document. Raises one ConfigError for all values that are wrong, together with what
    was `wrong` before."""
    errors = list(wrong)
    try:
        config = cast("Config", strictly(_adapter(), document.value))
    except ValidationError as error:
        found = [f for f in explain(error, document.value, _KNOWN) if f.path not in document.unread]
        errors += [document.error(f.text, f.path) for f in found]
        errors.sort(key=lambda each: each.line or math.inf)
    if errors:  # in the order of the file; what --set brought comes after it
        raise ConfigError.several(errors)
    return config


def _no_file(path: str, examples: str) -> str:
    """Say what to name instead of a file that is missing: one of nearly this name beside it or among the examples."""
    if "=" in path:
        return f"there is no such file; to change a value, write --set {path}"

    def files_in(folder: FilePath) -> list[FilePath]:
        return sorted(each for each in folder.iterdir() if each.suffix in (".yaml", ".yml")) if folder.is_dir() else []

    known = files_in(FilePath(examples)) if examples else []
    files = {each.stem: each for each in [*known, *files_in(FilePath(path).parent)]}
    near = difflib.get_close_matches(FilePath(path).stem, files, n=1, cutoff=0.7)
    told = ["there is no such file"]
    if near:
        told.append(f"did you mean {files[near[0]]}?")
    else:
        told += [f"{examples}/ holds: {listed([each.name for each in known])}"] if known else []
        told += ["`nettorrent init` writes one"] if examples == EXAMPLES else []
    return "; ".join(told)
