"""The setup turns a configuration into the parts of a run: data set, network, topology, engine options."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from nettorrent_mpi.config.sections import Config, Layout
from nettorrent_mpi.data.dataset import DataOptions, open_dataset
from nettorrent_mpi.data.rows import Dataset
from nettorrent_mpi.data.sampler import Sampler
from nettorrent_mpi.device.device import Kernels
from nettorrent_mpi.engine.checks import check_batch_norm, check_exchange, doubts
from nettorrent_mpi.engine.run_plan import Options, Plan
from nettorrent_mpi.nn.losses import check_end, check_fit
from nettorrent_mpi.nn.model import Network
from nettorrent_mpi.plan.blocks import span
from nettorrent_mpi.plan.cost import auto_layout
from nettorrent_mpi.plan.errors import ConfigError, LayoutError
from nettorrent_mpi.plan.exchange_specs import Async, Elite
from nettorrent_mpi.plan.layouts import given_layout, layers_layout
from nettorrent_mpi.plan.topology import Topology

MICRO_BATCHES = 4  # of `micro_batches: auto` in a pipeline
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
    warnings: tuple[str, ...] = ()  # what is doubtful, but may be meant: one line each

    @property
    def plan(self) -> Plan:
        """Return the engine's plan."""
        return Plan(self.network, self.topology, self.options)

    @property
    def steps(self) -> int:
        """Return the number of steps of the run."""
        train = self.config.train
        return train.steps if train.steps is not None else (train.epochs or 1) * self.sampler.steps_per_epoch

    @property
    def layout_line(self) -> str:
        """The layout in one line."""
        return self.topology.describe([facts.name for facts in self.network.facts])

    def place_line(self, rank: int) -> str:
        """Describe the position of a rank in one line."""
        place = self.topology.place(rank)
        stage = self.topology.stages[place.stage]
        names = " ".join(facts.name for facts in self.network.facts[stage.first : stage.stop])
        return f"replica {place.replica}, stage {place.stage} ({names}), row {place.row}, col {place.col}"


def set_up(config: Config, ranks: int, dataset: Dataset | None = None) -> Setup:
    """Open the data (unless given), build the network and lay it out over `ranks`. Raises every kind of UserError."""
    data, train = config.data, config.train
    dataset = dataset or open_dataset(
        data.name,
        data.root,
        options=DataOptions(
            mean=data.mean,
            std=data.std,
            transposed=data.transposed,
            rows=data.rows,
            test_rows=data.test_rows,
            shape=data.shape,
            classes=data.classes,
            seed=config.seed,
        ),
    )
    network = Network(config.model.layers, dataset.shape)
    check_end(config.model.loss, network.expanded, network.output_shape[-1], dataset.classes)
    if dataset.classes is not None:  # other targets are checked when they are read
        check_fit(config.model.loss, network.output_name, network.output_shape, (), np.int64, dataset.classes)
    topology = lay_out(config, network, ranks)
    pieces = micro_batches(config, network, topology)
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
    check_batch_norm(config, network, topology, pieces)
    if isinstance(config.exchange, Elite) and not len(sampler.validation_rows):
        text = f"{data.validation} of {dataset.train.rows} rows leaves none to choose the best replica by; raise it"
        raise ConfigError(text, key="data.validation")
    options = Options(
        report_every=config.train.report_every,
        loss=config.model.loss,
        optimizer=train.optimizer,
        batch_size=train.batch_size,
        micro_batches=pieces,
        pipeline=config.pipeline,
        exchange=config.exchange,
        clip_norm=train.clip_norm,
        dtype=config.dtype,
        seed=config.seed,
        augment=data.augment,
        trace=config.trace,
        kernels=_kernels(config, network, ranks, sampler.steps_per_epoch),
    )
    return Setup(config, dataset, sampler, network, topology, options, tuple(doubts(config, dataset, sampler)))


def _kernels(config: Config, network: Network, ranks: int, epoch_steps: int) -> Kernels:
    """Resolve `kernels: auto`: a run of a second or two does not load the libraries that would make it faster."""
    if config.kernels != "auto":
        return config.kernels
    steps = config.train.steps if config.train.steps is not None else (config.train.epochs or 1) * epoch_steps
    work = steps * config.train.batch_size * sum(facts.operations for facts in network.facts)
    return "fastest" if work / ranks > SHORT_RUN else "numpy"


def lay_out(config: Config, network: Network, ranks: int) -> Topology:
    """Return the topology of the configuration's layout on this many ranks. Raises LayoutError."""
    train, layout, facts = config.train, config.layout, network.facts
    if isinstance(layout, Layout) and layout.swarms is not None:
        swarms = [(swarm.layers, swarm.rows, swarm.cols) for swarm in layout.swarms]
        return given_layout(layout.replicas, swarms, facts, ranks)
    pieces = _pieces(config, MICRO_BATCHES)
    if layout == "auto":
        counts = partial(_count, config, network)
        return auto_layout(facts, ranks, train.batch_size, counts, config.pipeline.kind, exact=config.exact)
    replicas = layout.replicas if isinstance(layout, Layout) else 1
    if ranks % replicas:
        fewer, more = ranks // replicas * replicas, (ranks // replicas + 1) * replicas
        divisors = [n for n in range(1, ranks + 1) if ranks % n == 0]
        near = min(divisors, key=lambda n: (abs(n - replicas), n))
        raise LayoutError(
            f"layout.replicas: {replicas} replicas of equal size cannot be made of {ranks} ranks: start "
            f"{f'{fewer} or {more}' if fewer else more} ranks, or write layout: {{replicas: {near}}}"
        )
    rows = span(span(train.batch_size, pieces, 0).size, replicas, 0).size  # of a micro-batch, in one replica
    return Topology(replicas, layers_layout(facts, ranks // replicas, rows).stages)


def micro_batches(config: Config, network: Network, topology: Topology) -> int:
    """Return the number of micro-batches of a mini-batch.

    With batch norm it never depends on the layout: statistics are taken over one micro-batch, and parallel has to equal
    serial. An asynchronous pipeline wants as many as it has stages, so that two versions of the weights suffice, as
    long as every replica has a row of each.
    """
    return _count(config, network, len(topology.stages), topology.replicas)


def _count(config: Config, network: Network, stages: int, replicas: int = 1) -> int:
    automatic = MICRO_BATCHES
    if not network.has_batch_norm:
        if stages == 1:
            automatic = 1
        elif isinstance(config.pipeline, Async):
            automatic = max(automatic, min(stages, config.train.batch_size // replicas))
    return _pieces(config, automatic)


def _pieces(config: Config, automatic: int) -> int:
    train = config.train
    return min(automatic, train.batch_size) if train.micro_batches == "auto" else train.micro_batches
