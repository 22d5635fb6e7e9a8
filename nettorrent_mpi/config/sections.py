"""Defines the sections of a configuration, their defaults, and which values exclude each other.

Frozen dataclasses, so that rank 0 can read the file and the others are given what it found without loading pydantic,
which checks every value where a file is read (config.reading). What it asks for beyond a type stands in the
annotations, as `Bounds` and `Read`: making these loads nothing of it either.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import field
from math import prod
from typing import Annotated, Any, ClassVar, Literal

from nettorrent_mpi.config.mistakes import Mistake, raise_all, shown
from nettorrent_mpi.plan import exchange_specs as choices
from nettorrent_mpi.plan import specs
from nettorrent_mpi.plan.data_specs import DATASETS, SYNTHETIC, wrong_options
from nettorrent_mpi.plan.records import dataclass
from nettorrent_mpi.plan.specs import MOST, LayerSpec, Residual, Spec


class Bounds:
    """Bounds limit a value, in pydantic's words: gt, ge, lt, le, or min_length."""

    def __init__(self, **bounds: float):
        self.bounds = bounds

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        return {**handler(source), **self.bounds}


class Read:
    """Read converts what was written by a function of our own, which raises Mistake or Mistakes."""

    def __init__(self, read: Callable[[Any], Any]):
        self._read = read

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.no_info_plain_validator_function(self._read)


class OneOf(Read):
    """OneOf reads the name of one of some specs, or a name with its options."""

    def __init__(self, kinds: Mapping[str, type[Spec]], what: str):
        def read(value: Any) -> Spec:
            from nettorrent_mpi.config.written import parse

            return parse(value, kinds, what)

        super().__init__(read)
        self.kinds = kinds


def _data_set(value: Any) -> str:
    if isinstance(value, str) and value in DATASETS:
        return value
    from nettorrent_mpi.config.translation import nearest

    given = value or "an empty text" if isinstance(value, str) else shown(value)
    hint = nearest(value, DATASETS, "data", listed=False) if isinstance(value, str) else ""
    raise Mistake(f"must be one of {', '.join(DATASETS)}, not {given}" + (f"; {hint}" if hint else ""))


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


def watchdog_times(value: Any) -> Any:
    """Check the times of a watchdog: WatchdogTimes, their mapping, or "none". Raises Mistake or Mistakes."""
    if isinstance(value, WatchdogTimes) or value == "none":
        return value
    if not isinstance(value, dict):
        raise Mistake(f"must be none or a mapping with report, end or both, not {shown(value)}")
    from nettorrent_mpi.config.written import section

    return section(WatchdogTimes, value)


def _unexpanded(path: str | None, option: str) -> Iterator[Mistake]:
    """Yield a mistake where a path has a variable in it as shells do."""
    if path is not None and re.search(r"\$[{\w]", path):
        yield Mistake(f"{path}: variables are not replaced in a configuration; write the path itself", option)


MOST_LAYERS = 1_000
Count = Annotated[int, Bounds(ge=1, le=MOST)]


@dataclass(frozen=True, kw_only=True)
class Section:
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "allow_inf_nan": False}

    def __post_init__(self) -> None:
        raise_all(list(self._mistakes()))

    def _mistakes(self) -> Iterator[Mistake]:
        """Yield what is wrong about values that are right one by one."""
        return iter(())


@dataclass(frozen=True, kw_only=True)
class Data(Section):
    """Data says which rows are trained on, and how they are prepared."""

    name: Annotated[str, Read(_data_set)]  # the data set
    root: str | None = None  # the folder that holds mnist/ and so on; the file, for hdf5
    validation: Annotated[float, Bounds(ge=0, lt=1)] = 0.0  # the part of the training rows that is held back
    augment: tuple[Literal["flip", "crop"], ...] = ()  # random mirroring, shifts by up to 4 pixels
    partition: Literal["shared", "disjoint"] = "shared"  # disjoint: each replica trains on its own part of the rows
    mean: float | tuple[float, ...] | None = None  # subtracted from the pixels, one for all or one per channel
    std: float | tuple[float, ...] | None = None  # the pixels are divided by it
    transposed: bool = False  # the images are stored column by column, as EMNIST publishes them
    rows: Count | None = None  # training rows of synthetic data
    test_rows: Annotated[int, Bounds(ge=0, le=MOST)] | None = None  # test rows of synthetic data
    shape: Annotated[tuple[Count, ...], Bounds(min_length=1)] | None = None  # of a row of synthetic data
    classes: Annotated[int, Bounds(ge=2, le=MOST)] | None = None  # of synthetic data

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name == "synthetic":
            for option, default in SYNTHETIC.items():
                if getattr(self, option) is None:
                    object.__setattr__(self, option, default)  # still under construction: not yet visible without it

    def _mistakes(self) -> Iterator[Mistake]:
        spec = DATASETS[self.name]
        if spec.root is None and self.root is not None:
            yield Mistake(f"{self.name} needs no files: leave it out", "root")
        if spec.needs_root and self.root is None:
            yield Mistake(f"{self.name} needs {spec.root}; add root: ... under data", "root")
        for option, owners in wrong_options(self.name, vars(self)):
            yield Mistake(f"is only for {owners}, not for {self.name}", option)
        if self.shape is not None and prod(self.shape) > MOST:
            yield Mistake(f"makes rows of {prod(self.shape):.2g} numbers: {MOST:,} is the most", "shape")
        if len(set(self.augment)) < len(self.augment):
            yield Mistake("names the same thing twice", "augment")
        yield from _unexpanded(self.root, "root")
        for option, values in (("mean", self.mean), ("std", self.std)):
            if values == ():
                yield Mistake("must not be empty", option)
        stds = self.std if isinstance(self.std, tuple) else (self.std,)
        for std in stds:
            if std is not None and std <= 0:
                yield Mistake(f"must be more than 0, not {std}", "std")


