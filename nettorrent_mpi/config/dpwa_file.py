"""Reads a configuration of dpwa (github.com/loudinthecloud/dpwa) as gossip.

dpwa's file is a list of mappings with one key each, or one mapping:

    nodes               names, hosts, ports         the launcher starts the ranks: only how many they are counts
    fetch_probability   or pull_probability         gossip.probability
    timeout_ms                                      gossip.deadline
    interpolation       constant, clock, loss, ...  gossip.mix
    constant: {value: 0.5}, clock: 0, ...           that mix's options
    divergence_threshold                            gossip.divergence_threshold
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

from nettorrent_mpi.config import yaml_lines
from nettorrent_mpi.config.mistakes import shown
from nettorrent_mpi.config.reading import exchange_of, text_of
from nettorrent_mpi.config.translation import nearest
from nettorrent_mpi.config.yaml_lines import Document, Path
from nettorrent_mpi.plan.exchange_specs import MIXES, Gossip

_PROBABILITIES = ("fetch_probability", "pull_probability")
_KEYS = ("nodes", *_PROBABILITIES, "timeout_ms", "interpolation", "divergence_threshold")
# dpwa's methods of interpolation; push_sum is none of them.
_METHODS = [name for name in MIXES if name != "push_sum"]
# A rank exchanges with one other, drawn by dpwa's scores, and merges it after its step, at its own learning rate.
_ALWAYS = {"pairing": "random", "part": 1, "overlap": True, "withhold": 0, "rate_factor": 1}


class DpwaFile(NamedTuple):
    """A DpwaFile has the gossip that a file of dpwa describes, and the number of its nodes, None if it names none."""

    gossip: Gossip
    nodes: int | None


def read_dpwa(path: str) -> DpwaFile:
    """Read dpwa's configuration file. Raises ConfigError, which names the key and line."""
    document = yaml_lines.read(text_of(path), path)
    if document.wrong:
        raise document.wrong[0]
    given = _flat(document)
    for key, (_, place) in given.items():
        if key not in (*_KEYS, *_METHODS):
            raise document.error(f"unknown key; {nearest(key, [*_KEYS, *_METHODS])}", place)
    method, where = given.get("interpolation", (None, ()))
    if method not in _METHODS:
        raise document.error(f"interpolation is missing or none of {', '.join(_METHODS)}", where)
    gossip: dict[str, Any] = dict(_ALWAYS)
    places: dict[str, Path] = {}
    options, place = given.get(method, ({}, ()))
    gossip["mix"], places["mix"] = {method: {} if options in (0, None) else options}, place
    probabilities = [key for key in _PROBABILITIES if key in given]
    if len(probabilities) > 1:
        raise document.error(f"give {probabilities[0]} or {probabilities[1]}, not both", given[probabilities[1]][1])
    for key, option in [*((key, "probability") for key in probabilities), ("timeout_ms", "deadline")]:
        if key in given:
            gossip[option], places[option] = given[key]
    if "divergence_threshold" in given:
        gossip["divergence_threshold"], places["divergence_threshold"] = given["divergence_threshold"]
    for option, path_ in places.items():  # so that mistakes name dpwa's line
        document.places[("exchange", "gossip", option)] = document.place(path_)
    spec = cast("Gossip", exchange_of({"gossip": gossip}, document))
    nodes, place = given.get("nodes", (None, ()))
    if nodes is not None and not isinstance(nodes, list):
        raise document.error(f"wants a list of nodes, not {shown(nodes)}", place)
    return DpwaFile(spec, None if nodes is None else len(nodes))


def _flat(document: Document) -> dict[str, tuple[Any, Path]]:
    """Return the value of each key, and its place."""
    whole = document.value
    found: dict[str, tuple[Any, Path]] = {}
    parts: list[tuple[Path, Any]] = [((), whole)] if isinstance(whole, dict) else []
    if isinstance(whole, list):
        parts = [((number,), each) for number, each in enumerate(whole)]
    if not parts:
        raise document.error(f"wants a list of keys with values, as dpwa's, not {shown(whole)}")
    for place, part in parts:
        if not isinstance(part, dict):
            raise document.error(f"wants a key with a value, not {shown(part)}", place)
        for key, value in part.items():
            if key in found:
                raise document.error(f"{key} is given twice", (*place, key))
            found[key] = value, (*place, key)
    return found
