"""Makes a configuration from the keyword arguments of the Python interface."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal, TypeAlias, TypedDict

from nettorrent_mpi.config.sections import Config, Data, Train
from nettorrent_mpi.config.translation import meant, nearest, plainly
from nettorrent_mpi.config.writing import plain, to_plain
from nettorrent_mpi.plan.errors import ConfigError
from nettorrent_mpi.plan.specs import LayerSpec, Spec

Choice: TypeAlias = Spec | str | Mapping[str, Any]  # nt.Adam(0.002), "adam" or {"adam": {"lr": 0.002}}


class Settings(TypedDict, total=False):
    """Settings say how a network is trained: the keys of a configuration file without sections, with its defaults."""

    loss: Choice  # "cross_entropy"
    optimizer: Choice  # "adam"
    schedule: Choice  # of the learning rate: "constant"
    batch_size: int  # rows for one update, whatever the number of ranks: 128
    micro_batches: int | Literal["auto"]  # pieces of a mini-batch that follow each other through the pipeline
    epochs: int  # the length of the run, which the learning-rate schedule spans; or `steps`
    steps: int
    clip_norm: float  # the longest gradient of the whole network
    stop_at: float | Mapping[str, Any]  # the accuracy (a fraction) that ends it; {"patience": 3, "metric": "loss"}
    report_every: int  # steps from one record to the next: 50
    evaluate_every: int  # epochs from one evaluation to the next: 1
    checkpoint: Mapping[str, Any]  # {"every_seconds": 600, "every_epochs": 1, "keep": 2}, where there is an output
    validation: float  # the fraction of the training rows that is held back: 0
    augment: Sequence[str]  # random changes of training images: "flip", "crop"
    partition: Literal["shared", "disjoint"]  # disjoint: each replica trains on its own part of the rows
    layout: str | Mapping[str, Any]  # "layers", "auto", or {"replicas": 2, "swarms": [{"rows": 2, "cols": 1}, ...]}
    pipeline: Choice  # "1f1b"
    exchange: Choice  # how replicas agree: "allreduce"
    redundancy: Choice  # copies of the state at a buddy: "auto", "none" or {"buddy": {"every_steps": "auto"}}
    seed: int  # every random number comes from it: 1
    dtype: Literal["float32", "float64", "tf32", "bfloat16"]
    device: Literal["auto", "cpu", "gpu"]
    kernels: Literal["auto", "fastest", "numpy"]
    watchdog: str | Mapping[str, Any]  # "none", or {"report": 60, "end": 600}, seconds without advance
    trace: bool


_SECTIONS = {
    "loss": "model",
    **dict.fromkeys(Data.__annotations__, "data"),
    **dict.fromkeys(Train.__annotations__, "train"),
}
_EITHER = {"epochs": "steps", "steps": "epochs"}


def _correction(name: str) -> str:
    """Say what is to be given in place of an unknown setting."""
    meaning = meant(name, Settings.__annotations__, "key")
    if meaning.startswith("train.optimizer."):
        kind, option = meaning.split(".")[2:]
        return f"it is an option of the optimizer: give optimizer={{{kind!r}: {{{option!r}: ...}}}}"
    return nearest(name, Settings.__annotations__, "key")


def key_of(word: str) -> str:
    """Return the key of a configuration that a word means, or a sentence about a word of other programs, or nothing."""
    sections = {"": Config, "train.": Train, "data.": Data}
    keys = [place + field.name for place, section in sections.items() for field in fields(section)]
    return next((key for key in keys if plainly(key) == plainly(word)), meant(word, (), "key"))


def configure(
    network: Config | Sequence[LayerSpec], data: Mapping[str, Any] | None, settings: Mapping[str, Any], *, given: bool
) -> Config:
    """Make the configuration of a network with these settings, which override those of a given configuration.

    `data`: the data section; None: the configuration's. `given`: the rows do not come from it, but from the caller.
    Raises ConfigError.
    """
    from nettorrent_mpi.config import reading

    asked = to_plain(network) if isinstance(network, Config) else {"model": {"layers": plain(network)}}
    if data is not None:
        asked["data"] = dict(data)
    elif given:
        kept = ("validation", "augment", "partition")
        asked["data"] = {k: v for k, v in asked.get("data", {}).items() if k in kept} | {"name": "digits"}
    if "epochs" in settings and "steps" in settings:
        raise ConfigError("epochs and steps cannot both be given: leave one out")
    for name, value in settings.items():
        if name not in Settings.__annotations__:
            raise ConfigError(f"unknown setting {name}; {_correction(name)}")
        section = _SECTIONS.get(name)
        place = asked if section is None else asked.setdefault(section, {})
        place[name] = {"accuracy": value} if name == "stop_at" and isinstance(value, int | float) else plain(value)
        if name in _EITHER:
            place.pop(_EITHER[name], None)
    config = reading.from_plain(asked)
    if given:
        object.__setattr__(config.data, "name", "arrays")  # still under construction: not yet visible with another name
    return config
