"""The command `nettorrent simulate`: predicted steps of a network in many layouts, on machines of any size, without
any of their ranks."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from nettorrent_mpi.cli.elsewhere import elsewhere
from nettorrent_mpi.cli.speed_report import of_machine
from nettorrent_mpi.cli.tables import aligned, shortened, wrapped
from nettorrent_mpi.config.sections import Config, Layout
from nettorrent_mpi.data.storage import check_file
from nettorrent_mpi.engine.layout import lay_out, micro_batches, one_stage, peering_of, predicted, stored
from nettorrent_mpi.engine.run_files import write_whole, written
from nettorrent_mpi.engine.setup import Setup, set_up
from nettorrent_mpi.engine.trace import TracedAction, as_chrome
from nettorrent_mpi.nn.model import Network
from nettorrent_mpi.plan.cost import Prediction, timeline
from nettorrent_mpi.plan.errors import ConfigError, UserError
from nettorrent_mpi.plan.exchange_specs import Allreduce, Gossip, Nothing
from nettorrent_mpi.plan.layouts import partition
from nettorrent_mpi.plan.performance import Machine
from nettorrent_mpi.plan.schedule import STREAMS
from nettorrent_mpi.plan.topology import Stage, Topology
from nettorrent_mpi.planning import load_config, placed, too_much

TRACED = 3  # steps of a trace


class LaidOut(NamedTuple):
    """A LaidOut is a configuration in a layout, with its predicted step."""

    name: str
    config: Config
    topology: Topology
    step: Prediction


def simulate(args: argparse.Namespace) -> None:
    """Run `nettorrent simulate`."""
    other = elsewhere(args)
    if args.output is not None:
        check_file(Path(args.output), overwrite=args.overwrite)
    config = load_config(args.config, *args.changes)
    config = replace(config, device="cpu") if config.device == "auto" else config
    if config.device == "gpu":
        raise ConfigError("predictions of steps are for CPU cores: add --set device=cpu", key="device")
    ranks = other.ranks or 1
    try:
        setup = set_up(config, ranks, planning=True, device="cpu", known=other.known(args.profile))
    except UserError as error:
        raise placed(error, args.config, *args.changes) from None
    sides = _sides(setup, ranks)
    sys.stdout.write(_report(setup, sides, ranks, other.memory) + "\n")
    if args.output is not None:
        own, path = sides[0], Path(args.output)
        with written(path, "--output FILE"):
            write_whole(path, _trace(setup, own))
        sys.stdout.write(f"{path}: {TRACED} predicted steps of `{own.name}`, for chrome://tracing\n")


def _sides(setup: Setup, ranks: int) -> list[LaidOut]:
    """Return the configured layout, then all others that are possible, each once with all of its names."""
    network, machine = setup.network, setup.machine
    found: dict[tuple[Topology, str], tuple[list[str], Config]] = {}
    for name, config, topology in _layouts(setup.config, setup.topology, network, machine, ranks):
        names, _ = found.setdefault((topology, config.exchange.kind if topology.replicas > 1 else ""), ([], config))
        if name not in names:
            names.append(name)
    return [
        LaidOut(", ".join(names), config, topology, predicted(config, network, topology, machine))
        for (topology, _), (names, config) in found.items()
    ]


def _layouts(
    config: Config, own: Topology, network: Network, machine: Machine, ranks: int
) -> Iterator[tuple[str, Config, Topology]]:
    yield config.layout if isinstance(config.layout, str) else "as given", config, own
    exact = replace(config, exchange=Allreduce())
    layers = network.weight_layers
    for layout in ("layers", "auto"):
        other = replace(exact, layout=layout)
        yield layout, other, lay_out(other, network, ranks, machine)
    yield "rows", exact, Topology(1, (Stage(0, layers, ranks, 1),))
    yield "rows x cols", exact, one_stage(exact, network, ranks, machine)
    stages = next((n for n in range(min(layers, ranks), 1, -1) if ranks % n == 0), 1)
    if stages > 1:
        parts = partition([facts.operations for facts in network.facts], stages)
        yield "stages", exact, Topology(ranks // stages, tuple(Stage(*part, 1, 1) for part in parts))
    if ranks > 1:
        alone = replace(config, layout=Layout(replicas=ranks))
        whole = Topology(ranks, (Stage(0, layers, 1, 1),))
        yield "gossip", replace(alone, exchange=Gossip()), whole
        yield "no exchange", replace(alone, exchange=Nothing()), whole
        yield "one rank", exact, Topology(1, (Stage(0, layers, 1, 1),))


def _report(setup: Setup, sides: list[LaidOut], ranks: int, memory: float | None) -> str:
    """Write a line for each side, the fastest first."""
    config, network = setup.config, setup.network
    batch, names = config.train.batch_size, [shortened(facts.name) for facts in network.facts]
    whole = Topology(1, (Stage(0, network.weight_layers, 1, 1),))
    one = predicted(replace(config, exchange=Allreduce()), network, whole, setup.machine).seconds
    header = ["layout", "ranks", "step", "samples/s", "speedup", "waiting"] + (["memory"] if memory else [])
    rows, lines = [], []
    for side in sorted(sides, key=lambda side: side.step.seconds):
        seconds = side.step.seconds
        rows.append([
            side.name,
            f"{side.topology.size:,}",
            f"{1e3 * seconds:.3g} ms",
            f"{batch / seconds:,.0f}",
            f"{one / seconds:,.1f}",
            f"{100 * max(side.step.bubble, 0.0):.0f} %",
            *([_fits(setup, side, memory)] if memory else []),
        ])  # fmt: skip
        lines += wrapped(f"{side.name}: ", side.topology.describe(names))
    idle = ranks - batch * min(facts.units for facts in network.facts)
    more = [f"{idle:,} ranks at least are idle: a mini-batch has {batch} rows"] if idle > 0 else []
    return "\n".join([
        f"{config.data.name}, mini-batches of {batch} rows on {ranks:,} ranks",
        "",
        aligned(header, rows, left=("layout",)),
        "",
        *lines,
        *more,
        *wrapped("", of_machine(setup.machine, ranks)),
    ])  # fmt: skip


def _fits(setup: Setup, side: LaidOut, memory: float) -> str:
    """Say whether a layout fits the memory of its nodes."""
    pieces = micro_batches(side.config, setup.network, side.topology, setup.machine)
    options = replace(setup.options, micro_batches=pieces, exchange=side.config.exchange)
    sampler = setup.sampler.divided(side.topology.replicas, pieces)
    made = replace(setup, config=side.config, topology=side.topology, options=options, sampler=sampler)
    return "too little" if too_much(made, memory) else "enough"


def _trace(setup: Setup, side: LaidOut) -> str:
    """Return the predicted steps as a Chrome trace: the largest rank of each stage, in the first replica."""
    config, network = side.config, setup.network
    pieces = micro_batches(config, network, side.topology, setup.machine)
    line = timeline(
        side.topology,
        network.facts,
        config.train.batch_size,
        pieces,
        config.pipeline.kind,
        setup.machine,
        exact=config.exact,
        peering=peering_of(config, side.topology.replicas),
        stored=stored(config),
    )
    times = 1 if config.pipeline.kind in STREAMS else TRACED
    places = []
    for s, events in enumerate(line.stages):
        rank = side.topology.rank(0, s, 0, 0)
        spans = [
            TracedAction(step, str(action), round(1e9 * (step * side.step.seconds + begin)), round(1e9 * (end - begin)))
            for step in range(times)
            for action, begin, end in events
        ]
        places.append((rank, setup.place_line(rank) if side.topology == setup.topology else f"stage {s}", spans))
    return as_chrome(places)
