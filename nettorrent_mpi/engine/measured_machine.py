"""A machine is measured: the layers and the optimizer by themselves, the rest by short trainings.

What the layers do not explain of a serial training's step is a rank's own; each kind of message is then what the layers
and the rank do not explain of a training in which it is the only one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from statistics import median

import numpy as np

from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.config.sections import Config, Layout, Swarm
from nettorrent_mpi.engine.layer_times import (
    PARTS,
    SIZES,
    Company,
    fitted,
    least_errors,
    measure_layers,
    measure_update,
)
from nettorrent_mpi.engine.layout import lay_out, predicted
from nettorrent_mpi.engine.run_plan import Options
from nettorrent_mpi.nn.model import Network
from nettorrent_mpi.plan.exchange_specs import Allreduce, Gossip, OneFOneB
from nettorrent_mpi.plan.layouts import partition
from nettorrent_mpi.plan.performance import Link, Machine
from nettorrent_mpi.plan.records import dataclass

LONG, SHORT = 4 << 20, 1 << 20  # bytes of messages by which a link is measured
SLOWEST = 1.0  # seconds that a message may cost at most
MICRO_BATCHES = 4
COPIES = 1e-9  # seconds per byte that MPI and the kernel spend on a message, both ends together


@dataclass(frozen=True)
class CostTrial:
    """A CostTrial is a training that is measured to learn one figure of the machine."""

    name: str  # of the figure
    config: Config


def layers_of(network: Network, options: Options, company: Company, seconds: float) -> Machine:
    """Measure layers and optimizer on this rank, in about so many seconds; everything else costs nothing yet. All of
    the `company` call."""
    rows = [max(options.batch_size >> i, 1) for i in range(SIZES)]
    most = min(facts.units for facts in network.facts)
    sizes = [(r, cols) for cols in PARTS if cols <= most for r in dict.fromkeys(rows)]
    samples = [measure_layers(network, options, company, seconds / len(sizes), cols=cols, rows=r) for r, cols in sizes]
    update, reduction = measure_update(network, options, company)
    machine = Machine(update=update, reduction=reduction, latency=0.0, collective=0.0, fence=0.0)
    machine = replace(machine, mix=COPIES + 3 / machine.reduction)
    return replace(machine, layers=fitted(network, samples))


def serial_trials(config: Config, network: Network) -> list[Config]:
    """Return trainings on one rank whose steps differ in how many passes and rows they have."""
    size = config.train.batch_size
    one = changed(config, network, replicas=1)
    found = [_cut(one, size, 1)]
    if size >= 2:
        found += [_cut(one, size, min(MICRO_BATCHES, size)), _cut(one, size // 2, 1)]
    return found


def _cut(config: Config, rows: int, pieces: int) -> Config:
    return replace(config, train=replace(config.train, batch_size=rows, micro_batches=pieces))


def own_costs(machine: Machine, network: Network, measured: Mapping[Config, float]) -> Machine:
    """Return the machine with the costs of a rank's own that these serial trainings' seconds per step leave. Layers
    that were slower by themselves than the whole trainings are taken to be as much faster."""
    told = [predicted(config, network, lay_out(config, network, 1), machine).seconds for config in measured]
    machine = machine.scaled(min(1.0, median(t / p for t, p in zip(measured.values(), told, strict=True))))
    rows, rests = [], []
    for config, seconds in measured.items():
        pieces = config.train.micro_batches
        assert isinstance(pieces, int)
        rows.append([2.0 * pieces, config.train.batch_size, 1.0])
        rests.append(seconds - predicted(config, network, lay_out(config, network, 1), machine).seconds)
    found = least_errors(np.array(rows), rests, list(measured.values()))
    return replace(machine, call=found[0], row=found[1], step=found[2])


def trials(config: Config, network: Network) -> list[CostTrial]:
    """Return trainings on two ranks of a node that tell what each kind of message costs, one after the other."""
    layers, found = network.weight_layers, []
    if config.train.batch_size >= 2:
        found.append(CostTrial("fence", changed(config, network, rows=2)))
    if min(facts.units for facts in network.facts) >= 2:
        found.append(CostTrial("collective", changed(config, network, cols=2)))
    if layers >= 2:
        found.append(CostTrial("latency", changed(config, network, stages=2)))
    if config.train.batch_size >= 2:
        found.append(CostTrial("round", replace(changed(config, network, replicas=2), exchange=Gossip())))
    return found


def changed(
    config: Config, network: Network, *, replicas: int = 1, rows: int = 1, cols: int = 1, stages: int = 1
) -> Config:
    """Return the configuration in another layout, with an exact exchange."""
    parts = partition([facts.operations for facts in network.facts], stages)
    swarms = tuple(Swarm(layers=part.size, rows=rows, cols=cols) for part in parts)
    layout = Layout(replicas=replicas, swarms=swarms)
    return replace(config, layout=layout, exchange=Allreduce(), pipeline=OneFOneB())


def solved(machine: Machine, name: str, config: Config, network: Network, seconds: float) -> Machine:
    """Return the machine in which the figure `name` makes the predicted step of this training take so many seconds; 0
    where it takes longer already."""
    topology = lay_out(config, network, 2)

    def other(value: float) -> Machine:
        return replace(machine, **{name: value})  # type: ignore[arg-type]

    low, high = 0.0, SLOWEST
    if predicted(config, network, topology, other(low)).seconds >= seconds:
        return other(0.0)
    for _ in range(40):
        middle = (low + high) / 2
        short = predicted(config, network, topology, other(middle)).seconds < seconds
        low, high = (middle, high) if short else (low, middle)
    return other(high)


def measure_messages(group: Group) -> tuple[float, float]:
    """Return (seconds of a short message, bytes per second of long ones), where each of two members sends and receives
    at the same time."""
    times = {}
    for size in (8, SHORT, LONG):
        values, into = np.ones(size, np.uint8), np.ones(size, np.uint8)
        took = []
        for _ in range(3):
            group.barrier()
            began = time.perf_counter()
            group.pass_on(values, into)
            took.append(time.perf_counter() - began)
        slowest = np.array([min(took[1:])])
        group.maximum(slowest)
        times[size] = float(slowest[0])
    return times[8], (LONG - SHORT) / max(times[LONG] - times[SHORT], 1e-9)


def link_of(group: Group) -> Link:
    """Measure the link between the nodes of two ranks."""
    return Link(*measure_messages(group))
