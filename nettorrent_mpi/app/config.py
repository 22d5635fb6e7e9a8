"""The configuration: what may be asked for, with its defaults; reading it from YAML, and writing it complete.

Every mistake is a ConfigError that tells file, line, key and remedy in one sentence. Values that cannot be had are not
accepted, so nothing in a configuration is ever silently without effect.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, TypeAdapter, ValidationError, model_validator

from nettorrent_mpi.app import overrides as changes
from nettorrent_mpi.app import yaml_lines
from nettorrent_mpi.app.default import DEFAULT, SHIPPED
from nettorrent_mpi.app.mistakes import explain
from nettorrent_mpi.app.options import (
    WEIGHTED,
    Exchange,
    Layer,
    Loss,
    Mistake,
    Mistakes,
    Optimizer,
    Pipeline,
    Schedule,
    nearest,
    plain,
    shown,
    strictly,
)  # fmt: skip
from nettorrent_mpi.app.yaml_lines import Document, Path
from nettorrent_mpi.engine import choices
from nettorrent_mpi.nn import specs
from nettorrent_mpi.nn.specs import LayerSpec
from nettorrent_mpi.plan.errors import ConfigError

Count = Annotated[int, Field(ge=1)]
SYNTHETIC: dict[str, Any] = {"rows": 10_000, "test_rows": 1_000, "shape": (28, 28, 1), "classes": 10}  # unless told


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Data(Section):
    """Which rows are trained on, and how they are prepared."""

    name: Literal["digits", "mnist", "fashion_mnist", "letters", "cifar10", "hdf5", "synthetic"]
    root: str | None = None  # the folder that holds mnist/ and so on; the file, for hdf5
    validation: Annotated[float, Field(ge=0, lt=1)] = 0.0  # the part of the training rows that is held back
    augment: tuple[Literal["flip", "crop"], ...] = ()
    partition: Literal["shared", "disjoint"] = "shared"  # disjoint: each replica trains on its own part of the rows
    mean: float | tuple[float, ...] | None = None  # taken away from the pixels, one for all or one per channel
    std: float | tuple[float, ...] | None = None  # the pixels are divided by it
    transposed: bool = False  # the letters are stored column by column, as EMNIST publishes them
    rows: Count | None = None  # of synthetic data only, like the next three
    test_rows: Annotated[int, Field(ge=0)] | None = None
    shape: Annotated[tuple[Count, ...], Field(min_length=1)] | None = None
    classes: Annotated[int, Field(ge=2)] | None = None

    @model_validator(mode="after")
    def _fits(self) -> Data:
        built_in = self.name in ("digits", "synthetic")
        if built_in and self.root is not None:
            raise Mistake(f"{self.name} needs no files: leave it out", "root")
        if not built_in and self.root is None:
            what = "file" if self.name == "hdf5" else "folder that holds the data"
            raise Mistake(f"{self.name} needs the {what}; add root: ... under data", "root")
        for option, default in SYNTHETIC.items():
            if self.name == "synthetic" and getattr(self, option) is None:
                object.__setattr__(self, option, default)  # still being made: nobody has seen it without
            elif self.name != "synthetic" and getattr(self, option) is not None:
                raise Mistake(f"is only for synthetic data, not for {self.name}", option)
        if self.transposed and self.name != "letters":
            raise Mistake(f"is only for letters, not for {self.name}", "transposed")
        if len(set(self.augment)) < len(self.augment):
            raise Mistake("names the same thing twice", "augment")
        for option, values in (("mean", self.mean), ("std", self.std)):
            if values == ():
                raise Mistake("must not be empty", option)
        stds = self.std if isinstance(self.std, tuple) else (self.std,)
        for std in stds:
            if std is not None and std <= 0:
                raise Mistake(f"must be more than 0, not {std}", "std")
        return self


class Model(Section):
    """The network. Every layer may carry a name; a swarm counts its weight layers."""

    layers: Annotated[tuple[Layer, ...], Field(min_length=1)]
    loss: Loss = specs.CrossEntropy()

    @model_validator(mode="after")
    def _fits(self) -> Model:
        if not any(isinstance(layer, WEIGHTED) for layer in self.layers):
            raise Mistake("has no layer with weights; add a linear, conv2d or residual layer", "layers")
        _distinct_names(self.layers, "layers")
        return self


def _pieces(value: Any) -> Any:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise Mistake(f"must be a whole number, at least 1, or auto, not {shown(value)}")


class StopAt(Section):
    accuracy: Annotated[float, Field(gt=0, le=1)]


class Train(Section):
    """How the network is trained. `epochs` is None where `steps` is given, and the other way round."""

    epochs: Count | None = None
    steps: Annotated[int, Field(ge=0)] | None = None  # 0: only the initial weights are saved
    batch_size: Count = 128  # rows for one update, whatever the number of ranks
    # Pieces of a mini-batch that follow each other through the pipeline. auto: 4; but 1 where there is a single stage,
    # so nothing to fill, unless batch norm takes its statistics of one piece.
    micro_batches: Annotated[int | Literal["auto"], PlainValidator(_pieces)] = "auto"
    optimizer: Optimizer = specs.Adam()
    schedule: Schedule = specs.Constant()
    clip_norm: Annotated[float, Field(gt=0)] | None = None  # longest allowed gradient of the whole network
    stop_at: StopAt | None = None
    report_every: Count = 50  # steps
    evaluate_every: Count = 1  # epochs
    checkpoint_every: Count = 1  # epochs; there is one at the end, too, and when a signal stops the run

    @model_validator(mode="before")
    @classmethod
    def _ten_epochs(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("epochs") is None and given.get("steps") is None:
            return {**given, "epochs": 10}
        return given

    @model_validator(mode="after")
    def _fits(self) -> Train:
        if self.epochs is not None and self.steps is not None:
            raise Mistake("epochs and steps cannot both be given: leave one out", "steps")
        if self.micro_batches != "auto" and self.micro_batches > self.batch_size:
            raise Mistake(
                f"{self.micro_batches} pieces of a mini-batch of {self.batch_size} rows: "
                "make micro_batches smaller or batch_size larger",
                "micro_batches" if "micro_batches" in self.model_fields_set else "batch_size",
            )
        return self


class Swarm(Section):
    """The ranks of one stage in one replica: `layers` weight layers on a grid of rows x cols."""

    layers: Count = 1
    rows: Count = 1
    cols: Count = 1


class Layout(Section):
    """Without swarms each replica has one swarm per layer, sized by cost, as in `layout: layers`."""

    replicas: Count = 1
    swarms: Annotated[tuple[Swarm, ...], Field(min_length=1)] | None = None


def _layout(value: Any) -> Any:
    if isinstance(value, Layout) or value in ("layers", "auto"):
        return value
    if not isinstance(value, dict):
        raise Mistake(f"must be layers, auto or a mapping with replicas, swarms or both, not {shown(value)}")
    try:
        return strictly(TypeAdapter(Layout), value)
    except ValidationError as error:
        raise Mistakes(error) from None


class Config(Section):
    """A whole configuration."""

    seed: Annotated[int, Field(ge=0)] = 1
    dtype: Literal["float32", "float64"] = "float32"
    device: Literal["auto", "cpu"] = "auto"
    kernels: Literal["auto", "fastest", "numpy"] = "auto"
    data: Data
    model: Model
    train: Train = Train(epochs=10)
    layout: Annotated[Literal["layers", "auto"] | Layout, PlainValidator(_layout)] = "layers"
    pipeline: Pipeline = choices.OneFOneB()
    exchange: Exchange = choices.Allreduce()
    output: str | None = None  # the run folder; `load` fills it in
    trace: bool = False

    @property
    def exact(self) -> bool:
        """Do all replicas have the same weights after every step?"""
        return isinstance(self.exchange, choices.Allreduce)

    @model_validator(mode="after")
    def _fits(self) -> Config:
        if isinstance(self.exchange, choices.Elite) and self.data.validation == 0:
            raise Mistake(
                "exchange elite needs it: the best replica is chosen on validation rows, never on the test set; "
                "add data.validation: 0.1",
                "data",
                "validation",
            )
        if isinstance(self.pipeline, choices.Async) and self.train.clip_norm is not None:
            raise Mistake(
                "cannot be had with pipeline async: the norm of all stages' gradients is never there at one time; "
                "leave it out, or choose pipeline: 1f1b",
                "train",
                "clip_norm",
            )
        return self


# Every key of every section by its path, for the hints after an unknown key; options.py knows those of specs.
_KNOWN: dict[Path, list[str]] = {
    (): list(Config.model_fields),
    ("data",): list(Data.model_fields),
    ("model",): list(Model.model_fields),
    ("train",): list(Train.model_fields),
    ("train", "stop_at"): list(StopAt.model_fields),
    ("layout",): list(Layout.model_fields),
    ("layout", "swarms", "*"): list(Swarm.model_fields),
    ("exchange", "gossip", "consensus"): [f.name for f in fields(choices.Consensus)],
}


def load(path: str | None, overrides: Sequence[str] = ()) -> Config:
    """The configuration in the file at `path` (None: DEFAULT), changed by each KEY=VALUE of `overrides`.

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
    """The configuration in `text`, which messages call `file`; `output` is the run folder where it names none."""
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
    """The configuration that `to_plain` wrote."""
    return _check(Document(data))


