"""The interval from one copy at a buddy (redundancy.py) to the next follows from the plan alone, so that all ranks
choose alike."""

from __future__ import annotations

from nettorrent_mpi.comm import library
from nettorrent_mpi.comm.failures import survivable
from nettorrent_mpi.engine.layout import predicted
from nettorrent_mpi.engine.setup import Setup
from nettorrent_mpi.nn.optimizers import make_optimizer
from nettorrent_mpi.plan.exchange_specs import BuddyCopies, NoCopies
from nettorrent_mpi.plan.recovery import copies_due, seconds_of_copies
from nettorrent_mpi.plan.schedule import STREAMS
from nettorrent_mpi.plan.sizes import parameters_of, sharers_of
from nettorrent_mpi.plan.specs import Spec
from nettorrent_mpi.plan.stream import versions

ON_GPU = 10  # steps at least: the predicted step is that of CPU cores


def keeps_copies(spec: Spec) -> bool:
    """Whether copies are kept: where a run survives the loss of ranks; elsewhere they would help nobody. Where they are
    asked for and this process has no MPI, it is not the run that keeps them."""
    asked = isinstance(spec, BuddyCopies) and not library.loaded()
    return not isinstance(spec, NoCopies) and (asked or survivable())


def copy_interval(setup: Setup) -> int | None:
    """Return the number of steps from one copy of the state to the next; None: there are none."""
    spec = setup.config.redundancy
    if not keeps_copies(spec):
        return None
    if isinstance(spec, BuddyCopies) and spec.every_steps != "auto":
        return spec.every_steps
    due = copies_due(seconds_of_copies(most_owned(setup)), _step(setup))
    return max(ON_GPU, due) if setup.options.device == "gpu" else due


def members_with_copies(setup: Setup) -> int:
    """Return the number of ranks among which copies are kept: all, or those of a replica where replicas differ."""
    topology = setup.topology
    return topology.size if setup.config.exact else topology.size // topology.replicas


def part_of_copies(setup: Setup, every: int) -> float:
    """Return the part of the time that copies after every so many steps take, as predicted."""
    return seconds_of_copies(most_owned(setup)) / (every * _step(setup))


def most_owned(setup: Setup) -> int:
    """Return the bytes of what a rank owns, of the one with the most."""
    return max(owned_bytes(setup, stage) for stage in range(len(setup.topology.stages)))


def owned_bytes(setup: Setup, stage: int) -> int:
    """Return the bytes of what a rank of this stage owns: its part of the weights, with their earlier versions, and of
    the optimizer's state."""
    topology, options = setup.topology, setup.options
    here = topology.stages[stage]
    parameters = parameters_of(setup.network.facts[here.first : here.stop], here.cols)
    wide = options.wide
    pieces, stages = options.micro_batches, len(topology.stages)
    late = versions(stages, pieces, stage) - 1 if setup.config.pipeline.kind in STREAMS else 0
    each = wide * (1 + len(make_optimizer(options.optimizer).states)) + late * options.itemsize
    return round(parameters * each / sharers_of(topology, here, setup.config.exact))


def _step(setup: Setup) -> float:
    return predicted(setup.config, setup.network, setup.topology, setup.machine).seconds
