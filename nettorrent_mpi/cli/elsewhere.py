"""Other machines than this one, which predictions are asked for: nodes, the link between them, and their memory."""

from __future__ import annotations

import re
from dataclasses import replace
from math import inf, isfinite
from typing import TYPE_CHECKING

from nettorrent_mpi.engine.profiles import Profiles, read_profiles
from nettorrent_mpi.plan.errors import ConfigError
from nettorrent_mpi.plan.performance import Link
from nettorrent_mpi.plan.records import dataclass

if TYPE_CHECKING:
    import argparse

BITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9, "tbit": 1e12}
TIMES = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}
BYTES = {"kb": 1e3, "kib": 2**10, "mb": 1e6, "gb": 1e9, "tb": 1e12, "mib": 2**20, "gib": 2**30, "tib": 2**40}
MOST_RANKS = 10_000_000


@dataclass(frozen=True)
class Elsewhere:
    """An Elsewhere is the machine that a prediction is for: `ranks` are as many as its nodes have cores, unless given
    otherwise; `memory` is that of a node, in bytes. None: as on this machine."""

    ranks: int | None = None
    node: int | None = None
    link: Link | None = None
    memory: float | None = None

    def known(self, profile: str | None) -> Profiles:
        """Return what is known of it: ranks compute as on this machine."""
        return replace(read_profiles(profile), node=self.node, link=self.link)


def elsewhere(args: argparse.Namespace) -> Elsewhere:
    """Read --nodes, --link, --memory and --ranks. Raises ConfigError."""
    ranks, node, nodes = args.ranks, None, 1
    if ranks is not None and not 1 <= ranks <= MOST_RANKS:
        raise ConfigError(f"--ranks {ranks}: from 1 to {MOST_RANKS:,}")
    if args.nodes is not None:
        found = re.fullmatch(r"(\d+)x(\d+)", args.nodes, re.ASCII)
        nodes, node = (int(found[1]), int(found[2])) if found else (0, 0)
        if not 1 <= nodes * node <= MOST_RANKS:
            raise ConfigError(f"--nodes {args.nodes}: write nodes x cores of each, as 64x48; {MOST_RANKS:,} at most")
        ranks = nodes * node if ranks is None else ranks
        if ranks > nodes * node:
            raise ConfigError(f"--ranks {ranks}: {args.nodes} nodes have {nodes * node} cores; raise --nodes")
    if args.link is not None and nodes == 1:
        raise ConfigError("--link is for several nodes: give --nodes, as 64x48, too")
    memory = None if args.memory is None else _sized(args.memory)
    return Elsewhere(ranks, node, None if args.link is None else _linked(args.link), memory)


def _linked(text: str) -> Link:
    rate, latency, burst, *more = [*text.split(","), "", ""] if text.count(",") < 2 else text.split(",")
    link = Link(
        _number(latency, TIMES) if latency else Link.latency,
        _number(rate.removesuffix("/s"), BITS) / 8,
        _number(burst, BYTES) if burst else Link.burst,
    )
    if any(more) or not (0 < link.bandwidth < inf and 0 <= link.latency < inf and 0 <= link.burst < inf):
        raise ConfigError(f"--link {text}: write the rate of a node's link and the latency, as 100Gbit,2us")
    return link


def _sized(text: str) -> float:
    size = _number(text, BYTES)
    if not 0 < size < inf:
        raise ConfigError(f"--memory {text}: write a node's memory, as 256GB")
    return size


def _number(text: str, units: dict[str, float]) -> float:
    """Return a number with one of the units; not a number if it is none."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zµ]+)", text.strip().lower())
    value = float(found[1]) * units.get(found[2], float("nan")) if found else float("nan")
    return value if isfinite(value) else float("nan")