def _check(document: Document) -> Config:
    try:
        return Config.model_validate_json(json.dumps(document.value), strict=True)
    except ValidationError as error:
        found = explain(error, document.value, _KNOWN)
    # the first in the order of the file; what --set brought comes after it
    found.sort(key=lambda f: document.place(f.path).line or math.inf)
    first, others = found[0], len(found) - 1
    more = f" (and {others} more mistake{'s' if others > 1 else ''})" if others else ""
    raise document.error(first.text + more, first.path)


def to_plain(config: Config) -> dict[str, Any]:
    """`config` as plain data, complete and resolved: `from_plain` gives an equal Config."""
    data: dict[str, Any] = plain(config)
    if config.data.name != "synthetic":
        for option in SYNTHETIC:
            del data["data"][option]
    del data["train"]["steps" if config.train.steps is None else "epochs"]
    if isinstance(config.layout, Layout) and config.layout.swarms is None:
        del data["layout"]["swarms"]
    return data


def to_yaml(config: Config) -> str:
    """`config` as the text of a file, complete and resolved: `load` gives an equal Config."""
    return yaml_lines.write(to_plain(config))


def digest(config: Config) -> str:
    """SHA-256, in hexadecimal, of everything but the output folder: the same wherever the same is trained."""
    data = {key: value for key, value in to_plain(config).items() if key != "output"}
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _distinct_names(layers: tuple[LayerSpec, ...], *path: str | int) -> None:
    names: set[str] = set()
    for index, layer in enumerate(layers):
        if layer.name in names:
            raise Mistake(f"two layers are called {layer.name}", *path, index, layer.kind, "name")
        if layer.name is not None:
            names.add(layer.name)


def _no_file(path: str) -> str:
    beside = FilePath(path).parent
    near = []
    if beside.is_dir():
        files = sorted(str(p) for p in beside.iterdir() if p.suffix in (".yaml", ".yml"))
        near = [hint for hint in [nearest(path, files)] if hint.startswith("did")] if files else []
    return "there is no such file" + (f"; {near[0]}" if near else "")
