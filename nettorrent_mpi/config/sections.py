"""Defines the sections of a configuration, their defaults, and which values exclude each other.

Frozen dataclasses, so that rank 0 can read the file and the others are given what it found without loading pydantic,
which checks every value where a file is read (config.reading). What it asks for beyond a type stands in the
annotations, as `Bounds` and `Read`: making these loads nothing of it either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from nettorrent_mpi.config.mistakes import Mistake, nearest, shown
from nettorrent_mpi.plan import exchange_specs as choices
from nettorrent_mpi.plan import specs
from nettorrent_mpi.plan.data_specs import DATASETS, SYNTHETIC, wrong_option
from nettorrent_mpi.plan.specs import LayerSpec, Spec


class Bounds:
    """Bounds limit a value, in pydantic's words: gt, ge, lt, le, or min_length."""

    def __init__(self, **bounds: float):
        self._bounds = bounds

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        return {**handler(source), **self._bounds}


class Read:
    """Read converts what was written by a function of our own, which raises Mistake or Mistakes."""

    def __init__(self, read: Callable[[Any], Any]):
        self._read = read

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.no_info_plain_validator_function(self._read)


def _one_of(kinds: Mapping[str, type[Spec]], what: str) -> Read:
    def read(value: Any) -> Spec:
        from nettorrent_mpi.config.written import parse

        return parse(value, kinds, what)

    return Read(read)


def _pieces(value: Any) -> Any:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise Mistake(f"must be a whole number, at least 1, or auto, not {shown(value)}")


def _layout(value: Any) -> Any:
    if isinstance(value, Layout) or value in ("layers", "auto"):
        return value
    if not isinstance(value, dict):
        raise Mistake(f"must be layers, auto or a mapping with replicas, swarms or both, not {shown(value)}")
    from nettorrent_mpi.config.written import section

    return section(Layout, value)


Count = Annotated[int, Bounds(ge=1)]


@dataclass(frozen=True, kw_only=True)
class Section:
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "allow_inf_nan": False}


@dataclass(frozen=True, kw_only=True)
class Data(Section):
    """Data says which rows are trained on, and how they are prepared."""

    name: str  # one of plan.data_specs.DATASETS
    root: str | None = None  # the folder that holds mnist/ and so on; the file, for hdf5
    validation: Annotated[float, Bounds(ge=0, lt=1)] = 0.0  # the part of the training rows that is held back
    augment: tuple[Literal["flip", "crop"], ...] = ()
    partition: Literal["shared", "disjoint"] = "shared"  # disjoint: each replica trains on its own part of the rows
    mean: float | tuple[float, ...] | None = None  # subtracted from the pixels, one for all or one per channel
    std: float | tuple[float, ...] | None = None  # the pixels are divided by it
    transposed: bool = False  # the letters are stored column by column, as EMNIST publishes them
    rows: Count | None = None  # of synthetic data only, like the next three
    test_rows: Annotated[int, Bounds(ge=0)] | None = None
    shape: Annotated[tuple[Count, ...], Bounds(min_length=1)] | None = None
    classes: Annotated[int, Bounds(ge=2)] | None = None

    def __post_init__(self) -> None:
        if self.name not in DATASETS:
            hint = nearest(self.name, DATASETS)
            more = f"; {hint}" if hint.startswith("did") else ""
            raise Mistake(f"must be one of {', '.join(DATASETS)}, not {self.name or 'an empty text'}{more}", "name")
        spec = DATASETS[self.name]
        if spec.root is None and self.root is not None:
            raise Mistake(f"{self.name} needs no files: leave it out", "root")
        if spec.needs_root and self.root is None:
            raise Mistake(f"{self.name} needs {spec.root}; add root: ... under data", "root")
        wrong = wrong_option(self.name, vars(self))
        if wrong is not None:
            raise Mistake(f"is only for {wrong[1]}, not for {self.name}", wrong[0])
        if self.name == "synthetic":
            for option, default in SYNTHETIC.items():
                if getattr(self, option) is None:
                    object.__setattr__(self, option, default)  # still under construction: not yet visible without it
        if len(set(self.augment)) < len(self.augment):
            raise Mistake("names the same thing twice", "augment")
        for option, values in (("mean", self.mean), ("std", self.std)):
            if values == ():
                raise Mistake("must not be empty", option)
        stds = self.std if isinstance(self.std, tuple) else (self.std,)
        for std in stds:
            if std is not None and std <= 0:
                raise Mistake(f"must be more than 0, not {std}", "std")


