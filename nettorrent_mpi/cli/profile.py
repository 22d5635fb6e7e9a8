"""The command `nettorrent profile`: measures this machine for a network, and keeps what predictions need."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nettorrent_mpi.api import Trainer
from nettorrent_mpi.cli.arguments import parse
from nettorrent_mpi.cli.ranks import Ranks
from nettorrent_mpi.comm.world import World
from nettorrent_mpi.config.sections import Checkpoint, Config
from nettorrent_mpi.engine.layer_times import Company
from nettorrent_mpi.engine.layout import lay_out, predicted
from nettorrent_mpi.engine.measured_machine import (
    layers_of,
    link_of,
    measure_messages,
    own_costs,
    serial_trials,
    solved,
    trials,
)
from nettorrent_mpi.engine.profiles import check_profile, key_of, own_file, write_profile
from nettorrent_mpi.engine.setup import Setup, set_up
from nettorrent_mpi.engine.usage import WARM_UP
from nettorrent_mpi.plan.errors import ConfigError, OutputError, warn
from nettorrent_mpi.plan.exchange_specs import NoCopies
from nettorrent_mpi.plan.performance import Machine
from nettorrent_mpi.plan.specs import Constant
from nettorrent_mpi.planning import PlannedRun, load_config, placed

MOST_RANKS = 2
MOST_SECONDS = 60.0
LEAST_STEPS, MOST_STEPS = 15, 3000


def profile(arguments: Sequence[str], chosen: str) -> int:
    """Run `nettorrent profile` on all ranks; returns the exit code."""
    with Ranks() as ranks:
        world = ranks.world
        with world.agreement():
            args = parse(arguments)
            if not 0 < args.seconds <= MOST_SECONDS:
                raise ConfigError(f"--seconds {args.seconds:g}: more than 0, at most {MOST_SECONDS:g}")
            if world.size > MOST_RANKS:
                raise ConfigError(f"a profile is measured on 1 or 2 ranks, not on {world.size}: mpirun -n 2")
        if args.output is not None:
            world.once(lambda: check_profile(Path(args.output)))
        config = world.once(lambda: _prepared(load_config(args.config, *args.changes)))
        try:
            with world.agreement():
                setup = set_up(config, world.size, device="cpu")
        except ConfigError as error:
            mistake = error
            raise world.once(lambda: placed(mistake, args.config, *args.changes)) from None
        machine = Profiling(world, setup, args.seconds).machine()
        world.once(lambda: _keep(args.output, config, setup, machine, world))
    return ranks.code


def _prepared(config: Config) -> Config:
    """Return the configuration of the trainings that are measured: nothing is reported, evaluated or saved."""
    if config.device == "gpu":
        raise ConfigError("profiles are of CPU cores: add --set device=cpu", key="device")
    kernels = "fastest" if config.kernels == "auto" else config.kernels  # as of a long run
    checkpoint = Checkpoint(every_steps=None, every_seconds=None, every_epochs=None)
    train = replace(config.train, schedule=Constant(), stop_at=None, epochs=1, steps=None)
    return replace(
        config, device="cpu", kernels=kernels, checkpoint=checkpoint, train=train, layout="layers", watchdog="none",
        redundancy=NoCopies(), trace=False,
    )  # fmt: skip


def _keep(output: str | None, config: Config, setup: Setup, machine: Machine, world: World) -> None:
    """Write the profile, and say what was measured."""
    layers = sum(facts.operations for facts in setup.network.facts)
    rows = config.train.batch_size
    step = predicted(replace(config, layout="layers"), setup.network, lay_out(config, setup.network, 1), machine)
    sys.stdout.write(
        f"{config.data.name}, {len(setup.network.facts)} weight layers: a step of {rows} rows takes one rank "
        f"{1e3 * step.seconds:.3g} ms, {layers * rows / step.seconds / 1e9:.0f} GFLOP/s\n"
    )
    about = {"data": config.data.name, "batch_size": rows, "ranks": world.size, "kernels": config.kernels}
    try:
        path = own_file() if output is None else Path(output)
        write_profile(path, key_of(config, setup.network), machine, about)
    except (OSError, RuntimeError) as error:
        what = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        if output is not None:
            raise OutputError(f"{path} could not be written ({what}); choose another with --output FILE") from None
        warn(f"the profile could not be kept ({what}): give --output FILE, and --profile FILE to train and simulate")
        return
    use = "" if output is None else f"; --profile {output} of train and simulate uses it"
    sys.stdout.write(f"kept in {path}{use}\n")


class Profiling:
    """A Profiling measures a machine on one or two ranks, in about `seconds` seconds. All ranks call."""

    def __init__(self, world: World, setup: Setup, seconds: float):
        self._world, self._setup, self._seconds = world, setup, seconds
        self._config, self._network = setup.config, setup.network
        self._apart = len(set(world.nodes)) > 1

    def machine(self) -> Machine:
        """Return what was measured."""
        world, own = self._world, self._world
        both = world.size > 1 and not self._apart
        each = self._seconds / (15 if both else 8)  # of a training
        if world.size > 1:
            own = World(world.subgroup([world.rank]).comm)
        alone = self._one(own, Company(), 2 * each, each, idle=both)
        source = f"measured on {world.host} {time.strftime('%Y-%m-%d')}"
        found = replace(alone, source=source, collective=None, fence=None, latency=Machine.latency)
        if self._apart:
            found = replace(found, link=link_of(world))
        elif both:
            together = self._one(own, Company(world), 2 * each, each, idle=False)
            latency, bandwidth = measure_messages(world)
            found = replace(together, bandwidth=2 * bandwidth)
            for trial in trials(self._config, self._network):
                seconds = self._step(world, trial.config, each, found)
                found = solved(found, trial.name, trial.config, self._network, seconds)
            found = replace(found, source=source, latency=max(found.latency, latency / 2), alone=alone)
        if own is not world:
            own.free()
        return found

    def _one(self, own: World, company: Company, layers: float, each: float, *, idle: bool) -> Machine:
        """Measure a rank by itself: rank 0, while the other one is idle, or both at once."""
        found: Machine | None = None
        if not idle or self._world.rank == 0:
            found = layers_of(self._network, self._setup.options, company, layers)
            configs = serial_trials(self._config, self._network)
            found = own_costs(found, self._network, {c: self._step(own, c, each, found) for c in configs})
        if self._world.size > 1:
            self._world.doze()
        made = found
        return self._world.once(lambda: made)  # type: ignore[return-value]

    def _step(self, world: World, config: Config, seconds: float, machine: Machine) -> float:
        """Return the seconds per step of a training that takes about so many seconds."""
        guess = predicted(config, self._network, lay_out(config, self._network, world.size), machine).seconds
        steps = min(max(round(seconds / guess), LEAST_STEPS), MOST_STEPS) + WARM_UP
        train = replace(config.train, epochs=None, steps=steps, report_every=steps, evaluate_every=steps)
        planned = PlannedRun(
            set_up(replace(config, train=train), world.size, self._setup.dataset, device="cpu"), has_length=True
        )
        with Trainer(planned, comm=world) as trainer:
            *_, record = trainer.train()
        assert record.samples_per_second
        return config.train.batch_size / record.samples_per_second
