"""The part of a dry run's report on speed: the predicted step beside that of other layouts and of fewer ranks; and what
copies of the state take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from nettorrent_mpi.cli.tables import aligned, shortened, wrapped
from nettorrent_mpi.engine.copy_interval import copy_interval, most_owned, part_of_copies
from nettorrent_mpi.engine.layout import AS_FAST, lay_out, micro_batches, on_fewer_ranks, predicted, stored
from nettorrent_mpi.engine.memory_estimate import Libraries, estimate
from nettorrent_mpi.plan.cost import Prediction
from nettorrent_mpi.plan.exchange_specs import AutoCopies, ZeroBubble
from nettorrent_mpi.plan.memory import Memory
from nettorrent_mpi.plan.performance import Machine
from nettorrent_mpi.plan.topology import Topology

if TYPE_CHECKING:  # the report needs neither engine nor MPI
    from nettorrent_mpi.engine.setup import Setup


def speed_block(setup: Setup) -> str:
    """Compare the layout of the run with `layers` and `auto` on as many ranks, and with fewer ranks.

    Replicas that differ are not compared with other layouts, which would train another network.
    """
    config, network, ranks, machine = setup.config, setup.network, setup.topology.size, setup.machine
    ours = predicted(config, network, setup.topology, machine)
    name = config.layout if isinstance(config.layout, str) else "as given"
    fewer = on_fewer_ranks(config, network, ranks, machine)
    least = min(fewer, key=lambda each: each[1].seconds, default=None)
    others: list[tuple[str, Topology]] = []
    for other in ("layers", "auto") if config.exact and ranks > 1 else ():
        topology = lay_out(replace(config, layout=other), network, ranks, machine)
        if topology not in (setup.topology, *(each for _, each in others)):
            others.append((other, topology))
    rows = [(ranks, name, ours), *((ranks, other, predicted(config, network, each, machine)) for other, each in others)]
    rows += [(count, name, each) for count, each in fewer if count == 1 or (least and count == least[0])]
    lines = [_table(rows, config.train.batch_size, setup.steps)]
    for other, topology in others:
        lines += wrapped(f"{other}: ", topology.describe([shortened(facts.name) for facts in network.facts]))
    if config.exact and ranks > 1 and name != "auto" and "auto" not in (other for other, _ in others):
        lines.append("auto: the same layout")
    best_name, best = min(((other, each) for _, other, each in rows[: 1 + len(others)]), key=lambda row: row[1].seconds)
    if ours.seconds > AS_FAST * best.seconds:
        times = ours.seconds / best.seconds
        lines.append(f"layout: {best_name} is predicted to be {times:.1f} times as fast (--set layout={best_name})")
    if least and least[1].seconds < AS_FAST * ours.seconds:
        lines.append(f"{ranks} ranks are predicted to be no faster than {least[0]}: the others wait, or communicate")
    lines += wrapped("", of_machine(machine, ranks))
    return "\n".join(lines)


def of_machine(machine: Machine, ranks: int) -> str:
    """Say which machine the times are of."""
    nodes = machine.nodes(ranks)
    where = "all on one node" if nodes == 1 else f"on {nodes:,} nodes of {machine.node} ranks, {machine.link}"
    if machine.source:
        return (
            f"The times are predicted from a profile of this network ({machine.source}; `nettorrent profile`), for "
            f"ranks {where}, without start and evaluations."
        )
    return (
        f"The times are of a machine with one core of {machine.flops / 1e9:.0f} GFLOP/s (float32) for each rank and "
        f"{machine.bandwidth / 1e9:.0f} GB/s between them, {where}, not of this one, and without start and "
        "evaluations: they compare layouts. `nettorrent profile` measures this one, `nettorrent speedup` the layouts."
    )


def _table(rows: Sequence[tuple[int, str, Prediction]], batch_size: int, steps: int) -> str:
    header = ["ranks", "layout", "step", "samples/s", "waiting", "whole run"]
    cells = [
        [
            str(ranks),
            name,
            f"{1e3 * each.seconds:.3g} ms",
            f"{batch_size / each.seconds:,.0f}",
            f"{100 * max(each.bubble, 0.0):.0f} %",
            _duration(steps * each.seconds),
        ]
        for ranks, name, each in rows
    ]
    return aligned(header, cells, left=("layout",))


def _duration(seconds: float) -> str:
    """Write seconds with their unit: 1.5 s, 94 s, 12 min, 3.4 h."""
    for size, unit in ((1, "s"), (60, "min")):
        if seconds < 99.5 * size:
            return f"{seconds / size:{'.2g' if seconds < 9.95 * size else '.0f'}} {unit}"
    return f"{seconds / 3600:,.1f} h"


def copies_lines(setup: Setup, memory: Sequence[Memory]) -> list[str]:
    """Say which copies ranks keep of each other's state, what they take, and where they would be kept."""
    config, most = setup.config, max(each.copies for each in memory)
    every = copy_interval(setup)
    if every is None or most == 0:
        if every is None and isinstance(config.redundancy, AutoCopies) and setup.topology.size > 1:
            return wrapped("copies    ", "none: a run survives lost ranks under Open MPI's mpirun --with-ft ulfm alone")
        return []
    owned, part = most_owned(setup), part_of_copies(setup, every)
    steps = "every step" if every == 1 else f"every {every} steps"
    return wrapped(
        "copies    ",
        f"after {steps} a rank copies what it owns (at most {owned / 1e6:,.1f} MB) and sends it to a buddy: about "
        f"{100 * part:.2g} % of the time; two of its own and two of another rank's take {most / 1e6:,.1f} MB",
    )


def stored_lines(setup: Setup) -> list[str]:
    """Say what the stages of a zero-bubble pipeline would gain if they held more micro-batches, and what that would
    take: the fewest, of a few numbers up to that where equal stages never wait, with which the predicted step is nearly
    the fastest."""
    stages = len(setup.topology.stages)
    held = stored(setup.config) or stages
    if not setup.plan.split or setup.options.device == "gpu":
        return []
    more = {held + -(-(2 * stages - 1 - held) * quarter // 4) for quarter in (1, 2, 3, 4)}
    setups = [setup, *(_holding(setup, most) for most in sorted(more) if most > held)]
    seconds = [predicted(each.config, each.network, each.topology, each.machine).seconds for each in setups]
    best = next(i for i, step in enumerate(seconds) if step <= AS_FAST * min(seconds))
    if best == 0:
        return []
    most = stored(setups[best].config)
    before, after = (estimate(each, Libraries(0, 0)) for each in (setup, setups[best]))
    takes = [b.layers + b.links - a.layers - a.links for a, b in zip(before, after, strict=True)]
    return wrapped(
        "stored    ",
        f"at most {held} micro-batches in a stage. With {most} (--set pipeline='{{zero_bubble: {most}}}') a step is "
        f"predicted to take {1e3 * seconds[best]:.3g} instead of {1e3 * seconds[0]:.3g} ms, and a rank of stage "
        f"{takes.index(max(takes))} {max(takes) / 1e6:,.1f} MB more",
    )


def _holding(setup: Setup, most: int) -> Setup:
    """Return the setup of a zero-bubble pipeline whose stages hold at most so many micro-batches."""
    pipeline = ZeroBubble(most)
    config = replace(setup.config, pipeline=pipeline)
    pieces = micro_batches(config, setup.network, setup.topology, setup.machine)
    options = replace(setup.options, pipeline=pipeline, micro_batches=pieces)
    sampler = setup.sampler.divided(setup.topology.replicas, pieces)
    return replace(setup, config=config, options=options, sampler=sampler)
