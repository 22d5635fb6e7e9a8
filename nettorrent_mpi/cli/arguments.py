"""The command line: its parser, and what it says of mistakes. The commands and their options are in cli/options/."""

from __future__ import annotations

import argparse
import difflib
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

ABOUT = """\
Trains neural networks over MPI, one swarm of ranks per layer. To begin with:

    nettorrent init --output first.yaml
    mpirun -n 4 nettorrent train first.yaml
    nettorrent evaluate runs/first
    nettorrent inspect runs/first

`nettorrent COMMAND --help` says more of each command."""


class _Formatter(argparse.HelpFormatter):
    """Breaks lines between words only, and leaves indented lines, which are commands, as they are."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return fitted(" ".join(text.split()), width).replace("\n  ", "\n").split("\n")

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = (each if each.startswith(" ") else " ".join(each.split()) for each in text.split("\n\n"))
        return "\n\n".join(
            each if each.startswith(" ") else fitted(each, width).replace("\n  ", "\n") for each in paragraphs
        )


class _MissingError(UserError):
    """An argument is missing that a command needs; what else is wrong was not looked at."""


class _Parser(argparse.ArgumentParser):
    """Raises UserErrors for wrong arguments, so that they are shown once and not by every rank. Options cannot be
    abbreviated: an abbreviated --help would not be recognised before MPI starts, and every rank would print it."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, formatter_class=_Formatter, **options)

    def error(self, message: str) -> NoReturn:
        if message.startswith("the following arguments are required"):
            raise _MissingError(f"{message} (see {self.prog} --help)")
        wrong = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        hint = nearest(wrong[1], re.findall(r"[\w-]+", wrong[2]), listed=False) if wrong else ""
        raise UserError(f"{message}{f'; {hint}' if hint else ''} (see {self.prog} --help)")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = _Parser(prog="nettorrent", description=ABOUT)
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
    parser, missing = make_parser(), None
    try:
        args, unknown = parser.parse_known_args(arguments)
    except _MissingError as error:  # a misspelt option comes first: what is missing may follow from it
        missing = error
        _need_nothing(parser)
        args, unknown = parser.parse_known_args(arguments)
    if unknown:
        following = dict(zip(arguments, [*arguments[1:], "-"], strict=True))
        asked, wrong = _asked(parser, args), [word for word in unknown if word[0] == "-" or "=" in word] or unknown
        hints = [hint for hint in (_hint(word, following.get(word, "-"), args, asked) for word in wrong) if hint]
        told = "; ".join([f"unrecognized arguments: {' '.join(unknown)}", *hints])
        raise UserError(f"{told} (see {asked.prog} --help)")
    if missing is not None:
        raise missing
    return args


def _subparsers(parser: argparse.ArgumentParser) -> list[argparse._SubParsersAction[_Parser]]:
    return [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]


def _need_nothing(parser: argparse.ArgumentParser) -> None:
    """Let a command line be read though it lacks arguments."""
    for action in parser._actions:
        action.required = False
    for below in _subparsers(parser):
        for each in below.choices.values():
            _need_nothing(each)


def _asked(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.ArgumentParser:
    """Return the parser of the command that was asked for."""
    for below in _subparsers(parser):
        name = getattr(args, below.dest)
        return parser if name is None else _asked(below.choices[name], args)
    return parser


def _hint(word: str, following: str, args: argparse.Namespace, asked: argparse.ArgumentParser) -> str:
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
        output = asked._option_string_actions.get("--output")
        told = f"the file that it writes is named by an option: --output {word}"
        return told if output is not None and output.metavar == "FILE" else ""
    options = sorted(each[2:] for each in asked._option_string_actions if each[:2] == "--" and each != "--help")
    close = difflib.get_close_matches(name, options, n=1)  # without the dashes, which make any two words alike
    return f"did you mean --{close[0]}?" if close else f"its options are --{', --'.join(options)}"
