"""Applies `--set KEY=VALUE` to a configuration that has been read and not yet checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nettorrent_mpi.config import written, yaml_lines
from nettorrent_mpi.config.mistakes import Mistake, shown
from nettorrent_mpi.config.translation import nearest
from nettorrent_mpi.config.yaml_lines import Document, Path, Source, dotted, path_of
from nettorrent_mpi.plan.errors import ConfigError

# Only one of these may be given: setting one removes the file's value of the other.
_EITHER = {("train", "steps"): "epochs", ("train", "epochs"): "steps"}


def apply(document: Document, overrides: Sequence[str]) -> list[ConfigError]:
    """Change `document` by each KEY=VALUE in turn; return the errors of those that cannot be applied.

    KEY is a path of names and list positions with dots between them (`model.layers.0.conv2d.filters`, or `layers[0]`);
    VALUE is YAML. An error's place is the text of the --set.
    """
    wrong: list[ConfigError] = []
    chosen: set[Path] = set()
    for text in overrides:
        try:
            _apply(document, text, chosen)
        except ConfigError as error:
            wrong.append(error)
    return wrong


def _apply(document: Document, text: str, chosen: set[Path]) -> None:
    where = Source(f"--set {text}")
    key, equals, value_text = text.partition("=")
    path = _path(key.strip(), equals, where)
    read = yaml_lines.read(value_text, where.file or "")
    if read.wrong:
        raise ConfigError.several(read.wrong)
    change(document, path, read.value, where, chosen)


def change(document: Document, path: Path, value: Any, where: Source, chosen: set[Path]) -> None:
    """Set the value at `path`, which was written at `where`, and add the path to those that were `chosen` so far.
    Raises ConfigError."""
    _put(document.value, path, value, where)
    document.record(path, where)
    for length in range(1, len(path)):
        document.places.setdefault(path[:length], where)  # mappings that were created on the way
    chosen.add(path)
    if path in _EITHER and value is not None:
        other = (*path[:-1], _EITHER[path])
        if other not in chosen and isinstance(document.value["train"], dict):
            document.value["train"].pop(other[-1], None)


def _path(key: str, equals: str, where: Source) -> Path:
    path = path_of(key)
    if not equals or "" in path:
        raise ConfigError("wants KEY=VALUE with a dotted KEY, as in --set train.batch_size=64", file=where.file)
    return path


def _put(root: Any, path: Path, value: Any, where: Source) -> None:
    """Set `value` at `path`, creating mappings on the way."""
    here: Any = root
    for depth, part in enumerate(path):
        last = depth == len(path) - 1
        _enterable(here, path[:depth], part, where)
        if last:
            here[part] = value
            return
        below = here.get(part) if isinstance(here, dict) else here[part]
        below = _opened(below, path[: depth + 1], path[depth + 1], where)
        here[part] = below
        here = below


def _enterable(here: Any, path: Path, part: str | int, where: Source) -> None:
    if isinstance(here, dict) and isinstance(part, str):
        return
    if isinstance(here, list) and isinstance(part, int):
        if part < len(here):
            return
        what = f"has {len(here)} entries, counted from 0" if here else "is empty"
        raise ConfigError(f"{what}: there is no number {part}", file=where.file, line=where.line, key=dotted(path))
    if isinstance(here, list):
        reason = f"is a list: a position is wanted here (as in {dotted((*path, 0))}), not {part!r}"
    else:
        reason = f"is {shown(here)} and has nothing called {part!r} inside"
    raise ConfigError(reason, file=where.file, line=where.line, key=dotted(path) or None)


def _opened(value: Any, path: Path, inside: str | int, where: Source) -> Any:
    """Expand `value` at `path`, whatever short form it is written in, so that `inside` can be set in it.

    Where a spec stands, another kind takes the place of the present one: `train.optimizer.sgd.lr=0.1` over
    `optimizer: adam`; the same kind keeps its other options.
    """
    found = written.kinds_at(path)
    if found is not None and isinstance(inside, str):
        kinds, what = found
        if inside not in kinds:
            hint = nearest(inside, kinds, what)
            text = f"unknown {what} {inside!r}; {hint}"
            raise ConfigError(text, file=where.file, line=where.line, key=dotted((*path, inside)))
        try:
            kind, given = written.split(value, kinds, what)
        except Mistake:
            kind, given = "", {}
        return {inside: dict(given) if inside == kind else {}}
    if value is None or (path == ("layout",) and isinstance(value, str)):
        return {}
    # An alias shares its list or mapping with other places, which must not change along.
    return value.copy() if isinstance(value, dict | list) else value
