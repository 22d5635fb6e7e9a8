"""The modes of parallelizing that are compared: each changes a configuration for a number of ranks, or says why it is
impossible."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

# isort: split
from nettorrent_mpi.config import reading as configuration
from nettorrent_mpi.config.sections import Config
from nettorrent_mpi.config.writing import plain as plain_of
from nettorrent_mpi.config.writing import to_plain
from nettorrent_mpi.engine.run_plan import DeviceKind
from nettorrent_mpi.engine.setup import Setup, set_up
from nettorrent_mpi.plan import exchange_specs as choices
from nettorrent_mpi.plan.blocks import span
from nettorrent_mpi.plan.errors import ConfigError, UserError
from nettorrent_mpi.plan.exchange_specs import Async, Elite, Gossip
from nettorrent_mpi.plan.layouts import partition
from nettorrent_mpi.plan.records import dataclass
from nettorrent_mpi.plan.schedule import passes
from nettorrent_mpi.plan.topology import LayerFacts

APART = ("async", "gossip", "elite")  # modes whose weights differ from those of one rank
Settings = dict[str, Any]  # configuration keys as in to_plain
AT_THE_END = {"every_seconds": None, "every_epochs": None}  # the only checkpoint
SERIAL = "serial"
GPU = "gpu"  # one rank on a GPU, where the modes compute on CPU cores
VALIDATION = 0.1  # part of the training rows, if elite needs some and the configuration holds none back


@dataclass(frozen=True)
class Mode:
    """A mode of parallelizing. `settings` gets the configuration, the weight layers and the ranks."""

    title: str
    settings: Callable[[Config, Sequence[LayerFacts], int], Settings]


@dataclass(frozen=True)
class Candidate:
    """A mode on a number of ranks, with its configuration and layout, or the reason why it is impossible.

    `work` is equal for modes whose ranks do the same in every step; `also` has the other modes that this one stands
    for, as theirs is.
    """

    mode: str
    ranks: int
    config: Config | None = None
    layout: str | None = None  # in one line
    micro_batches: int | None = None
    steps: int = 0  # of the configuration's whole training
    work: Hashable = None
    also: tuple[str, ...] = ()
    impossible: str | None = None
    device: DeviceKind = "cpu"


def _one_team(layers: int, **grid: int) -> Settings:
    return {"replicas": 1, "swarms": [{"layers": layers, "rows": 1, "cols": 1, **grid}]}


def _rows(config: Config, facts: Sequence[LayerFacts], ranks: int) -> Settings:
    return {"layout": _one_team(len(facts), rows=ranks)}


def _cols(config: Config, facts: Sequence[LayerFacts], ranks: int) -> Settings:
    narrow = min(facts, key=lambda layer: layer.units)
    if ranks > narrow.units:
        raise ConfigError(f"{ranks} cols cannot divide the {narrow.units} units of {narrow.name}")
    return {"layout": _one_team(len(facts), cols=ranks)}


def _stages(facts: Sequence[LayerFacts], ranks: int) -> Settings:
    """Return one rank per stage; with fewer ranks than layers, neighbours are merged as evenly as possible."""
    if ranks > len(facts):
        raise ConfigError(f"{ranks} stages for {len(facts)} weight layers: a stage needs one at least")
    parts = partition([layer.operations for layer in facts], ranks)
    return {"replicas": 1, "swarms": [{"layers": part.size, "rows": 1, "cols": 1} for part in parts]}


def _pipeline(kind: str) -> Callable[[Config, Sequence[LayerFacts], int], Settings]:
    def settings(config: Config, facts: Sequence[LayerFacts], ranks: int) -> Settings:
        given = config.pipeline if config.pipeline.kind == kind else choices.PIPELINES[kind]()
        return {"layout": _stages(facts, ranks), "pipeline": plain_of(given)}

    return settings


def _replicas(config: Config, facts: Sequence[LayerFacts], ranks: int) -> Settings:
    return {"layout": _one_team(len(facts)) | {"replicas": ranks}}


def _gossip(config: Config, facts: Sequence[LayerFacts], ranks: int) -> Settings:
    given = config.exchange if isinstance(config.exchange, Gossip) else Gossip()
    return _replicas(config, facts, ranks) | {"exchange": plain_of(given)}


def _elite(config: Config, facts: Sequence[LayerFacts], ranks: int) -> Settings:
    given = config.exchange if isinstance(config.exchange, Elite) else Elite()
    return _replicas(config, facts, ranks) | {"exchange": plain_of(given)}


def _layers(config: Config, facts: Sequence[LayerFacts], ranks: int) -> Settings:
    return {"layout": "layers"}


def _auto(config: Config, facts: Sequence[LayerFacts], ranks: int) -> Settings:
    return {"layout": "auto"}


MODES: dict[str, Mode] = {
    "rows": Mode("the rows of a batch divided", _rows),
    "cols": Mode("neurons and filters divided", _cols),
    "gpipe": Mode("pipeline, GPipe", _pipeline("gpipe")),
    "1f1b": Mode("pipeline, 1F1B", _pipeline("1f1b")),
    "zero_bubble": Mode("pipeline, zero bubble", _pipeline("zero_bubble")),
    "async": Mode("pipeline without flush", _pipeline("async")),
    "replicas": Mode("replicas, exact", _replicas),
    "gossip": Mode("replicas that gossip", _gossip),
    "elite": Mode("replicas, the best one wins", _elite),
    "layers": Mode("one swarm per layer, sized by cost", _layers),
    "auto": Mode("layout: auto, predicted to be fastest", _auto),
}


def baseline(config: Config, modes: Sequence[str], device: DeviceKind = "cpu") -> Config:
    """Return the configuration that all sides share: one rank on this device, no exchange; `modes` will be compared
    with it.

    Elite chooses on validation rows; if the configuration holds none back and elite is among the modes, a tenth is held
    back from every side, so that all train on the same rows.
    """
    changes: Settings = {"layout": {"replicas": 1}, "pipeline": {"1f1b": {}}, "exchange": {"allreduce": {}}}
    changes |= {"trace": False, "output": None, "device": device}
    if config.kernels == "auto":  # a measured run is short, but represents a long one
        changes["kernels"] = "fastest"
    plain = to_plain(config) | changes
    if "elite" in modes and config.data.validation == 0:
        plain["data"] = plain["data"] | {"validation": VALIDATION}
    return configuration.from_plain(plain)


def serial(config: Config) -> tuple[Candidate, Setup]:
    """Return one rank with the whole network, and its setup. Raises UserErrors: an error here is one for all sides."""
    layers = set_up(config, 1).network.weight_layers
    whole = configuration.from_plain(to_plain(config) | {"layout": _one_team(layers)})
    setup = set_up(whole, 1)
    return _candidate(SERIAL, 1, setup), setup


def alone_on_gpu(shared: Config) -> Candidate:
    """Return one rank with the whole network on a GPU, beside modes on CPU cores."""
    one, _ = serial(configuration.from_plain(to_plain(shared) | {"device": "gpu"}))
    return replace(one, mode=GPU)


def plans(
    modes: Sequence[str], config: Config, shared: Config, facts: Sequence[LayerFacts], ranks: int
) -> list[Candidate]:
    """Return `modes` on this number of ranks, each as `plan` does, but those that do the same work once: their
    difference would be chance."""
    found: list[Candidate] = []
    for mode in modes:
        made = plan(mode, config, shared, facts, ranks)
        same = next((i for i, other in enumerate(found) if other.work == made.work is not None), None)
        if same is None:
            found.append(made)
        else:
            found[same] = replace(found[same], also=(*found[same].also, mode))
    return found


def plan(mode: str, config: Config, shared: Config, facts: Sequence[LayerFacts], ranks: int) -> Candidate:
    """Return `mode` on this number of ranks. `config` is the user's, which may have options of the mode; `shared` is
    `baseline`'s result."""
    try:
        changed = to_plain(shared) | MODES[mode].settings(config, facts, ranks)
        settings = configuration.from_plain(changed)
        setup = set_up(settings, ranks)
        topology, pieces = setup.topology, setup.options.micro_batches
        most = span(settings.train.batch_size, pieces, 0).size
        for stage in topology.stages:
            sharing = topology.replicas * stage.rows
            if sharing > most:
                raise ConfigError(f"{sharing} ranks for {most} rows at a time: some would stay idle")
    except UserError as error:
        return Candidate(mode, ranks, impossible=str(error), device="gpu" if shared.device == "gpu" else "cpu")
    return _candidate(mode, ranks, setup)


