"""The words of a command line: every command with its options, and the help that `--help` shows."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from nettorrent_mpi import __version__
from nettorrent_mpi.plan.errors import UserError

TRAIN = """\
Trains the network that CONFIG describes on all ranks of the run and writes the results into the output folder:

    mpirun -n 4 python -m nettorrent_mpi.train configs/mnist.yaml
    mpirun -n 4 python -m nettorrent_mpi.train configs/mnist.yaml --set train.epochs=2 --set layout=auto
    python -m nettorrent_mpi.train configs/cifar.yaml --dry-run --ranks 64

Without mpirun it runs on one rank, the serial baseline. Without CONFIG it trains on the handwritten digits that come
with the package."""

SPEEDUP = """\
Trains the network that CONFIG describes in every way of parallelizing, on several numbers of ranks, beside one rank and
beside PyTorch (where it is installed), in turns, and tells how fast each was and why:

    nettorrent speedup configs/mnist.yaml --ranks 1,2,4,8
    nettorrent speedup configs/digits.yaml --ranks 1,2 --modes rows,1f1b,gossip --peers none --steps 200
    nettorrent speedup configs/mnist.yaml --ranks 1,2,4 --accuracy 0.97

It starts the ranks itself: no mpirun before it. The output folder gets results.json (every figure, the machine, the
versions), report.md (tables and an analysis made from the figures), pictures as PNG and SVG, and trainings/, the
configuration of each run. What is not possible, as more pipeline stages than layers, is told in the report."""


class _Parser(argparse.ArgumentParser):
    """Argument errors are UserErrors, so that they are told once, not by every rank. No option may be shortened: a part
    of --help would not be known for it before the ranks meet, and every rank would tell it."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def _parser() -> _Parser:
    parser = _Parser(prog="nettorrent", description="Trains neural networks over MPI, one swarm of ranks per layer.")
    parser.add_argument("--version", action="version", version=f"nettorrent_mpi {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    train = commands.add_parser(
        "train", help="train a network", description=TRAIN, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    train.add_argument("config", nargs="?", metavar="CONFIG", help="a YAML file, see configs/ (default: the digits)")
    _add_set(train)
    train.add_argument("--output", metavar="DIR", help="the run's folder (default: the configuration's `output`)")
    train.add_argument("--overwrite", action="store_true", help="replace another run's results in that folder")
    train.add_argument(
        "--resume", nargs="?", const="", metavar="PATH",
        help="go on from the newest checkpoint of the output folder, or from PATH (a run's folder or a checkpoint), "
        "with any layout and number of ranks",
    )  # fmt: skip
    train.add_argument(
        "--dry-run", action="store_true", help="show layout, schedule, predicted time and memory, and train nothing"
    )
    train.add_argument(
        "--ranks", type=int, metavar="N", help="with --dry-run: plan for N ranks, not for those there are"
    )

    evaluate = commands.add_parser("evaluate", help="loss and accuracy of a finished run on its test set")
    evaluate.add_argument("run", metavar="RUN", help="the run's folder")
    _add_set(evaluate)

    export = commands.add_parser("export", help="a run's weights as a NumPy .npz file")
    export.add_argument("run", metavar="RUN", help="the run's folder")
    export.add_argument("target", metavar="FILE.npz", help="the file to write; it must not exist yet")

    _add_speedup(commands)

    data = commands.add_parser("data", help="fetch published data sets, import folders of images")
    kinds = data.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=_Parser)
    fetch = kinds.add_parser("fetch", help="download a data set from its publisher, and verify it")
    fetch.add_argument("name", metavar="NAME", help="mnist, fashion_mnist, letters or cifar10")
    fetch.add_argument("--root", default="data", metavar="DIR", help="where to (default: data)")
    images = kinds.add_parser("import", help="put a folder of images, one sub-folder per class, into an HDF5 file")
    images.add_argument("folder", metavar="DIR", help="the folder; each sub-folder is a class")
    images.add_argument("target", metavar="FILE.h5", help="the file to write")
    images.add_argument("--size", metavar="HxW", help="scale all images to this size, as 32x32")
    images.add_argument(
        "--test", type=float, default=0.0, metavar="PART", help="part of each class kept for the test set"
    )
    images.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    return parser


def _add_speedup(commands: Any) -> None:
    parser = commands.add_parser(
        "speedup", help="compare all ways of parallelizing a network, and PyTorch", description=SPEEDUP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="a YAML file, see configs/ (default: the digits)")
    parser.add_argument("--ranks", default="1,2,4", metavar="N,N,...", help="numbers of ranks (default: 1,2,4)")
    parser.add_argument(
        "--modes", metavar="MODE,...",
        help="some of rows, cols, gpipe, 1f1b, async, replicas, gossip, elite, layers, auto (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--peers", metavar="PEER,...",
        help="some of torch, torch_channels_last, torch_compile, ddp, each with as many threads or processes as there "
        "are ranks, and with one; or none (default: all, if PyTorch is installed)",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="turns of every side (default: 3)")
    parser.add_argument(
        "--steps", type=int, metavar="N", help="timed steps of a turn (default: what takes one rank about 5 s)"
    )
    parser.add_argument(
        "--accuracy", type=float, metavar="A",
        help="train each mode and peer once until this accuracy, too, and tell when it was reached; the epochs of the "
        "configuration are the most",
    )  # fmt: skip
    _add_set(parser)
    parser.add_argument("--output", metavar="DIR", help="the folder to write (default: runs/speedup-CONFIG)")
    parser.add_argument("--overwrite", action="store_true", help="replace another comparison's results in that folder")
    parser.add_argument(
        "--launcher", metavar="COMMAND",
        help="what starts the ranks, with {ranks} for their number, as 'srun --mpi=pmix --ntasks={ranks}' "
        "(default: mpirun -n {ranks})",
    )  # fmt: skip


def _add_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="changes",
        help="change one value of the configuration, as train.steps=100 or model.layers.0.dropout=0.1; repeatable",
    )  # fmt: skip


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """What the words of a command line ask for. Raises UserError."""
    return _parser().parse_args(arguments)
