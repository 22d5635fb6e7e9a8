"""Reads a configuration of dpwa (github.com/loudinthecloud/dpwa) as gossip.

dpwa's file is a list of mappings with one key each, or one mapping:

    nodes                 names, hosts, ports         the launcher starts the ranks: only how many they are counts
    fetch_probability     or pull_probability         gossip.probability; 0: no exchange at all
    timeout_ms            or auto, none               gossip.deadline
    interpolation         constant, clock, loss, ...  gossip.mix
    divergence_threshold                              gossip.divergence_threshold
    constant: {value: 0.5}, clock: 0, loss: 0         options of the methods, checked also where another one is chosen
    linear: {start: 0.5, end: 0.05, target: 5000}     (until dpwa's commit 0242459, as loss_divergence)
    loss_divergence: {target_divergence_loss: 0.2}

Only interpolation and its method's options have to be there; what dpwa wants, too, has gossip's defaults here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple, cast

from nettorrent_mpi.config import yaml_lines
from nettorrent_mpi.config.mistakes import shown
from nettorrent_mpi.config.reading import exchange_of, text_of
from nettorrent_mpi.config.translation import nearest
from nettorrent_mpi.config.yaml_lines import Document, Path
from nettorrent_mpi.plan.errors import ConfigError
from nettorrent_mpi.plan.exchange_specs import MIXES, Gossip, Nothing
from nettorrent_mpi.plan.specs import Spec

_PROBABILITIES = ("fetch_probability", "pull_probability")
_NUMBERS = {
    **dict.fromkeys(_PROBABILITIES, "probability"),
    "timeout_ms": "deadline",
    "divergence_threshold": "divergence_threshold",
}
# dpwa's methods of interpolation, and their options by the names that mixes have for them.
_METHODS: dict[str, dict[str, str]] = {
    "constant": {"value": "value"},
    "clock": {},
    "loss": {},
    "linear": {"start": "start", "end": "end", "target": "target"},
    "loss_divergence": {"target_divergence_loss": "target"},
}
_KEYS = ["nodes", *_NUMBERS, "interpolation", *_METHODS]
# A rank exchanges with one other, drawn by dpwa's scores, and merges it after its step, at its own learning rate.
_ALWAYS = {"pairing": "random", "part": 1, "overlap": True, "withhold": 0, "rate_factor": 1}


class DpwaFile(NamedTuple):
    """A DpwaFile has the exchange that a file of dpwa describes, and the number of its nodes, None if it names none."""

    exchange: Spec
    nodes: int | None


def read_dpwa(path: str) -> DpwaFile:
    """Read dpwa's configuration file. Raises ConfigError for all mistakes, each with its line and key."""
    document = _flat(yaml_lines.read(text_of(path, ""), path))
    given: dict[str, Any] = document.value
    for key in given:
        if key not in _KEYS:
            _note(document, f"unknown key; {nearest(key, _KEYS)}", key)
    mixes = {method: _mix(document, method) for method in _METHODS if method in given}
    method = _chosen(document)
    nodes = given.get("nodes")
    if "nodes" in given and not isinstance(nodes, list):
        _note(document, f"wants a list of nodes, not {shown(nodes)}", "nodes")
    elif nodes is not None:
        for number, node in enumerate(nodes):
            if not isinstance(node, dict):
                _note(document, f"wants a node, as {{name: w1}}, not {shown(node)}", "nodes", number)
    gossip = _numbers(document)
    if document.wrong or gossip is None:
        raise ConfigError.several(sorted(document.wrong, key=lambda each: each.line or math.inf))
    mix = mixes.get(method) or MIXES[method]()  # clock and loss need not be there: they have no options
    exchange: Spec = replace(gossip, mix=mix)
    if any(given.get(key) == 0 for key in _PROBABILITIES):
        exchange = Nothing()
    return DpwaFile(exchange, None if nodes is None else len(nodes))


def _note(document: Document, text: str, *path: str | int) -> ConfigError:
    """Add a mistake to those of the document."""
    document.wrong.append(document.error(text, path))
    return document.wrong[-1]


