"""Checks that all ranks make together: MPI's start, installations and cores that do not fit, messages, clocks, the
output folder as other nodes see it, and a short training."""

from __future__ import annotations

import math
import os
import platform
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np

from nettorrent_mpi import __version__
from nettorrent_mpi.comm.world import World
from nettorrent_mpi.cores import count_cores
from nettorrent_mpi.doctor.finding import Finding, fault, ok, warning
from nettorrent_mpi.doctor.places import nearest_above
from nettorrent_mpi.doctor.surroundings import Surroundings
from nettorrent_mpi.engine.failure import agreed
from nettorrent_mpi.plan.errors import NetTorrentWarning

NODES = 8  # whose distance from rank 0's is measured
LATENCY_INSIDE, LATENCY_BETWEEN = 50e-6, 1e-3  # seconds for a small message from which on one is warned
BANDWIDTH_BETWEEN = 50e6  # bytes per second, likewise
_LARGE = 4 << 20  # bytes
_TURNS = 0.2  # seconds of small messages, and of large ones
CLOCKS = 2.0  # seconds by which clocks may differ
TRAINING = 2.0  # seconds
_SEEN = 5.0  # seconds in which a file has to appear on another node


class Told(NamedTuple):
    """A rank tells the others this of itself."""

    host: str
    cpus: frozenset[int]  # that it may run on
    versions: tuple[tuple[str, str], ...]
    findings: Sequence[Finding]


def start(place: Surroundings) -> tuple[World, Finding]:
    """Start MPI. Raises LaunchError."""
    world = World()
    if world.threads != "multiple":
        found = warning(
            f"{world.library}, {world.size} ranks, but threads may call it one at a time only ({world.threads})",
            "an MPI built with MPI_THREAD_MULTIPLE",
        )
    elif place.launched:
        found = ok(f"{world.library}, {world.size} rank{'s' if world.size > 1 else ''}, threads: multiple")
    else:
        found = ok("not needed by one rank")
    return world, found


def roll_call(world: World, findings: Sequence[Finding]) -> list[Told]:
    """Return what each rank tells. All ranks call."""
    names = ("numpy", "mpi4py", "h5py")
    versions = (("nettorrent_mpi", __version__), ("Python", platform.python_version()),
                *((name, version(name)) for name in names))  # fmt: skip
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    return world.gather_objects(Told(world.host, frozenset(cpus), versions, tuple(findings)))


def compare(world: World, everyone: Sequence[Told]) -> Iterator[tuple[str, Finding]]:
    """Compare what all ranks have told: gives names of checks, and findings."""
    others = [
        f"rank {rank} on {each.host} has {name} {number}, rank 0 {number0}"
        for rank, each in enumerate(everyone)
        for (name, number), (_, number0) in zip(each.versions, everyone[0].versions, strict=True)
        if number != number0
    ]
    if others:
        yield "installation", fault("; ".join(others[:4]), "install the same versions on all nodes")
    elif world.size > 1:
        yield "installation", ok(", ".join(" ".join(each) for each in everyone[0].versions) + " on all ranks")
    if world.size > 1:
        crowded = _crowded(world, everyone)
        yield "pinning", crowded or ok(_bound(everyone))


def _crowded(world: World, everyone: Sequence[Told]) -> Finding | None:
    """Return a warning where some ranks of a node are bound to fewer cores than they are, and others are free."""
    for node in sorted(set(world.nodes)):
        here = [rank for rank, other in enumerate(world.nodes) if other == node]
        every = frozenset[int]().union(*(everyone[rank].cpus for rank in here))
        for cpus in {everyone[rank].cpus for rank in here} - {frozenset[int]()}:
            inside = [rank for rank in here if everyone[rank].cpus <= cpus]
            cores, more = count_cores(set(cpus)), count_cores(set(every)) if every else 1
            if len(inside) > cores and (more > cores or ((os.cpu_count() or 1) > cores and len(here) > 1)):
                several = ", ".join(map(str, inside[:6])) + (", ..." if len(inside) > 6 else "")
                return warning(
                    f"ranks {several} on {everyone[node].host} are bound to {cores} core{'s' if cores > 1 else ''} "
                    f"(CPUs {', '.join(map(str, sorted(cpus)[:8]))}), which they share",
                    "mpirun --bind-to core (MPICH: -bind-to core), or --bind-to none; no taskset around mpirun",
                )
    return None