def _candidate(mode: str, ranks: int, setup: Setup) -> Candidate:
    pieces = setup.options.micro_batches
    made = Candidate(mode, ranks, setup.config, setup.layout_line, pieces, setup.steps, _work(setup))
    return replace(made, device=setup.options.device)


def _work(setup: Setup) -> Hashable:
    """Return what tells whether the ranks of two setups on the same data and network do the same: positions, schedule,
    exchange."""
    options, stages = setup.options, len(setup.topology.stages)
    pipeline: Hashable = None
    if stages > 1:
        compute = passes(options.pipeline.kind, stages, options.micro_batches, setup.plan.paces)
        pipeline = options.pipeline if isinstance(options.pipeline, Async) else tuple(map(tuple, compute))
    exchange = options.exchange if setup.topology.replicas > 1 else None
    return setup.topology, options.micro_batches, pipeline, exchange


def timed(config: Config, steps: int, *, trace: bool = False) -> Config:
    """Return `config` for a measurement of this many steps: nothing is evaluated, reported or saved before their
    end, and the learning rate, whose schedule may be longer, is constant."""
    never = steps + 1
    changes = {"steps": steps, "report_every": never, "evaluate_every": never}
    plain = to_plain(config)
    train = {k: v for k, v in plain["train"].items() if k != "epochs"} | changes
    train |= {"stop_at": None, "schedule": "constant"}
    return configuration.from_plain(plain | {"train": train, "trace": trace, "checkpoint": AT_THE_END})


def until(config: Config, accuracy: float) -> Config:
    """Return `config` for a training that ends at this accuracy, evaluated after every epoch, or with the
    configuration's own epochs or steps. Checkpoints would cost time that PyTorch does not spend."""
    plain = to_plain(config)
    changes = {"stop_at": {"accuracy": accuracy}, "evaluate_every": 1}
    return configuration.from_plain(plain | {"train": plain["train"] | changes, "checkpoint": AT_THE_END})
