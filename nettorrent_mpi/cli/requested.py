"""The run that a command line requests: its configuration, with what is known of the machine, becomes a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

from nettorrent_mpi.api import watched
from nettorrent_mpi.cli.elsewhere import Elsewhere, elsewhere
from nettorrent_mpi.cli.run_folder import AUTO
from nettorrent_mpi.comm.world import World
from nettorrent_mpi.config.sections import Config
from nettorrent_mpi.engine.checkpoint import named_checkpoints
from nettorrent_mpi.engine.checkpoint_manifest import Manifest
from nettorrent_mpi.engine.devices import choose_device
from nettorrent_mpi.engine.profiles import Profiles, most_on_node
from nettorrent_mpi.engine.setup import Setup, of_survivors
from nettorrent_mpi.engine.usage import peak_memory
from nettorrent_mpi.plan.errors import ConfigError, LayoutError, UserError
from nettorrent_mpi.planning import PlannedRun, load_config, placed, plan_run

if TYPE_CHECKING:
    import argparse


def asked(world: World, arguments: Sequence[str]) -> argparse.Namespace:
    """Return what a command line asks for. Rank 0 parses it, so that the others load no parser. Raises UserError."""

    def parsed() -> SimpleNamespace:
        from nettorrent_mpi.cli.arguments import parse

        return SimpleNamespace(**vars(parse(arguments)))

    return cast("argparse.Namespace", world.once(parsed))


def plan_requested(world: World, args: argparse.Namespace) -> tuple[PlannedRun, str]:
    """Plan the requested run. Gives the plan, and says what the run computes on."""
    before = peak_memory()
    config, known, other = world.once(lambda: _with_known(args, world))
    watched(world, config)
    checker = peak_memory() - before  # loaded on rank 0, to read the configuration
    try:
        # What is only planned needs no GPU.
        chosen = None if args.dry_run else choose_device(world, config.device)
        with world.agreement():
            kind, size, needed = chosen and chosen.kind, other.ranks or world.size, not args.dry_run
            try:
                planned = plan_run(config, size, kind, known, data_needed=needed, memory=other.memory)
            except LayoutError:
                if world.size == world.started:
                    raise
                planned = plan_run(config, world.started, kind, known, data_needed=needed)  # ranks were lost
                planned.setup = _without_lost(planned.setup, world.size)
    except UserError as error:
        mistake = error
        raise world.once(lambda: placed(mistake, args.config, *args.changes)) from None
    own = peak_memory()
    planned.process_memory = (own, own - checker)
    return planned, "" if chosen is None else chosen.line


def _with_known(args: argparse.Namespace, world: World) -> tuple[Config, Profiles, Elsewhere]:
    """Read the requested configuration, and what is known of the machine and of the run that goes on."""
    config, other = read(args), elsewhere(args)
    known = other.known(args.profile)
    if args.ranks is None and args.nodes is None:
        known = replace(known, node=most_on_node(world.nodes))
    return config, replace(known, layout=_kept_layout(config, args.resume, world.size)), other


def _kept_layout(config: Config, resume: str | None, ranks: int) -> str:
    """Return the layout of the run that goes on, where it was chosen for as many ranks; else nothing."""
    if resume is None or config.layout not in ("layers", "auto"):
        return ""
    place = Path(config.output or "runs/run") if resume in ("", AUTO) else Path(resume)
    try:
        told = Manifest.read(named_checkpoints(place)[-1]).attributes
    except UserError:  # what is wrong is told when it is resumed
        return ""
    return str(told.get("layout", "")) if told.get("ranks") == ranks else ""


def _without_lost(setup: Setup, ranks: int) -> Setup:
    """Return the setup of a run on fewer ranks than its layout was written for, before it has a state."""
    for live in (None, 1):
        found = of_survivors(setup, ranks, live)
        if found.topology.size == ranks:
            return found
    raise LayoutError(f"layout: no layout like it uses the {ranks} ranks that are left at the start")


def read(args: argparse.Namespace) -> Config:
    """Read the requested configuration. Only here, on rank 0, a new run loads pydantic."""
    config = load_config(args.config, *args.changes)
    given = [name for name in ("ranks", "nodes", "link", "memory") if getattr(args, name) is not None]
    if given and not args.dry_run:
        raise ConfigError(f"--{given[0]} is for --dry-run; a real run has the ranks that mpirun -n started")
    return config if args.output is None else replace(config, output=args.output)
