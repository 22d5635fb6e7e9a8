"""Planning a run without MPI: a network, data and settings become who does what when."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Unpack

from nettorrent_mpi.config.sections import Config
from nettorrent_mpi.data.from_arrays import from_arrays
from nettorrent_mpi.data.rows import Dataset
from nettorrent_mpi.device import visible
from nettorrent_mpi.device.visible import ASSUMED_GPU, VisibleGpu
from nettorrent_mpi.engine.layout import predicted
from nettorrent_mpi.engine.profiles import Profiles, read_profiles
from nettorrent_mpi.engine.run_plan import DeviceKind
from nettorrent_mpi.engine.setup import Setup, set_up
from nettorrent_mpi.engine.usage import peak_memory
from nettorrent_mpi.nn.model import Network
from nettorrent_mpi.nn.rates import check_rates
from nettorrent_mpi.plan.errors import UserError, warn
from nettorrent_mpi.plan.memory import Memory
from nettorrent_mpi.plan.specs import LayerSpec
from nettorrent_mpi.plan.topology import Topology

if TYPE_CHECKING:
    from nettorrent_mpi.config.settings import Settings

Architecture: TypeAlias = Config | Network | Sequence[LayerSpec]
# Training rows and optional test rows: (x, y), (x, y, x_test, y_test), an opened data set, or the data section of
# a configuration. x (rows, features) or (rows, height, width, channels); y (rows,) whole numbers, the classes from 0
# on, or (rows, outputs) floating-point targets.
Data: TypeAlias = Sequence[Any] | Dataset | Mapping[str, Any]


def load_config(path: str | Path | None = None, *changes: str) -> Config:
    """Read the configuration in a YAML file (None: the built-in one, digits), with changes as `--set` makes them:
    `load_config("configs/mnist.yaml", "train.epochs=2")`. Raises ConfigError, which names file, line and key."""
    from nettorrent_mpi.config import reading

    return reading.load(None if path is None else str(path), changes)


def placed(error: UserError, path: str | Path | None, *changes: str) -> UserError:
    """Return an error about a configuration that `load_config` has read, with the file and line of the value."""
    from nettorrent_mpi.config import reading

    return reading.placed(error, None if path is None else str(path), changes)


def plan(
    network: Architecture,
    data: Data | None = None,
    *,
    ranks: int = 1,
    data_needed: bool = False,
    profile: str | None = None,
    **settings: Unpack[Settings],
) -> PlannedRun:
    """Plan a run on `ranks` ranks: who holds and does what when, the predicted speed and the memory. Nothing is
    communicated, MPI is not loaded, and published data sets need not be there (unless `data_needed`). Times are
    predicted by what `nettorrent profile` has measured of this network on this host, or in the file `profile`, or by
    constants.

    `network` is a configuration (whose values `settings` replace), a network, or its layers. Raises UserErrors: a
    ConfigError, LayoutError, ShapeError or DataError; gives the plan's warnings.
    """
    dataset = opened(data)
    config = configured(network, data, dataset, settings)
    setup = set_up(config, ranks, dataset, planning=not data_needed, known=read_profiles(profile))
    planned = PlannedRun(setup, has_length(network, settings))
    planned.warn()
    return planned


def plan_run(
    config: Config,
    ranks: int,
    device: DeviceKind | None,
    known: Profiles | None = None,
    *,
    data_needed: bool,
    memory: float | None = None,
) -> PlannedRun:
    """Plan a run of the command line, on the `device` and by the profiles that its ranks have agreed on; see `plan`.
    Raises LayoutError where a node would need more than `memory` bytes."""

    def lacks(setup: Setup) -> str | None:
        return None if memory is None else too_much(setup, memory)

    setup = set_up(config, ranks, planning=not data_needed, device=device, known=known, lacks=lacks)
    planned = PlannedRun(setup, has_length=True)
    planned.warn()
    return planned


def too_much(setup: Setup, memory: float) -> str | None:
    """Say by how much a node's ranks need more than its `memory`, in bytes; None where they do not."""
    from nettorrent_mpi.engine.memory_estimate import Libraries, estimate, of_node

    process = peak_memory()
    needed = of_node(setup.topology, estimate(setup, Libraries(process, process)), setup.machine.node)
    if needed <= memory:
        return None
    return (
        f"{setup.layout_line} needs {needed / 1e9:,.1f} GB on a node, which has {memory / 1e9:,.1f} GB: use more "
        "nodes, lower train.batch_size, raise train.micro_batches, or divide the network over more ranks"
    )