def _flat(document: Document) -> Document:
    """Return the document as one mapping. Raises ConfigError."""
    if document.wrong:
        raise ConfigError.several(document.wrong)
    whole = document.value
    parts: list[tuple[Path, Any]] = [((), whole)] if isinstance(whole, dict) else []
    if isinstance(whole, list):
        parts = [((number,), each) for number, each in enumerate(whole)]
    if not whole or not parts:
        found = "is empty" if whole in (None, [], {}) else f"has {shown(whole)} alone"
        raise document.error(f"{found}: a file of dpwa is a list of keys with values, as - interpolation: clock")
    flat = Document({}, {(): document.place(())})
    for path, source in document.places.items():  # in the order of the file: the first of two has its place
        flat.places.setdefault(path if isinstance(whole, dict) else path[1:], source)
    for place, part in parts:
        if not isinstance(part, dict):
            flat.wrong.append(document.error(f"wants a key with a value, not {shown(part)}", place))
            continue
        for key, value in part.items():
            if key in flat.value:
                text = f"given twice (first on line {flat.place((key,)).line})"
                again = document.place((*place, key))
                flat.wrong.append(ConfigError(text, file=again.file, key=key, line=again.line))
            else:
                flat.value[key] = value
    return flat


def _chosen(document: Document) -> str:
    """Return the chosen method of interpolation, noting that there is none, or that its options are missing."""
    given = document.value
    method = given.get("interpolation")
    known = ", ".join(_METHODS)
    if "interpolation" not in given:
        near = [key for key in given if key not in _KEYS and nearest(key, _KEYS) == "did you mean interpolation?"]
        if not near:
            _note(document, f"is missing; choose one of {known}", "interpolation")
    elif not isinstance(method, str):
        _note(document, f"wants one of {known}, not {shown(method)}", "interpolation")
    elif method not in _METHODS:
        _note(document, f"unknown method {method[:60]!r}; {nearest(method, _METHODS)}", "interpolation")
    elif method not in given and _METHODS[method]:
        _note(document, f"{method} wants its options, {_example(method)}, which are missing", "interpolation")
    return str(method)


def _example(method: str) -> str:
    """Return the options of a method as they are written."""
    return f"{method}: {{{', '.join(f'{option}: ...' for option in _METHODS[method])}}}" if _METHODS[method] else "0"


def _mix(document: Document, method: str) -> Spec | None:
    """Return the mix that is a method with its options; None if there are mistakes, which are noted."""
    known, options = _METHODS[method], document.value[method]
    if options is None or (options == 0 and not isinstance(options, bool)):
        options = {}
    if not isinstance(options, dict):
        _note(document, f"wants {_example(method)}, not {shown(options)}", method)
        return None
    unknown = [option for option in options if option not in known]
    for option in unknown:
        _note(document, "unknown key; " + (nearest(option, known) if known else "it has no options"), method, option)
    missing = [] if unknown else [option for option in known if option not in options]
    for option in missing:
        _note(document, "is missing", method, option)
    if unknown or missing:
        return None
    mix = {method: {known[option]: value for option, value in options.items()}}
    places: dict[Path, Path] = {("mix", method, ours): (method, option) for option, ours in known.items()}
    made = _checked(document, {"mix": mix}, {**places, (): (method,)})
    return None if made is None else made.mix


def _numbers(document: Document) -> Gossip | None:
    """Return gossip as the numbers of the file say; None if there are mistakes, which are noted."""
    given = document.value
    both = [key for key in _PROBABILITIES if key in given]
    if len(both) > 1:
        _note(document, f"give {both[0]} or {both[1]}, not both", both[1])
    gossip: dict[str, Any] = dict(_ALWAYS)
    places: dict[Path, Path] = {(): ()}
    for key, option in _NUMBERS.items():
        if key not in given:
            continue
        value = given[key]
        if key in _PROBABILITIES and isinstance(value, int | float) and not isinstance(value, bool):
            if not 0 <= value <= 1:
                _note(document, f"must be between 0 and 1, not {value}", key)
            if not 0 < value <= 1:  # 0 is no gossip, for which `read_dpwa` has no exchange
                continue
        gossip[option], places[(option,)] = value, (key,)
    return _checked(document, gossip, places)


def _checked(document: Document, gossip: dict[str, Any], places: Mapping[Path, Path]) -> Gossip | None:
    """Return gossip with these options; None if there are mistakes, which are noted where `places` says that an option
    comes from."""

    def note(text: str, path: Path) -> ConfigError:
        path = path[2:]  # exchange.gossip
        while path not in places:
            path = path[:-1]
        return _note(document, text, *places[path])

    try:
        return cast("Gossip", exchange_of({"gossip": gossip}, note))
    except ConfigError:
        return None