def _bound(everyone: Sequence[Told]) -> str:
    most = max(len(each.cpus) for each in everyone)
    return f"each rank may run on up to {most} CPU{'s' if most > 1 else ''}"


# -- messages and clocks -----------------------------------------------------------------------------------------------


class _Line(NamedTuple):
    latency: float  # seconds for a small message
    bandwidth: float  # bytes per second
    ahead: float  # seconds by which the other's clock is


def measure(world: World, everyone: Sequence[Told], crowded: bool) -> Iterator[tuple[str, Finding]]:
    """Measure messages between rank 0 and others: one on its node, and the first of other nodes. All ranks call; gives
    findings on rank 0. `crowded`: ranks wait for each other's turns on a core, and messages with them."""
    neighbour = next((r for r in range(1, world.size) if world.nodes[r] == world.nodes[0]), None)
    firsts = [rank for rank in range(1, world.size) if world.nodes[rank] == rank][:NODES]
    lines: dict[int, _Line] = {}
    for other in [*([neighbour] if neighbour is not None else []), *firsts]:
        if world.rank in (0, other):
            lines[other] = _line(world, other)
    _quiet_barrier(world)
    if world.rank:
        return
    if neighbour is not None:
        line = lines.pop(neighbour)
        told = f"inside a node {1e6 * line.latency:.1f} us, {line.bandwidth / 1e9:.2f} GB/s"
        if line.latency > LATENCY_INSIDE and not crowded:
            yield (
                "messages",
                warning(
                    f"{told}: slow for one node", "see `pinning` and `cores`; other programs may keep the cores busy"
                ),
            )
        else:
            yield "messages", ok(told + (" (ranks share cores)" if crowded else ""))
    for other, line in lines.items():
        host = everyone[other].host
        told = f"{everyone[0].host} to {host} {1e6 * line.latency:.0f} us, {line.bandwidth / 1e9:.3f} GB/s"
        if line.latency > LATENCY_BETWEEN or line.bandwidth < BANDWIDTH_BETWEEN:
            yield "messages", warning(
                f"{told}: slow", "the fast network, if there is one (Open MPI: --mca btl_tcp_if_include; MPICH: "
                "-iface); else replicas that agree by `exchange: gossip`",
            )  # fmt: skip
        else:
            yield "messages", ok(told)
        if abs(line.ahead) > CLOCKS:
            yield (
                "clocks",
                warning(
                    f"that of {host} is {abs(line.ahead):.1f} s {'ahead of' if line.ahead > 0 else 'behind'} "
                    f"{everyone[0].host}'s: times in traces and locks of run folders are wrong by as much",
                    "synchronize them (chrony, ntpd)",
                ),
            )
        else:
            yield "clocks", ok(f"{host} and {everyone[0].host} differ by {abs(line.ahead):.3f} s")