class PlannedRun:
    """A PlannedRun describes what a run will do; `str` of it is the report of `--dry-run`. Raises ConfigError if its
    length is given and the learning rate's warm-up takes all of it."""

    def __init__(self, setup: Setup, has_length: bool):
        self.setup = setup
        self.has_length = has_length  # whether the length of the run was given
        doubt = (
            check_rates(setup.config.train.schedule, setup.steps, setup.sampler.steps_per_epoch) if has_length else None
        )
        self.warnings = (*setup.warnings, *([] if doubt is None else [doubt]))  # of what may be meant, one line each
        self.process_memory = (peak_memory(), peak_memory())  # bytes of rank 0's process and of the others', before all

    @property
    def config(self) -> Config:
        """The complete configuration."""
        return self.setup.config

    def warn(self) -> None:
        """Give the warnings."""
        for text in self.warnings:
            warn(text)

    @property
    def network(self) -> Network:
        """The network, with the shapes of all layers."""
        return self.setup.network

    @property
    def topology(self) -> Topology:
        """The position of every rank: replicas, and the stages with their rows and cols."""
        return self.setup.topology

    @property
    def layout(self) -> str:
        """The layout in one line."""
        return self.setup.layout_line

    @property
    def schedule(self) -> str:
        """The schedule as a table of what each stage does in each time step: `F0` is the forward pass of
        micro-batch 0."""
        from nettorrent_mpi.cli.dry_run import schedule_table

        options = self.setup.options
        stages, paces = len(self.topology.stages), self.setup.plan.paces
        return schedule_table(options.pipeline.kind, stages, options.micro_batches, paces)

    @property
    def seconds_per_step(self) -> float:
        """The predicted seconds of a training step."""
        return predicted(self.config, self.network, self.topology, self.setup.machine).seconds

    @property
    def memory(self) -> list[Memory]:
        """The predicted bytes of each stage's largest rank, by purpose; of its node, where it computes on a GPU."""
        from nettorrent_mpi.engine.memory_estimate import Libraries, estimate

        return estimate(self.setup, Libraries(*self.process_memory))

    @cached_property
    def gpu_memory(self) -> list[Memory]:
        """The predicted bytes of each stage's largest rank in its GPU's memory; empty for a run on CPU cores."""
        from nettorrent_mpi.engine.gpu_estimate import gpu_estimate

        return gpu_estimate(self.setup, self._gpu) if self.setup.options.device == "gpu" else []

    @cached_property
    def _gpu(self) -> VisibleGpu:
        """The smallest GPU that this process sees, or one that it could see."""
        seen = visible.look(dict(os.environ), None).gpus
        return min(seen, key=lambda gpu: gpu.memory) if seen else ASSUMED_GPU

    def describe(self, hosts: Sequence[str] | None = None) -> str:
        """Return the report of `--dry-run`; `hosts` names each rank's node."""
        from nettorrent_mpi.cli.dry_run import dry_run

        gpu = self._gpu if self.gpu_memory else None
        return dry_run(self.setup, self.memory, hosts, self.gpu_memory, gpu)

    def __str__(self) -> str:
        return self.describe()


def opened(data: Data | None) -> Dataset | None:
    """Return the data set, made from arrays if need be; None if the configuration names it. Raises DataError."""
    if data is None or isinstance(data, Dataset | Mapping):
        return data if isinstance(data, Dataset) else None
    if len(data) not in (2, 4):
        raise UserError(f"data has {len(data)} arrays: give (x, y) or (x, y, x_test, y_test)")
    return from_arrays(*data)


def has_length(network: Architecture, settings: Mapping[str, Any]) -> bool:
    """Whether the length of the run is given."""
    return isinstance(network, Config) or "epochs" in settings or "steps" in settings


def configured(
    network: Architecture, data: Data | None, dataset: Dataset | None, settings: Mapping[str, Any]
) -> Config:
    if data is None and not isinstance(network, Config):
        raise UserError("a network needs data to train on: give arrays (x, y), a data set, or a data section")
    if isinstance(network, Config) and data is None and not settings:
        return network
    from nettorrent_mpi.config.settings import configure

    layers = network.layers if isinstance(network, Network) else network
    return configure(layers, data if isinstance(data, Mapping) else None, settings, given=dataset is not None)
