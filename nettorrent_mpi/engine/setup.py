"""The setup turns a configuration into the parts of a run: data set, network, topology, engine options."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import field, replace
from functools import partial
from importlib.util import find_spec

import numpy as np

from nettorrent_mpi.config.sections import Config
from nettorrent_mpi.data.dataset import DataOptions, open_dataset
from nettorrent_mpi.data.rows import Dataset
from nettorrent_mpi.data.sampler import Sampler
from nettorrent_mpi.device.device import Kernels
from nettorrent_mpi.engine.checks import (
    channels_first,
    check_batch_norm,
    check_exchange,
    check_judged,
    doubts,
    slow,
    unjudged,
)
from nettorrent_mpi.engine.devices import planned_device
from nettorrent_mpi.engine.layout import layouts, micro_batches, micro_batches_of, stored
from nettorrent_mpi.engine.profiles import Profiles
from nettorrent_mpi.engine.run_plan import DeviceKind, Options, Plan
from nettorrent_mpi.nn.fit import check_class_weights, check_end, check_fit, unusual_labels
from nettorrent_mpi.nn.model import Network
from nettorrent_mpi.nn.rates import Rates, Scale, extremes
from nettorrent_mpi.plan.errors import ConfigError, LayoutError, ShapeError, keyed, listed
from nettorrent_mpi.plan.exchange_specs import Async, Gossip
from nettorrent_mpi.plan.gossip_rules import rate_factor
from nettorrent_mpi.plan.layouts import layout_of
from nettorrent_mpi.plan.performance import Machine
from nettorrent_mpi.plan.records import dataclass
from nettorrent_mpi.plan.recovery import layout_of_survivors
from nettorrent_mpi.plan.stream import staleness_factor
from nettorrent_mpi.plan.topology import Topology

SHORT_RUN = 2e11  # floating-point operations of a rank: two seconds of one core


@dataclass(frozen=True)
class Setup:
    """A Setup holds the parts of a run that every rank makes alike from the configuration, before any of them
    communicates."""

    config: Config
    dataset: Dataset
    sampler: Sampler
    network: Network
    topology: Topology
    options: Options
    machine: Machine = field(default_factory=Machine)  # that times are predicted for
    warnings: tuple[str, ...] = ()  # what is doubtful, but may be meant: one line each

    @property
    def plan(self) -> Plan:
        """Return the engine's plan."""
        return Plan(self.network, self.topology, self.options, self.machine)

    @property
    def steps(self) -> int:
        """Return the number of steps of the run."""
        train = self.config.train
        return train.steps if train.steps is not None else (train.epochs or 1) * self.sampler.steps_per_epoch

    @property
    def rates(self) -> Rates:
        """Return what the learning rate of the steps comes to: in an asynchronous pipeline, of the last stage."""
        train, lr = self.config.train, self.config.train.optimizer.options()["lr"]
        return extremes(train.schedule, lr, self.steps, self.sampler.steps_per_epoch, self._rate_scale)

    @property
    def _rate_scale(self) -> Scale | None:
        """The factor of the exchange on the schedule; None: it is always 1."""
        spec, replicas = self.options.exchange, self.topology.replicas
        if not isinstance(spec, Gossip) or replicas == 1:
            return None
        scale = partial(rate_factor, spec, self.options.optimizer, replicas)
        return scale if scale(1.0, 1.0) != 1.0 else None

    @property
    def rates_line(self) -> str:
        """The learning rates of the run in one line."""
        told, options, stages = [self.config.train.schedule.kind], self.options, len(self.topology.stages)
        if self._rate_scale is not None:
            told.append("times gossip's rate factor")
        if isinstance(options.pipeline, Async) and options.pipeline.staleness_aware and stages > 1:
            factors = [staleness_factor(stages, options.micro_batches, stage) for stage in range(stages)]
            told.append(f"in stages 0 to {stages - 1} times {listed([f'{factor:.3g}' for factor in factors])}")
        return f"{self.rates} ({', '.join(told)})"

    @property
    def layout_line(self) -> str:
        """Return the layout in one line."""
        return self.topology.describe([facts.name for facts in self.network.facts])

    @property
    def agreed_line(self) -> str:
        """Say in one line what decides which messages ranks expect from each other: they have to agree on it."""
        train, test = self.dataset.train, self.dataset.test
        rows = f"{train.rows} training rows of shape {train.shape} and {test.rows if test else 0} test rows"
        return (
            f"{rows}, {self.layout_line}, {self.steps} steps of {self.options.micro_batches} micro-batches "
            f"on {self.options.device}"
        )

    @property
    def data_line(self) -> str:
        """Say in one line what shows whether ranks have the same data."""
        names = self.dataset.class_names
        classes = f"classes {', '.join(names)}; " if names else ""
        return f"{classes}checksum of samples {self.dataset.checksum:08x}"

    def place_line(self, rank: int) -> str:
        """Describe the position of a rank in one line."""
        place = self.topology.place(rank)
        stage = self.topology.stages[place.stage]
        names = " ".join(facts.name for facts in self.network.facts[stage.first : stage.stop])
        return f"replica {place.replica}, stage {place.stage} ({names}), row {place.row}, col {place.col}"


