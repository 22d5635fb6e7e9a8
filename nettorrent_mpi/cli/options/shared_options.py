"""Options that several commands have."""

from __future__ import annotations

import argparse


def add_elsewhere(parser: argparse.ArgumentParser, when: str = "") -> None:
    parser.add_argument("--nodes", metavar="NxC", help=f"{when}on N nodes of C cores, with a rank on each, e.g. 64x48")
    parser.add_argument(
        "--link", metavar="RATE,TIME[,BURST]",
        help=f"{when}the link of each node to the others, and how long a short message takes, e.g. 100Gbit,2us "
        "(and what it takes at once when it was idle, e.g. 1Gbit,50us,256kB: a token bucket's burst) "
        "(default: as measured between nodes, or 10Gbit,20us)",
    )  # fmt: skip
    parser.add_argument(
        "--memory", metavar="SIZE", help=f"{when}a node's memory, e.g. 256GB: layouts that need more are refused"
    )
    parser.add_argument(
        "--profile", metavar="FILE",
        help="predict times by the measurements in FILE, which `nettorrent profile --output` wrote (default: this "
        "host's, if there are any; none: by constants)",
    )  # fmt: skip


def add_output(parser: argparse.ArgumentParser, what: str, meaning: str) -> None:
    """Add --output, which names what a command writes: `what` is FILE or DIR."""
    parser.add_argument("-o", "--output", metavar=what, help=meaning)


def add_overwrite(parser: argparse.ArgumentParser, what: str = "an existing file") -> None:
    parser.add_argument("--overwrite", action="store_true", help=f"replace {what}")


def add_set(parser: argparse.ArgumentParser, of: str = "the configuration") -> None:
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="changes",
        help=f"change a value of {of}, e.g. train.steps=100 or model.layers.0.dropout=0.1; may be repeated",
    )  # fmt: skip


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add CONFIG and --set."""
    parser.add_argument(
        "config", nargs="?", metavar="CONFIG", help="a YAML file; examples are in configs/ (default: the digits)"
    )
    add_set(parser)
