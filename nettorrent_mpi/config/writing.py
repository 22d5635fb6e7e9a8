"""Writes a configuration as plain data or YAML. Only YAML needs more than the standard library."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from nettorrent_mpi.config.sections import Config, Layout
from nettorrent_mpi.plan import exchange_specs as choices
from nettorrent_mpi.plan import specs
from nettorrent_mpi.plan.data_specs import DATASETS, SYNTHETIC
from nettorrent_mpi.plan.specs import LayerSpec, Spec


def plain(value: Any) -> Any:
    """Convert `value` to what YAML and JSON can hold: tuples to lists, specs to {kind: options}."""
    if isinstance(value, LayerSpec):
        return plain(specs.to_plain(value))
    if isinstance(value, Spec):
        options = {f.name: plain(getattr(value, f.name)) for f in fields(value)}
        return options if isinstance(value, choices.Consensus) else {value.kind: options}
    if is_dataclass(value):  # a section
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def to_plain(config: Config) -> dict[str, Any]:
    """Convert `config` to plain data, complete and resolved: `from_plain` returns an equal Config."""
    data: dict[str, Any] = plain(config)
    spec = DATASETS.get(config.data.name)  # None: arrays that a Python script gives
    for option in SYNTHETIC:
        if spec is None or option not in spec.options:
            del data["data"][option]
    del data["train"]["steps" if config.train.steps is None else "epochs"]
    if isinstance(config.layout, Layout) and config.layout.swarms is None:
        del data["layout"]["swarms"]
    return data


def model_json(config: Config) -> str:
    """Write the network and its loss as JSON, for model.h5."""
    loss = config.model.loss
    model = {"layers": [specs.to_plain(layer) for layer in config.model.layers], "loss": {loss.kind: loss.options()}}
    return json.dumps(model)


def to_yaml(config: Config) -> str:
    """Write `config` as the text of a file, complete and resolved: `load` returns an equal Config."""
    from nettorrent_mpi.config import yaml_lines

    return yaml_lines.write(to_plain(config))