def set_up(
    config: Config,
    ranks: int,
    dataset: Dataset | None = None,
    *,
    planning: bool = False,
    device: DeviceKind | None = None,
    known: Profiles | None = None,
    lacks: Callable[[Setup], str | None] | None = None,
) -> Setup:
    """Open the data (unless given), build the network and lay it out over `ranks`. `planning` needs no files of data
    whose size is known (`open_dataset`). `device` is what the ranks have agreed on; None: what this process alone can
    say. `known` has what was measured of the machine; without, layouts and times are predicted by constants. `lacks`
    says what a layout has not got: of the layouts that `auto` may take it is then the fastest that lacks nothing.
    Raises every kind of UserError."""
    known = known or Profiles()
    device = device or planned_device(config.device)
    if device == "cpu" and config.dtype == "tf32":
        raise ConfigError("tf32 needs a GPU, and there is none here: write float32, or use one", key="dtype")
    if device == "cpu" and config.dtype == "bfloat16" and find_spec("ml_dtypes") is None:
        text = "bfloat16 needs ml_dtypes, which is not installed: pip install 'nettorrent_mpi[fast]'"
        raise ConfigError(text, key="dtype")
    if dataset is None:
        dataset = _open_data(config, planning)
    doubt = channels_first(config, dataset.shape)
    try:
        network = Network(config.model.layers, dataset.shape)
    except ShapeError as error:
        error.args = (f"{error} ({doubt})" if doubt else str(error),)
        raise
    with keyed(f"model.layers[{len(network.layers) - 1}]"):
        check_end(config.model.loss, network.expanded, network.output_shape[-1], dataset.classes)
        if dataset.classes is not None:  # other targets are checked when they are read
            check_fit(config.model.loss, network.output_name, network.output_shape, (), np.int64, dataset.classes)
    with keyed("model.loss.cross_entropy.class_weights"):
        check_class_weights(config.model.loss, network.output_shape[-1])
    with keyed("layout"):
        machine = known.machine(config, network)
        kept = known.layout and layout_of(known.layout, network.facts, ranks)
        topologies = [kept] if kept else layouts(config, network, ranks, machine)
    lacking: str | None = None
    for topology in topologies:
        setup = _laid_out(config, network, dataset, topology, machine, device)
        lack = None if lacks is None else lacks(setup)
        if lack is None:
            warnings = [*dataset.notes, *unjudged(dataset, setup.sampler), *([doubt] if doubt else []), *_doubts(setup)]
            return replace(setup, warnings=tuple(warnings))
        lacking = lacking or lack
    with keyed("layout"):
        raise LayoutError(lacking or "there is none")


