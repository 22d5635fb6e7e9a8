"""From a configuration to the parts of a run: data set, network, topology, engine options."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nettorrent_mpi.app.config import Config, Layout
from nettorrent_mpi.data.dataset import Dataset, open_dataset
from nettorrent_mpi.data.dataset import Options as DataOptions
from nettorrent_mpi.data.sampler import Sampler
from nettorrent_mpi.engine.engine import Options
from nettorrent_mpi.nn.losses import check_fit
from nettorrent_mpi.nn.model import Network
from nettorrent_mpi.plan.blocks import span
from nettorrent_mpi.plan.cost import auto_layout
from nettorrent_mpi.plan.topology import Topology, given_layout, layers_layout

MICRO_BATCHES = 4  # of `micro_batches: auto` in a pipeline


@dataclass(frozen=True)
class Setup:
    """What every rank makes alike from the configuration, before any of them communicates."""

    config: Config
    dataset: Dataset
    sampler: Sampler
    network: Network
    topology: Topology
    options: Options

    @property
    def layout_line(self) -> str:
        """The layout in one line."""
        return self.topology.describe([facts.name for facts in self.network.facts])


def set_up(config: Config, ranks: int) -> Setup:
    """Open the data, build the network and lay it out over `ranks`. Raises UserErrors of all kinds."""
    data, train = config.data, config.train
    synthetic = data.name == "synthetic"
    dataset = open_dataset(
        data.name,
        data.root,
        options=DataOptions(
            mean=data.mean,
            std=data.std,
            transposed=data.transposed,
            rows=data.rows if synthetic else None,
            test_rows=data.test_rows if synthetic else None,
            shape=data.shape if synthetic else None,
            classes=data.classes if synthetic else None,
            seed=config.seed if synthetic else None,
        ),
    )
    sampler = Sampler(dataset.train.rows, config.seed, data.validation, train.batch_size)
    network = Network(config.model.layers, dataset.shape)
    if dataset.classes is not None:  # targets that are no labels are looked at when they are read
        check_fit(config.model.loss, network.output_name, network.output_shape, (), np.int64, dataset.classes)
    topology = lay_out(config, network, ranks)
    options = Options(
        loss=config.model.loss,
        optimizer=train.optimizer,
        batch_size=train.batch_size,
        micro_batches=micro_batches(config, network, topology),
        pipeline=config.pipeline,
        clip_norm=train.clip_norm,
        dtype=config.dtype,
        seed=config.seed,
        augment=data.augment,
        trace=config.trace,
    )
    return Setup(config, dataset, sampler, network, topology, options)


def lay_out(config: Config, network: Network, ranks: int) -> Topology:
    """The topology that the configuration's layout gives on this many ranks. Raises LayoutError."""
    train, layout = config.train, config.layout
    if isinstance(layout, Layout):
        swarms = [(swarm.layers, swarm.rows, swarm.cols) for swarm in layout.swarms]
        return given_layout(layout.replicas, swarms, network.facts, ranks)
    pieces = _pieces(config, MICRO_BATCHES)
    if layout == "auto":
        return auto_layout(network.facts, ranks, train.batch_size, pieces, config.pipeline)
    return layers_layout(network.facts, ranks, span(train.batch_size, pieces, 0).size)


def micro_batches(config: Config, network: Network, topology: Topology) -> int:
    """How many micro-batches a mini-batch has. With batch norm never a matter of the layout: its statistics are of
    one micro-batch and parallel has to equal serial."""
    return _pieces(config, 1 if len(topology.stages) == 1 and not network.has_batch_norm else MICRO_BATCHES)


def _pieces(config: Config, automatic: int) -> int:
    train = config.train
    return min(automatic, train.batch_size) if train.micro_batches == "auto" else train.micro_batches