def _count(layer: LayerSpec) -> int:
    return 1 + (sum(_count(inner) for inner in (*layer.layers, *layer.shortcut)) if isinstance(layer, Residual) else 0)


@dataclass(frozen=True, kw_only=True)
class Model(Section):
    """Model describes the network. Every layer may have a name; a swarm counts its weight layers."""

    # The layers, from the inputs to the outputs.
    layers: Annotated[tuple[Annotated[LayerSpec, OneOf(specs.LAYERS, "layer")], ...], Bounds(min_length=1)]
    # The number that training makes small.
    loss: Annotated[Spec, OneOf(specs.LOSSES, "loss")] = field(default_factory=specs.CrossEntropy)

    def _mistakes(self) -> Iterator[Mistake]:
        if not any(layer.weighted for layer in self.layers):
            yield Mistake("has no layer with weights; add a linear, conv2d or residual layer", "layers")
        count = sum(_count(layer) for layer in self.layers)
        if count > MOST_LAYERS:
            yield Mistake(
                f"has {count:,} layers, those inside of others included: {MOST_LAYERS:,} is the most", "layers"
            )
        names: set[str] = set()
        for index, layer in enumerate(self.layers):
            if layer.name in names:
                yield Mistake(f"two layers are called {layer.name}", "layers", index, layer.kind, "name")
            if layer.name is not None:
                names.add(layer.name)


@dataclass(frozen=True, kw_only=True)
class StopAt(Section):
    """StopAt ends a training before its last epoch: when an accuracy is reached, or when nothing has improved for a
    while, and then the best network is kept. Both are measured on the validation rows, or the test rows where there are
    none."""

    accuracy: Annotated[float, Bounds(gt=0, le=1)] | None = None  # that is enough
    patience: Count | None = None  # evaluations one after another without improvement
    metric: Literal["accuracy", "loss"] = "accuracy"  # what has to improve

    def _mistakes(self) -> Iterator[Mistake]:
        if self.accuracy is None and self.patience is None:
            yield Mistake("give accuracy, patience or both", "accuracy")
        if self.metric != "accuracy" and self.patience is None:
            yield Mistake("is what has to improve within patience: give that, too", "metric")


@dataclass(frozen=True, kw_only=True)
class Train(Section):
    """Train says how the network is trained. `epochs` is None where `steps` is given, and the other way round."""

    epochs: Count | None = None  # how often training goes through all rows; None: 10, unless steps is given
    steps: Annotated[int, Bounds(ge=0, le=MOST)] | None = None  # updates; 0: only the initial weights are saved
    batch_size: Count = 128  # rows for one update, whatever the number of ranks
    # Pieces of a mini-batch that follow each other through the pipeline. auto: 4; but 1 where there is a single stage,
    # so nothing to fill, unless batch norm takes its statistics of one piece; with zero_bubble 1 to 4 for each stage.
    # In a single stage a number of them only saves memory: linear layers whose activations take no more of it than
    # weights and gradients compute a mini-batch at once.
    micro_batches: Annotated[int | Literal["auto"], Read(_pieces)] = "auto"
    # The rule of an update.
    optimizer: Annotated[Spec, OneOf(specs.OPTIMIZERS, "optimizer")] = field(default_factory=specs.Adam)
    # The learning rate over the run.
    schedule: Annotated[Spec, OneOf(specs.SCHEDULES, "schedule")] = field(default_factory=specs.Constant)
    clip_norm: Annotated[float, Bounds(gt=0)] | None = None  # longest allowed gradient of the whole network
    stop_at: StopAt | None = None  # an end before the last epoch
    report_every: Count = 50  # steps from one report to the next
    evaluate_every: Count = 1  # epochs from one evaluation to the next

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs is None and self.steps is None:
            object.__setattr__(self, "epochs", 10)  # still under construction: not yet visible without it

    def _mistakes(self) -> Iterator[Mistake]:
        if self.epochs is not None and self.steps is not None:
            yield Mistake("epochs and steps cannot both be given: leave one out", "steps")
        if self.micro_batches != "auto" and self.micro_batches > self.batch_size:
            yield Mistake(
                f"{self.micro_batches} pieces of a mini-batch of {self.batch_size} rows: "
                "make micro_batches smaller or batch_size larger",
                "micro_batches",
            )


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Section):
    """Checkpoint says when the training state is saved: whenever one of the intervals is over, at the end, and when a
    signal stops the run."""

    every_steps: Count | None = None  # steps from one checkpoint to the next
    every_seconds: Annotated[float, Bounds(gt=0)] | None = 600.0  # seconds from one to the next
    every_epochs: Count | None = 1  # epochs from one to the next
    keep: Count = 2  # how many of the newest ones stay: the second in case the first cannot be read