def _line(world: World, other: int) -> _Line:
    """Send messages back and forth between rank 0 and another one; both call."""
    comm, peer, asks = world.comm, other if world.rank == 0 else 0, world.rank == 0
    small, large = np.zeros(1, np.uint8), np.zeros(_LARGE, np.uint8)

    def turn(values: Any) -> None:
        if asks:
            comm.Send(values, peer)
        comm.Recv(values, peer)
        if not asks:
            comm.Send(values, peer)

    best = []
    for values in (small, large):
        turn(values)  # opens connections
        times, until, go_on = [math.inf], time.monotonic() + _TURNS, np.ones(1, np.uint8)
        while go_on[0]:
            go_on[0] = time.monotonic() < until or len(times) < 4
            if asks:
                comm.Send(go_on, peer)
            else:
                comm.Recv(go_on, peer)
            began = time.perf_counter()
            turn(values)
            times.append((time.perf_counter() - began) / 2)
        best.append(min(times))
    ahead = (math.inf, 0.0)
    stamp = np.zeros(1)
    for _ in range(10):  # the quickest turn tells best when the other looked at its clock (Cristian's algorithm)
        before = time.time()
        if asks:
            comm.Send(stamp, peer)
            comm.Recv(stamp, peer)
            after = time.time()
            ahead = min(ahead, (after - before, float(stamp[0]) - (before + after) / 2))
        else:
            comm.Recv(stamp, peer)
            stamp[0] = time.time()
            comm.Send(stamp, peer)
    return _Line(best[0], _LARGE / best[1], ahead[1])


def _quiet_barrier(world: World) -> None:
    """Wait for all without keeping a core busy, which those that measure may need."""
    if world.size > 1:
        request = world.comm.Ibarrier()
        while not request.Test():
            time.sleep(0.001)


# -- the output folder -------------------------------------------------------------------------------------------------


def look_for_file(world: World, place: Surroundings, everyone: Sequence[Told]) -> Iterator[tuple[str, Finding]]:
    """Check that the first rank of every node sees a file that rank 0 makes in the output folder. All ranks call."""
    if len(set(world.nodes)) == 1:
        return
    path = nearest_above(place.output) / f".nettorrent-doctor-{world.run}"
    if world.rank == 0:
        with suppress(OSError):  # which `output` tells
            path.touch()
    there = world.once(path.exists)
    until = time.monotonic() + _SEEN
    while there and world.nodes[world.rank] == world.rank and not path.exists() and time.monotonic() < until:
        time.sleep(0.05)
        os.path.lexists(path.parent / "x")  # lets NFS look anew
    seen = world.gather_objects(not there or path.exists())
    if world.rank == 0:
        path.unlink(missing_ok=True)
        blind = sorted({everyone[rank].host for rank, each in enumerate(seen) if not each})
        if blind:
            yield (
                "output",
                fault(
                    f"{', '.join(blind[:4])} see{'s' * (len(blind) == 1)} another {path.parent} than "
                    f"{everyone[0].host}: checkpoints need one that all ranks share",
                    "a folder on a file system of the whole cluster (--output DIR)",
                ),
            )
        elif there:
            yield "output", ok(f"all {len(set(world.nodes))} nodes share {path.parent}")


# -- a training --------------------------------------------------------------------------------------------------------


def train(world: World) -> Finding:
    """Train the digits for some seconds. All ranks call. Raises what one rank alone has found."""
    from nettorrent_mpi.api import Trainer
    from nettorrent_mpi.planning import load_config

    changes = (f"train.batch_size={max(32, 4 * world.size)}", "train.report_every=5", "train.epochs=1000",
               "train.schedule=constant")  # fmt: skip
    losses: list[float] = []
    speed, began = 0.0, time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NetTorrentWarning)  # of a layout for so many ranks
        try:
            config = world.once(lambda: load_config(None, *changes))
            with Trainer(config, comm=world) as trainer:
                for record in trainer.train():
                    began = began if losses else time.monotonic()  # what is fastest was tried in the steps before
                    losses.append(record.train_loss)
                    speed = record.samples_per_second
                    if time.monotonic() - began > TRAINING and len(losses) > 5:
                        break
        except Exception as error:
            if not agreed(error, world):
                raise
            return fault(f"the digits cannot be trained: {error}", "mend what is told above, and try again")
    first, last = losses[0], min(losses[-3:])
    told = f"the digits' loss went from {first:.2f} to {last:.2f} in {time.monotonic() - began:.1f} s"
    if not last < first:
        return fault(f"{told}: it does not fall", "report it with the output of nettorrent doctor --json")
    return ok(f"{told} ({speed:,.0f} rows/s)")
