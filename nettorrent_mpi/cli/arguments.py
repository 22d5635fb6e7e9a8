"""The command line: its parser, and what it says of mistakes. The commands and their options are in cli/options/."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from nettorrent_mpi import __version__
from nettorrent_mpi.cli.options.comparison_options import add_comparison_commands
from nettorrent_mpi.cli.options.data_options import add_data_commands
from nettorrent_mpi.cli.options.network_options import add_network_commands
from nettorrent_mpi.cli.options.train_options import add_train_commands
from nettorrent_mpi.cli.runs.run_arguments import add_run_commands
from nettorrent_mpi.cli.terminal import fitted
from nettorrent_mpi.config.settings import key_of
from nettorrent_mpi.config.translation import nearest
from nettorrent_mpi.plan.errors import UserError


class _Formatter(argparse.HelpFormatter):
    """Breaks lines between words only, and leaves indented lines, which are commands, as they are."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return fitted(" ".join(text.split()), width).replace("\n  ", "\n").split("\n")

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = (each if each.startswith(" ") else " ".join(each.split()) for each in text.split("\n\n"))
        return "\n\n".join(
            each if each.startswith(" ") else fitted(each, width).replace("\n  ", "\n") for each in paragraphs
        )


class _Parser(argparse.ArgumentParser):
    """Raises UserErrors for wrong arguments, so that they are shown once and not by every rank. Options cannot be
    abbreviated: an abbreviated --help would not be recognised before MPI starts, and every rank would print it."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, formatter_class=_Formatter, **options)

    def error(self, message: str) -> NoReturn:
        wrong = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        hint = nearest(wrong[1], re.findall(r"[\w-]+", wrong[2]), listed=False) if wrong else ""
        raise UserError(f"{message}{f'; {hint}' if hint else ''} (see {self.prog} --help)")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = _Parser(prog="nettorrent", description="Trains neural networks over MPI, one swarm of ranks per layer.")
    parser.add_argument("--version", action="version", version=f"nettorrent_mpi {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    add_train_commands(commands)
    add_network_commands(commands)
    add_run_commands(commands)
    add_comparison_commands(commands)
    add_data_commands(commands)
    return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse a command line. Raises UserError."""
    parser = make_parser()
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        following = dict(zip(arguments, [*arguments[1:], "-"], strict=True))
        hints = [hint for hint in (_hint(word, following.get(word, "-"), args) for word in unknown) if hint]
        command = " ".join([parser.prog, args.command, *([args.action] if hasattr(args, "action") else [])])
        told = "; ".join([f"unrecognized arguments: {' '.join(unknown)}", *hints])
        raise UserError(f"{told} (see {command} --help)")
    return args


def _hint(word: str, following: str, args: argparse.Namespace) -> str:
    """Say what is to be written in place of an argument that the command does not know; `following` is the next one."""
    name, _, value = word.lstrip("-").partition("=")
    if "changes" in args:
        key = name if not word.startswith("-") and value else key_of(name)
        if " " in key:
            return f"{word}: {key}"
        if key:
            value = value or ("..." if following.startswith("-") else following)
            return f"write --set {key}={value} in place of {word}"
        if name in ("config", "config-file", "cfg", "c"):
            return "write the configuration's file without an option before it"
    if not word.startswith("-"):
        return ""
    others = {"config", "search", "run", "places", "path", "target", "source", "name", "command", "action", "shell"}
    options = [f"--{each.replace('_', '-').replace('changes', 'set')}" for each in vars(args) if each not in others]
    return nearest(f"--{name}", options, listed=False)