def _laid_out(
    config: Config, network: Network, dataset: Dataset, topology: Topology, machine: Machine, device: DeviceKind
) -> Setup:
    """Return the setup of a run in this layout, without warnings."""
    data, train = config.data, config.train
    pieces = micro_batches(config, network, topology, machine)
    sampler = Sampler(
        dataset.train.rows,
        config.seed,
        data.validation,
        train.batch_size,
        replicas=topology.replicas,
        micro_batches=pieces,
        partition=data.partition,
    )
    check_exchange(config, topology, pieces)
    if device == "gpu" and (limit := stored(config) or 0) > len(topology.stages):
        raise ConfigError(
            f"{limit} micro-batches in a stage: on GPUs at most as many as there are stages, {len(topology.stages)}, "
            "since the order of NCCL's launches is proved for these lists; leave it out",
            key="pipeline.zero_bubble.stored",
        )
    check_batch_norm(config, network, topology, pieces)
    check_judged(config, network, dataset, sampler)
    options = Options(
        report_every=config.train.report_every,
        loss=config.model.loss,
        optimizer=train.optimizer,
        batch_size=train.batch_size,
        micro_batches=pieces,
        pipeline=config.pipeline,
        exchange=config.exchange,
        clip_norm=train.clip_norm,
        dtype="float32" if config.dtype == "tf32" else config.dtype,
        tf32=config.dtype == "tf32",
        device=device,
        seed=config.seed,
        augment=data.augment,
        trace=config.trace,
        kernels=_kernels(config, network, topology.size, sampler.steps_per_epoch),
    )
    return Setup(config, dataset, sampler, network, topology, options, machine)


def _doubts(setup: Setup) -> Iterator[str]:
    """Yield what is doubtful about a run, but may be meant."""
    config, network, topology, pieces = setup.config, setup.network, setup.topology, setup.options.micro_batches
    labels = unusual_labels(config.model.loss, network.output_shape[-1], setup.dataset.classes)
    if labels:
        yield labels
    yield from doubts(config, setup.sampler, topology, pieces, setup.steps)
    yield from slow(config, network, topology, setup.steps, setup.machine)
    if setup.options.device == "gpu" and config.kernels != "auto":
        yield f"kernels: {config.kernels} is for CPU cores: a GPU has kernels of its own"


def of_survivors(setup: Setup, ranks: int, live: int | None) -> Setup:
    """Return the setup of the same run on fewer ranks, of which `live` replicas bring a state; None: there is none.
    Micro-batches stay as they are where batch norm takes statistics over them. Raises LayoutError."""
    config, network, old = setup.config, setup.network, setup.topology
    topology = layout_of_survivors(
        network.facts,
        old,
        ranks,
        old.replicas if live is None else live,
        config.train.batch_size,
        partial(micro_batches_of, config, network, machine=setup.machine),
        config.pipeline.kind,
        setup.machine,
        exact=setup.plan.exact,
    )
    pieces = (
        setup.options.micro_batches
        if network.has_batch_norm
        else micro_batches(config, network, topology, setup.machine)
    )
    sampler = setup.sampler.divided(topology.replicas, pieces)
    options = replace(setup.options, micro_batches=pieces)
    return replace(setup, topology=topology, options=options, sampler=sampler)


def _open_data(config: Config, planning: bool) -> Dataset:
    data = config.data
    options = DataOptions(
        mean=data.mean,
        std=data.std,
        transposed=data.transposed,
        rows=data.rows,
        test_rows=data.test_rows,
        shape=data.shape,
        classes=data.classes,
        seed=config.seed,
    )
    with keyed("data.root" if data.root is not None else "data.name"):
        return open_dataset(data.name, data.root, options=options, planning=planning)


def _kernels(config: Config, network: Network, ranks: int, epoch_steps: int) -> Kernels:
    """Resolve `kernels: auto`: a run of a second or two does not load the libraries that would make it faster."""
    if config.kernels != "auto":
        return config.kernels
    steps = config.train.steps if config.train.steps is not None else (config.train.epochs or 1) * epoch_steps
    work = steps * config.train.batch_size * sum(facts.operations for facts in network.facts)
    return "fastest" if work / ranks > SHORT_RUN else "numpy"
