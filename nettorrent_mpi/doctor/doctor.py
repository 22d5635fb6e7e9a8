"""The command `nettorrent doctor`, on all ranks or alone."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from nettorrent_mpi import env
from nettorrent_mpi.cli.arguments import parse
from nettorrent_mpi.cli.first import launcher_rank
from nettorrent_mpi.cores import local_rank, positive, ranks_on_node
from nettorrent_mpi.doctor.child import NAMES
from nettorrent_mpi.doctor.finding import Findings
from nettorrent_mpi.doctor.supervisor import Supervisor
from nettorrent_mpi.doctor.surroundings import Surroundings
from nettorrent_mpi.plan.errors import ConfigError, UserError

_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PALS_SIZE", "SLURM_STEP_NUM_TASKS")


def doctor(arguments: Sequence[str], chosen: str) -> int:
    """Check the environment and report on it. Rank 0 reports on all ranks; where MPI does not work, the first rank of
    each node on those of its node. Returns the exit code, 2 if there is a fault."""
    args = parse(arguments)
    if not args.limit > 0:
        raise ConfigError(f"--limit {args.limit}: seconds above 0")
    place = _place(os.environ, Path(args.output), args.limit)
    supervisor = Supervisor(place, platform.node(), _without(args.checks))
    try:
        supervisor.run()
        if not supervisor.complete and place.launched:
            supervisor.wait_for_others()
            if supervisor.notes.alone:
                return 0
        elif place.rank:
            return 0
        told = dict(supervisor.told)
        silent = supervisor.silent()
        if silent is not None:
            told[place.rank] = [*told.get(place.rank, []), silent]
        report = Findings(NAMES, told, place.size, supervisor.hosts)
        sys.stdout.write(json.dumps(report.plain(), indent=2) + "\n" if args.json else report.text())
        sys.stdout.flush()
        return UserError.exit_code if report.count("fault") else 0
    finally:
        supervisor.end()


def _without(chosen: str | None) -> list[str]:
    """Return the checks that are not to be made. Raises ConfigError for a name of none."""
    if chosen is None:
        return []
    names = [name.strip() for name in chosen.split(",")]
    for name in names:
        if name not in NAMES:
            raise ConfigError(f"--checks {chosen}: there is no check {name!r}; there are {', '.join(NAMES)}")
    return [name for name in NAMES if name not in names]


def _place(environ: Mapping[str, str], output: Path, seconds: float) -> Surroundings:
    """Say which rank this is, by its launcher's variables alone."""
    if not env.launched(environ):
        return Surroundings(output, seconds=seconds)
    rank, here = launcher_rank(), local_rank(environ)
    size = max([positive(environ.get(name)) for name in _SIZES] + [1])
    return Surroundings(output, rank, size, ranks_on_node(environ), rank if here is None else here, True, seconds)
