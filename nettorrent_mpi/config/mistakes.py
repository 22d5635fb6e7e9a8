"""Explains mistakes in a configuration, our own and those that pydantic found, in one sentence with the key."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # ranks that receive a checked configuration load neither
    from pydantic import ValidationError

    from nettorrent_mpi.config.yaml_lines import Path

_WANTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping (key: value)",
    "model_type": "a mapping (key: value)",
    "model_attributes_type": "a mapping (key: value)",
    "dataclass_type": "a mapping (key: value)",
}
_UNKNOWN, _MISSING = "unknown key", "is missing"
_HINT = re.compile(r"; did you mean \S+\?\Z")
_BOUNDS = {
    "greater_than": ("more than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}


class Mistake(ValueError):  # noqa: N818
    """A Mistake is raised by our own checks; `path` leads from the checked value to the wrong one."""

    def __init__(self, text: str, *path: str | int):
        super().__init__(text)
        self.text, self.path = text, path


class Mistakes(ValueError):  # noqa: N818
    """Mistakes carry several ones below `path`: our own, and what pydantic found."""

    def __init__(self, found: Sequence[Mistake | ValidationError], *path: str | int):
        super().__init__(str(path))
        self.found, self.path = found, path


def raise_all(mistakes: Sequence[Mistake]) -> None:
    """Raise these mistakes, if there are any."""
    if mistakes:
        raise mistakes[0] if len(mistakes) == 1 else Mistakes(mistakes)


def shown(value: Any) -> str:
    """Name `value` as a person would."""
    if isinstance(value, str):
        return f"the text {value[:60]!r}"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    return "nothing (null)" if value is None else json.dumps(value)


class Found(NamedTuple):
    """A Found is one mistake. `wanted` is set where a type is wrong: alternatives of a union form one message."""

    path: Path
    text: str
    wanted: str = ""
    hollow: bool = False  # worth telling only if nothing deeper inside is wrong: one alternative of several


class Known(NamedTuple):
    """Known holds the keys of every section by its path, and finds the options of a spec by its path."""

    sections: dict[Path, list[str]]
    options: Callable[[Path], list[str] | None]


def explain(error: Exception, data: Any, known: Known, prefix: Path = ()) -> list[Found]:
    """List the mistakes of `error`, which was raised for the value at `prefix`, each at a path that exists in `data`
    (or would, for a missing key)."""
    found = _collect(error, data, prefix, known)
    # a mistake deeper inside makes an alternative's complaint about the whole value irrelevant
    paths = {f.path for f in found}
    found = [f for f in found if not (f.hollow and any(p != f.path and p[: len(f.path)] == f.path for p in paths))]
    # an unknown key that is a misspelt wanted one is one mistake, not two
    misspelt = {f.path[:-1]: f.text for f in found if f.text.startswith(_UNKNOWN)}
    found = [f for f in found if not (f.text == _MISSING and f"mean {f.path[-1]}?" in misspelt.get(f.path[:-1], ""))]
    told: dict[Path, Found] = {}
    for f in found:
        before = told.get(f.path)
        if before is None:
            told[f.path] = f
        elif before.wanted and f.wanted and f.wanted not in before.wanted:
            wanted = f"{before.wanted} or {f.wanted}"
            text = before.text.replace(before.wanted, wanted, 1)
            hint = _HINT.search(f.text)
            told[f.path] = before._replace(wanted=wanted, text=text + (hint[0] if hint else ""))
    return list(told.values())


def _collect(error: Exception, data: Any, prefix: Path, known: Known) -> list[Found]:
    """List what `error`, which was raised for the value at `prefix`, says."""
    if isinstance(error, Mistakes):
        return [found for each in error.found for found in _collect(each, data, (*prefix, *error.path), known)]
    if isinstance(error, Mistake):
        path, skipped = _existing(data, (*prefix, *error.path))
        if skipped and isinstance(_value(data, path), dict):
            path = (*path, *error.path[-1:])  # an option that is not given, and should be or has a wrong default
        return [Found(path, error.text)]
    found: list[Found] = []
    for item in error.errors(include_url=False):  # type: ignore[attr-defined]
        place = (*prefix, *item["loc"])
        inner = item.get("ctx", {}).get("error")
        if isinstance(inner, Mistake | Mistakes):
            found += _collect(inner, data, place, known)
        else:
            found.append(_one(item, data, place, known))
    return found


def _one(item: Any, data: Any, place: Path, known: Known) -> Found:
    from nettorrent_mpi.config.translation import nearest

    kind, given, context = item["type"], item["input"], item.get("ctx", {})
    path, skipped = _existing(data, place)
    if kind == "missing":
        if isinstance(place[-1], int):
            return Found(path, f"wants two numbers, not {shown(given)}", "two numbers", skipped)
        path, _ = _existing(data, place[:-1])
        return Found((*path, place[-1]), _MISSING)
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return Found(path, f"{_UNKNOWN}; {_hint(path, known)}")
    if kind == "too_long":
        return Found(path, "wants two numbers, not more", "two numbers", skipped)
    if kind == "too_short":
        # pydantic also counts as missing those items that are there but wrong: they speak for themselves
        return Found(path, "must not be empty", hollow=bool(given))
    if kind == "literal_error":
        choices = context["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        wanted = choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
        hint = nearest(given, choices, str(path[-1]), listed=False) if isinstance(given, str) else ""
        more = f"; {hint}" if hint else ""
        return Found(path, f"must be {wanted}, not {_given(given)}{more}", wanted, skipped)
    if kind in _BOUNDS:
        words, name = _BOUNDS[kind]
        return Found(path, f"must be {words} {_number(context[name])}, not {given}")
    wanted = _WANTED.get(kind)
    if kind == "tuple_type" and "tuple[int, int]" in place:
        wanted = "two numbers"
    if wanted is None:
        return Found(path, item["msg"][:1].lower() + item["msg"][1:])
    return Found(path, f"wants {wanted}, not {shown(given)}{_remedy(wanted, given)}", wanted, skipped)


def _remedy(wanted: str, given: Any) -> str:
    """Say what is to be written instead where one sees what was meant."""
    if wanted == "a text" and isinstance(given, int | float):
        return " (put it in quotes)"
    if isinstance(given, float) and given.is_integer() and wanted == "a whole number":
        return f" (write {given:.0f})"
    if given is None and wanted.startswith("a mapping"):
        return ": indent what belongs to it"
    if isinstance(given, dict) and wanted == "a list":
        return ": write '- ' before each entry"
    if not isinstance(given, str):
        return ""
    plain = given.strip().lower()
    if wanted == "true or false" and plain in ("yes", "on", "no", "off", "true", "false"):
        return f" (write {'true' if plain in ('yes', 'on', 'true') else 'false'}, without quotes)"
    digits = plain.replace(",", "").lstrip("0") or "0"
    if wanted in ("a number", "a whole number") and digits.isdecimal() and len(digits) < 20:
        return f" (write {digits}{', without quotes' if digits == plain else ''})"
    return ""


def _number(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"


def _value(data: Any, path: Path) -> Any:
    for part in path:
        data = data[part]
    return data


def _given(value: Any) -> str:
    return value[:60] or "an empty text" if isinstance(value, str) else shown(value)


def _existing(data: Any, place: Path) -> tuple[Path, bool]:
    """Drop the steps of `place` that are not in `data` (pydantic adds those of unions); tells if there were any."""
    path: Path = ()
    skipped = False
    here = data
    for part in place:
        inside = isinstance(here, dict) and part in here
        within = isinstance(here, list | tuple) and isinstance(part, int) and part < len(here)
        if inside or within:
            here = here[part]
            path = (*path, part)
        else:
            skipped = True
    return path, skipped


def _hint(path: Path, known: Known) -> str:
    """Suggest what was meant by the unknown key at the end of `path`."""
    from nettorrent_mpi.config.translation import meant, nearest

    word = str(path[-1])
    section = tuple("*" if isinstance(part, int) else part for part in path[:-1])
    here = known.sections.get(section) or known.options(path[:-1])
    if word == "<<":
        return "merge keys are not read: repeat what is to be merged"
    if word.isdecimal() and here:
        return "a number is no key: is a comma written for a decimal point?"
    elsewhere = [".".join((*map(str, s), word)) for s, keys in known.sections.items() if word in keys and s != section]
    hint = nearest(word, here or (), "key", listed=False)
    if elsewhere and (not hint or meant(word, here or (), "key")):
        return f"did you mean {elsewhere[0]}?"
    return hint or (f"possible: {', '.join(here)}" if here else "it has no options")