@dataclass(frozen=True, kw_only=True)
class Swarm(Section):
    """A Swarm divides `layers` weight layers of each replica over a grid of rows x cols ranks."""

    layers: Count = 1  # layers with weights, in order
    rows: Count = 1  # parts of the mini-batch's rows
    cols: Count = 1  # parts of each layer's neurons or filters


@dataclass(frozen=True, kw_only=True)
class Layout(Section):
    """Layout divides the ranks. Without swarms each replica has one per layer, sized by cost (`layout: layers`)."""

    replicas: Count = 1  # copies of the whole pipeline
    swarms: Annotated[tuple[Swarm, ...], Bounds(min_length=1)] | None = None  # the stages of a replica, in order


@dataclass(frozen=True, kw_only=True)
class WatchdogTimes(Section):
    """WatchdogTimes say after how many seconds without advance of a rank a table shows what all do, and after how many
    the run ends. None: never."""

    report: Count | None = 60  # seconds until the table
    end: Count | None = 600  # seconds until the end

    def _mistakes(self) -> Iterator[Mistake]:
        if self.report is not None and self.end is not None and self.end < self.report:
            yield Mistake(f"is {self.end} s, and the report only comes after {self.report} s", "end")


@dataclass(frozen=True, kw_only=True)
class Config(Section):
    """Config holds a whole configuration."""

    seed: Annotated[int, Bounds(ge=0)] = 1  # of everything random: weights, order of the rows, dropout, augmentation
    # The type of the numbers. bfloat16 (2 bytes): layers compute in it, weights and their updates are float32. tf32:
    # arrays of float32, whose products may be rounded to TF32, on GPUs alone.
    dtype: Literal["float32", "float64", "tf32", "bfloat16"] = "float32"
    device: Literal["auto", "cpu", "gpu"] = "auto"  # auto: a GPU where every rank has one
    # The code that computes on CPU cores. fastest: what trials find fastest of NumPy, Numba and oneDNN; auto: the same,
    # except for runs so short that loading these would take longer than it saves; numpy: NumPy alone.
    kernels: Literal["auto", "fastest", "numpy"] = "auto"
    data: Data  # the rows
    model: Model  # the network
    train: Train = field(default_factory=Train)  # how it is trained
    checkpoint: Checkpoint = field(default_factory=Checkpoint)  # when the training state is saved
    # How the ranks are divided. layers: one swarm per layer, sized by cost; auto: what is predicted to be fastest.
    layout: Annotated[Literal["layers", "auto"] | Layout, Read(_layout)] = "layers"
    # How mini-batches go through the stages.
    pipeline: Annotated[Spec, OneOf(choices.PIPELINES, "pipeline")] = field(default_factory=choices.OneFOneB)
    # How replicas agree.
    exchange: Annotated[Spec, OneOf(choices.EXCHANGES, "exchange")] = field(default_factory=choices.Allreduce)
    # Copies of the state in other ranks' memory. auto: where a run survives the loss of ranks.
    redundancy: Annotated[Spec, OneOf(choices.REDUNDANCIES, "kind of redundancy")] = field(
        default_factory=choices.AutoCopies
    )
    # What happens when a rank no longer advances; none: nothing.
    watchdog: Annotated[Literal["none"] | WatchdogTimes, Read(watchdog_times)] = field(default_factory=WatchdogTimes)
    output: str | None = None  # the run folder; `load` fills it in
    trace: bool = False  # whether steps are recorded, as trace.json for chrome://tracing

    @property
    def exact(self) -> bool:
        """Whether all replicas have the same weights after every step."""
        return isinstance(self.exchange, choices.Allreduce)

    def _mistakes(self) -> Iterator[Mistake]:
        yield from _unexpanded(self.output, "output")
        if self.device == "cpu" and self.dtype == "tf32":
            yield Mistake("tf32 needs device: gpu; on CPU cores there are float32, float64 and bfloat16", "dtype")
        if isinstance(self.exchange, choices.Elite) and self.data.validation == 0:
            yield Mistake(
                "exchange elite needs it: the best replica is chosen on validation rows, never on the test set; "
                "add data.validation: 0.1",
                "data",
                "validation",
            )
        if isinstance(self.pipeline, choices.Async) and self.train.clip_norm is not None:
            yield Mistake(
                "is not possible with pipeline async: the norm of all stages' gradients is never there at one time; "
                "leave it out, or choose pipeline: 1f1b",
                "train",
                "clip_norm",
            )