@dataclass(frozen=True, kw_only=True)
class Model(Section):
    """Model describes the network. Every layer may have a name; a swarm counts its weight layers."""

    layers: Annotated[tuple[Annotated[LayerSpec, _one_of(specs.LAYERS, "layer")], ...], Bounds(min_length=1)]
    loss: Annotated[Spec, _one_of(specs.LOSSES, "loss")] = field(default_factory=specs.CrossEntropy)

    def __post_init__(self) -> None:
        if not any(layer.weighted for layer in self.layers):
            raise Mistake("has no layer with weights; add a linear, conv2d or residual layer", "layers")
        _distinct_names(self.layers, "layers")


@dataclass(frozen=True, kw_only=True)
class StopAt(Section):
    accuracy: Annotated[float, Bounds(gt=0, le=1)]


@dataclass(frozen=True, kw_only=True)
class Train(Section):
    """Train says how the network is trained. `epochs` is None where `steps` is given, and the other way round."""

    epochs: Count | None = None
    steps: Annotated[int, Bounds(ge=0)] | None = None  # 0: only the initial weights are saved
    batch_size: Count = 128  # rows for one update, whatever the number of ranks
    # Pieces of a mini-batch that follow each other through the pipeline. auto: 4; but 1 where there is a single stage,
    # so nothing to fill, unless batch norm takes its statistics of one piece.
    micro_batches: Annotated[int | Literal["auto"], Read(_pieces)] = "auto"
    optimizer: Annotated[Spec, _one_of(specs.OPTIMIZERS, "optimizer")] = field(default_factory=specs.Adam)
    schedule: Annotated[Spec, _one_of(specs.SCHEDULES, "schedule")] = field(default_factory=specs.Constant)
    clip_norm: Annotated[float, Bounds(gt=0)] | None = None  # longest allowed gradient of the whole network
    stop_at: StopAt | None = None
    report_every: Count = 50  # steps
    evaluate_every: Count = 1  # epochs
    checkpoint_every: Count = 1  # epochs; there is one at the end, too, and when a signal stops the run

    def __post_init__(self) -> None:
        if self.epochs is None and self.steps is None:
            object.__setattr__(self, "epochs", 10)  # still under construction: not yet visible without it
        if self.epochs is not None and self.steps is not None:
            raise Mistake("epochs and steps cannot both be given: leave one out", "steps")
        if self.micro_batches != "auto" and self.micro_batches > self.batch_size:
            raise Mistake(
                f"{self.micro_batches} pieces of a mini-batch of {self.batch_size} rows: "
                "make micro_batches smaller or batch_size larger",
                "micro_batches",
            )


@dataclass(frozen=True, kw_only=True)
class Swarm(Section):
    """A Swarm divides `layers` weight layers of each replica over a grid of rows x cols ranks."""

    layers: Count = 1
    rows: Count = 1
    cols: Count = 1


@dataclass(frozen=True, kw_only=True)
class Layout(Section):
    """Layout divides the ranks. Without swarms each replica has one per layer, sized by cost (`layout: layers`)."""

    replicas: Count = 1
    swarms: Annotated[tuple[Swarm, ...], Bounds(min_length=1)] | None = None


@dataclass(frozen=True, kw_only=True)
class Config(Section):
    """Config holds a whole configuration."""

    seed: Annotated[int, Bounds(ge=0)] = 1
    dtype: Literal["float32", "float64"] = "float32"
    device: Literal["auto", "cpu"] = "auto"
    kernels: Literal["auto", "fastest", "numpy"] = "auto"
    data: Data
    model: Model
    train: Train = field(default_factory=Train)
    layout: Annotated[Literal["layers", "auto"] | Layout, Read(_layout)] = "layers"
    pipeline: Annotated[Spec, _one_of(choices.PIPELINES, "pipeline")] = field(default_factory=choices.OneFOneB)
    exchange: Annotated[Spec, _one_of(choices.EXCHANGES, "exchange")] = field(default_factory=choices.Allreduce)
    output: str | None = None  # the run folder; `load` fills it in
    trace: bool = False

    @property
    def exact(self) -> bool:
        """Whether all replicas have the same weights after every step."""
        return isinstance(self.exchange, choices.Allreduce)

    def __post_init__(self) -> None:
        if isinstance(self.exchange, choices.Elite) and self.data.validation == 0:
            raise Mistake(
                "exchange elite needs it: the best replica is chosen on validation rows, never on the test set; "
                "add data.validation: 0.1",
                "data",
                "validation",
            )
        if isinstance(self.pipeline, choices.Async) and self.train.clip_norm is not None:
            raise Mistake(
                "is not possible with pipeline async: the norm of all stages' gradients is never there at one time; "
                "leave it out, or choose pipeline: 1f1b",
                "train",
                "clip_norm",
            )


def _distinct_names(layers: tuple[LayerSpec, ...], *path: str | int) -> None:
    names: set[str] = set()
    for index, layer in enumerate(layers):
        if layer.name in names:
            raise Mistake(f"two layers are called {layer.name}", *path, index, layer.kind, "name")
        if layer.name is not None:
            names.add(layer.name)
