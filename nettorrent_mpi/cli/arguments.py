"""The command line: every command with its options and its `--help`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from nettorrent_mpi import __version__
from nettorrent_mpi.cli.runs.run_arguments import add_run_commands
from nettorrent_mpi.cli.terminal import fitted
from nettorrent_mpi.config.settings import key_of
from nettorrent_mpi.config.translation import nearest
from nettorrent_mpi.plan.data_specs import DATASETS
from nettorrent_mpi.plan.errors import UserError

TRAIN = """\
Trains the network that CONFIG describes on all ranks of the run, and writes the results to the output folder:

    mpirun -n 4 nettorrent train configs/mnist.yaml
    mpirun -n 4 nettorrent train configs/mnist.yaml --set train.epochs=2
    nettorrent train configs/cifar.yaml --dry-run --ranks 64

Without mpirun it runs on one rank: the serial baseline. Without CONFIG it trains on the handwritten digits that ship
with the package. Open MPI's mpirun wants --oversubscribe for more ranks than cores, and, to run as root, the variables
OMPI_ALLOW_RUN_AS_ROOT=1 and OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1."""

SPEEDUP = """\
Compares every mode of parallelizing the network that CONFIG describes, on several numbers of ranks, with one rank and
with PyTorch (where it is installed). The runs alternate. The report says how fast each mode was, and why:

    nettorrent speedup configs/mnist.yaml --ranks 1,2,4,8
    nettorrent speedup configs/digits.yaml --ranks 1,2 --modes rows,gossip
    nettorrent speedup configs/mnist.yaml --ranks 1,2,4 --accuracy 0.97
    nettorrent speedup configs/cifar_resnet.yaml --ranks 1,2,4 --baseline gpu

It starts the ranks itself; do not put mpirun before it. The output folder gets results.json (all figures, the machine,
the versions), report.md (tables, and an analysis of the figures), plots as PNG and SVG, and trainings/ (the
configuration of each run). The report also lists what is not possible, such as more pipeline stages than layers."""


EVALUATE = """\
Computes loss and accuracy of RUN's network on the test set, and on the rows that the run held back for validation, on
any number of ranks:

    nettorrent evaluate runs/letters
    mpirun -n 4 nettorrent evaluate runs/letters
    nettorrent evaluate runs/letters --confusion --to report

--confusion also writes confusion.csv and .svg (how many rows of each class are taken to be which), classes.csv (rows,
precision, recall and F1 of each class), predictions.csv (every row) and, where rows are pictures, mistakes.svg: those
that the network is most sure of and wrong about. It looks at the test set; at the validation rows where there is
none."""


DRAW = """\
Shows a page on which you draw a letter or a digit, with mouse or finger, and the network of RUN reads it:

    nettorrent draw runs/letters
    nettorrent draw runs/digits --port 8800
    nettorrent draw runs/own --like mnist

The page is for this machine alone, at an address with a secret. To use it from another one, type the line `ssh ...`
that the command shows there first (for a compute node with -J LOGIN-NODE). Drawings, and pictures of handwriting, dark
on light or light on dark, are prepared as those of the data set that the network was trained on: mnist, letters (as
EMNIST, upright or transposed) or digits. For other networks --like says what their pictures resemble; where their
values are floating-point numbers, paper is 0 and ink is 1."""


PREDICT = """\
Shows what the network of RUN takes pictures, or rows of numbers, to be. It needs neither MPI nor the data that the
network was trained on:

    nettorrent predict runs/pets cat.jpg dog.png
    nettorrent predict runs/pets photos/*.jpg --top 1 --json
    nettorrent predict runs/digits new.npy
    nettorrent predict runs/digits new.npz --array pixels

Pictures (PNG, JPEG, TIFF, WebP and others) become what the network was trained on, as `data import` makes them:
upright, scaled to its size, grey where it has one channel, over white where transparent. They need the extra `images`.
Rows, (rows, ...) of .npy, .npz and HDF5 files, are as in the data set: bytes, or floating-point values on the scale to
which the run brings bytes, 0 to 1.

What cannot be read is named on standard error, the rest is answered all the same, and the exit code is 2 then."""


PROFILE = """\
Measures this machine for the network that CONFIG describes, in at most a minute: its layers with fewer rows and fewer
neurons, the optimizer, and what ranks send each other. Start it on one rank, or on two, which tells of messages, too:

    mpirun -n 2 nettorrent profile configs/mnist.yaml

`train --dry-run`, `simulate`, `layout: auto` and `layout: layers` use it for this network on this host from then on,
with any mini-batch and number of ranks. The machine should have nothing else to do meanwhile."""


SIMULATE = """\
Predicts a training step of the network that CONFIG describes in many layouts: on as many ranks and on such nodes and
links as you like, without any of them. Needs neither MPI nor the files of a published data set:

    nettorrent simulate configs/mnist_wide.yaml --ranks 8
    nettorrent simulate configs/cifar.yaml --nodes 64x48 --link 100Gbit,2us --memory 256GB
    nettorrent simulate configs/cifar.yaml --ranks 100000 --trace steps.json

Each rank computes as one of this machine does, if `nettorrent profile` has measured it with this network, or else as a
core of 100 GFLOP/s."""


CHAOS = """\
Trains the network that CONFIG describes twice: undisturbed, and while random ranks are killed at random times. The
training has to survive that, and to end as well. Reports what was killed, how fast the run recovered, how many steps
were done again, and both accuracies:

    nettorrent chaos configs/mnist.yaml --ranks 4 --kills 2 --seed 1
    nettorrent chaos configs/mnist.yaml --ranks 6 --kills 3 --who 0 --set layout.replicas=3 --set exchange=gossip

It starts the ranks itself, on this machine and under Open MPI's mpirun --with-ft ulfm; do not put mpirun before it. The
output folder gets chaos.json (all figures), and the folders and the output of both runs."""


TUNE = """\
Searches hyperparameters: trains a network for each trial that SEARCH asks for, and tells which was best on the
validation rows, and how much each parameter matters:

    mpirun -n 4 nettorrent tune configs/search/digits.yaml
    mpirun -n 16 nettorrent tune configs/search/letters.yaml --groups 4
    nettorrent tune configs/search/digits.yaml --output runs/digits-alone

The ranks are divided into groups, and each trial is trained by all ranks of a group, laid out as `nettorrent train`
would. Groups take trials from the folder of the study: several jobs may work on one study, and a job that was killed or
stopped goes on by the same command. SEARCH is a YAML file with base (a configuration, or its file), parameters (lists
of values, ranges as {low: 1e-4, high: 0.1, log: true}, or names with the settings of each), settings, sampler (grid,
random or tpe), trials, seed and prune (none or median). The folder gets trial-N/ (the run folder of each), study.json,
trials.csv, parallel.svg and best.yaml."""


EXPORT = """\
Writes the network of RUN into one file: its layers, its weights, the names of the classes and how inputs are prepared.
The ending of the file's name says for which programs:

    nettorrent export runs/cifar cifar.npz
    nettorrent export runs/cifar cifar.pt
    nettorrent export runs/cifar cifar.onnx
    nettorrent export runs/cifar/checkpoints/step-0000000400 cifar.h5
    nettorrent export runs/cifar --to tensorboard

.npz is for NumPy and .h5 for HDF5, with the arrays as in model.h5; images are (row, height, width, channel) there. .pt
is for PyTorch, whose own torch.load reads it, and nettorrent_mpi.torch.load_run makes a module of it; it needs PyTorch.
.onnx is for onnxruntime and others, the scaling of the inputs included; it needs the package onnx. Both have images as
(row, channel, height, width), and weights to match.

--to tensorboard writes the metrics of the run instead, also while it goes on, on any machine that sees its folder:
`tensorboard --logdir runs` then shows the runs together. It needs the package tensorboardX."""


INIT = """\
Writes a configuration with the usual options, each explained, and a network that suits the data: a small convolutional
one for images, a perceptron for other rows.

    nettorrent init letters.yaml --data letters --root data
    nettorrent init photos.yaml --root photos.h5
    nettorrent init first.yaml

The last one takes the handwritten digits that ship with the package."""

COMPLETION = """\
Prints a script with which a shell completes the commands and their options when you press Tab:

    nettorrent completion bash > ~/.local/share/bash-completion/completions/nettorrent
    nettorrent completion zsh > ~/.zfunc/_nettorrent
    nettorrent completion fish > ~/.config/fish/completions/nettorrent.fish

It needs the package shtab: pip install 'nettorrent_mpi[completion]'."""

SCHEMA = """\
Prints the JSON Schema (draft 7) of configurations: every option with its type, range, default and meaning. An editor
that has it completes keys and marks mistakes while you write: VS Code with its extension YAML, and whatever uses
yaml-language-server. Write the schema beside your configurations,

    nettorrent schema --output nettorrent.schema.json

and begin a configuration with the line

    # yaml-language-server: $schema=nettorrent.schema.json"""

DOCTOR = """\
Checks the environment in which a training would run, and says of each part whether it is in order, and what to do where
it is not: launcher and MPI, cores and threads, limits, BLAS and other libraries, GPUs, /dev/shm, /tmp, the output
folder, messages between ranks and nodes, their clocks; at last it trains the digits for two seconds. Run it as you
would run the training, in the job script, too:

    mpirun -n 4 nettorrent doctor
    nettorrent doctor --json

Without mpirun it checks one process, and whether mpirun can start two. Each check has a limit of time: what hangs or
crashes is named, and so is a rank that does not answer. The exit code is 2 if there is a fault, else 0."""


IMPORT = """\
Writes a data set that configurations name by `data: {name: hdf5, root: FILE.h5}`:

    nettorrent data import photos/ photos.h5 --size 32x32
    nettorrent data import iris.csv iris.h5 --label species
    nettorrent data import m.csv m.h5 --label 1 --size 28x28 --test m_test.csv
    nettorrent data import arrays.npz arrays.h5"""


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

    train = commands.add_parser("train", help="train a network", description=TRAIN)
    train.add_argument(
        "config", nargs="?", metavar="CONFIG", help="a YAML file; examples are in configs/ (default: the digits)"
    )
    _add_set(train)
    train.add_argument("--output", metavar="DIR", help="the run's folder (default: the configuration's `output`)")
    train.add_argument("--overwrite", action="store_true", help="replace the results of another run in that folder")
    train.add_argument(
        "--resume", nargs="?", const="", metavar="PATH",
        help="continue from the newest checkpoint in the output folder, or from PATH (a run folder or a checkpoint's, "
        "step-N); `--resume auto`: from the newest one in the output folder if there is one, else begin; layout and "
        "number of ranks may differ",
    )  # fmt: skip
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="show layout, schedule, predicted time and memory without training (and "
        "without MPI, or the files of a published data set)",
    )
    train.add_argument(
        "--print-config",
        action="store_true",
        help="print the configuration as it counts, with every default and what --set changes, without training",
    )
    train.add_argument(
        "--ranks", type=int, metavar="N", help="with --dry-run: plan for N ranks instead of those of this run"
    )
    _add_elsewhere(train, "with --dry-run: ")

    profile = commands.add_parser("profile", help="measure this machine, for predictions", description=PROFILE)
    profile.add_argument(
        "config", nargs="?", metavar="CONFIG", help="a YAML file; examples are in configs/ (default: the digits)"
    )
    _add_set(profile)
    profile.add_argument("--to", metavar="FILE", help="the file to write (default: this host's, in ~/.cache)")
    profile.add_argument(
        "--seconds", type=float, default=30.0, metavar="S", help="about how long to measure (default: 30; at most 60)"
    )

    evaluate = commands.add_parser(
        "evaluate", help="compute loss and accuracy of a finished run on its test set", description=EVALUATE
    )
    evaluate.add_argument("run", metavar="RUN", help="the run's folder, or one of its checkpoints")
    evaluate.add_argument(
        "--confusion",
        action="store_true",
        help="also tell which classes are taken for which, precision and recall of each, and the worst rows",
    )
    evaluate.add_argument("--to", metavar="DIR", help="the folder for the files of --confusion (default: the run's)")
    _add_set(evaluate)

    predict = commands.add_parser(
        "predict", help="show what a network takes pictures or rows to be", description=PREDICT
    )
    predict.add_argument("run", metavar="RUN", help="the run's folder, one of its checkpoints, or its model.h5")
    predict.add_argument("files", nargs="+", metavar="FILE", help="pictures, and files of rows: .npy, .npz, .h5")
    predict.add_argument(
        "--top", type=int, default=3, metavar="N", help="show the N most probable classes (default: 3)"
    )
    predict.add_argument(
        "--array", metavar="NAME", help="the array of rows in files that have several (default: x_test, or else x)"
    )
    predict.add_argument("--json", action="store_true", help="write a list of JSON, with one element for each row")

    draw = commands.add_parser("draw", help="draw a letter or digit, and let a network read it", description=DRAW)
    draw.add_argument("run", metavar="RUN", help="the run's folder, one of its checkpoints, or its model.h5")
    draw.add_argument("--like", metavar="NAME", help="prepare drawings as for mnist, letters or digits")
    draw.add_argument("--port", type=int, default=0, metavar="N", help="the port of the page (default: a free one)")

    export = commands.add_parser("export", help="write the network of a run for other programs", description=EXPORT)
    export.add_argument("run", metavar="RUN", help="the run's folder, or one of its checkpoints")
    export.add_argument("target", nargs="?", metavar="FILE", help="the file to create: .h5, .npz, .pt or .onnx")
    export.add_argument(
        "--to", choices=("tensorboard",), metavar="PROGRAM",
        help="write the metrics instead of the network, for this program: tensorboard; FILE is a folder then (default: "
        "tensorboard/ in the run's folder)",
    )  # fmt: skip
    export.add_argument("--overwrite", action="store_true", help="replace an existing file")

    init = commands.add_parser("init", help="write a commented configuration to begin with", description=INIT)
    init.add_argument("config", metavar="CONFIG.yaml", help="the file to write")
    init.add_argument("--data", metavar="NAME", help="the data set: " + ", ".join(DATASETS))
    init.add_argument("--root", metavar="PATH", help="the folder of the data sets (default: data), or an HDF5 file")
    init.add_argument("--overwrite", action="store_true", help="replace an existing file")

    schema = commands.add_parser(
        "schema", help="print the JSON Schema of configurations, for editors", description=SCHEMA
    )
    schema.add_argument("--output", metavar="FILE", help="the file to write (default: the terminal)")

    completion = commands.add_parser(
        "completion", help="print a shell's script that completes commands and options", description=COMPLETION
    )
    completion.add_argument("shell", choices=("bash", "zsh", "fish"), help="the shell")

    inspect = commands.add_parser("inspect", help="show what a checkpoint has, and whether it is whole")
    inspect.add_argument(
        "path", metavar="CKPT", help="a checkpoint, the folder of them, a run's folder, or a file of weights"
    )
    inspect.add_argument("--json", action="store_true", help="write everything as JSON")

    add_run_commands(commands)

    tune = commands.add_parser("tune", help="search hyperparameters by groups of ranks", description=TUNE)
    tune.add_argument("search", metavar="SEARCH", help="a YAML file; examples are in configs/search/")
    tune.add_argument(
        "--groups", type=int, metavar="N", help="groups of ranks that train trials side by side (default: one a rank)"
    )
    _add_set(tune, "the search's base")
    tune.add_argument("--output", metavar="DIR", help="the study's folder (default: the search's `output`)")
    simulate = commands.add_parser(
        "simulate", help="predict steps in many layouts, on machines of any size", description=SIMULATE
    )
    simulate.add_argument(
        "config", nargs="?", metavar="CONFIG", help="a YAML file; examples are in configs/ (default: the digits)"
    )
    _add_set(simulate)
    simulate.add_argument("--ranks", type=int, metavar="N", help="how many (default: one on each core of the nodes)")
    _add_elsewhere(simulate)
    simulate.add_argument(
        "--trace", metavar="FILE", help="write predicted steps in the configured layout, for chrome://tracing"
    )

    _add_speedup(commands)
    _add_chaos(commands)

    doctor = commands.add_parser("doctor", help="check whether a training would run here", description=DOCTOR)
    doctor.add_argument(
        "--output", default="runs", metavar="DIR", help="the folder where results are to be written (default: runs)"
    )
    doctor.add_argument(
        "--limit", type=float, default=30.0, metavar="SECONDS", help="how long a check may take (default: 30)"
    )
    doctor.add_argument(
        "--checks", metavar="NAME,...", help="some of the checks (under mpirun, MPI starts all the same)"
    )
    doctor.add_argument("--json", action="store_true", help="write everything as JSON")

    data = commands.add_parser("data", help="download published data sets, import images, tables and arrays")
    kinds = data.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=_Parser)
    fetch = kinds.add_parser("fetch", help="download a data set from its publisher and verify its checksums")
    fetch.add_argument(
        "name", metavar="NAME",
        help="mnist, fashion_mnist, letters, emnist_balanced, emnist_byclass, emnist_bymerge, emnist_digits, "
        "emnist_mnist, cifar10 or cifar100",
    )  # fmt: skip
    fetch.add_argument("--root", default="data", metavar="DIR", help="the target folder (default: data)")
    importing = kinds.add_parser(
        "import", help="make a data set (HDF5) of a folder of images, a table or arrays", description=IMPORT
    )
    importing.add_argument(
        "source", metavar="SOURCE",
        help="a folder with one sub-folder of images per class, or with train/ and test/ that have these; a table "
        "(.csv, .tsv, .txt); or arrays (.npz: x, y, x_test, y_test)",
    )  # fmt: skip
    importing.add_argument("target", metavar="FILE.h5", help="the file to write")
    importing.add_argument(
        "--size",
        metavar="HxW",
        help="resize all images, e.g. to 32x32; or the shape of the image in a row, also 32x32x3",
    )
    importing.add_argument(
        "--test", metavar="PART",
        help="fraction of each class held out as the test set (default: 0.2; test rows that are there are taken as "
        "they are); of a table also another one, with the test rows",
    )  # fmt: skip
    importing.add_argument(
        "--label", metavar="COLUMN",
        help="of a table: the column of the label, by its name or its number from 1 on (-1: the last one); default: "
        "the one called label, class, target or y",
    )  # fmt: skip
    importing.add_argument(
        "--header", choices=("yes", "no"),
        help="of a table: whether its first line names the columns (default: if no word of it is a number)",
    )  # fmt: skip
    importing.add_argument("--overwrite", action="store_true", help="replace an existing file")
    return parser


def _add_speedup(commands: Any) -> None:
    parser = commands.add_parser(
        "speedup", help="compare all modes of parallelizing a network, and PyTorch", description=SPEEDUP,
    )  # fmt: skip
    parser.add_argument(
        "config", nargs="?", metavar="CONFIG", help="a YAML file; examples are in configs/ (default: the digits)"
    )
    parser.add_argument("--ranks", default="1,2,4", metavar="N,N,...", help="numbers of ranks (default: 1,2,4)")
    parser.add_argument(
        "--baseline", choices=("cpu", "gpu"), default="cpu",
        help="what everything is compared with: one rank on CPU cores (default), or one on a GPU, beside which PyTorch "
        "computes on the same GPU; the modes then use a GPU for each rank, or CPU cores with --set device=cpu",
    )  # fmt: skip
    parser.add_argument(
        "--modes", metavar="MODE,...",
        help="a selection of rows, cols, gpipe, 1f1b, async, replicas, gossip, elite, layers, auto (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--peers", metavar="PEER,...",
        help="a selection of torch, torch_channels_last, torch_compile, ddp, each with one thread or process and with "
        "as many as there are ranks, or on one GPU; or none (default: all, if PyTorch is installed)",
    )  # fmt: skip
    parser.add_argument(
        "--repeats", type=int, default=3, metavar="N", help="repetitions of every measurement (default: 3)"
    )
    parser.add_argument(
        "--steps", type=int, metavar="N", help="timed steps per repetition (default: about 5 s of one rank)"
    )
    parser.add_argument(
        "--accuracy", type=float, metavar="A",
        help="also train each mode and peer once until it reaches this accuracy, and report the time; at most for the "
        "epochs of the configuration",
    )  # fmt: skip
    _add_set(parser)
    parser.add_argument("--output", metavar="DIR", help="the folder to write (default: runs/speedup-CONFIG)")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the results of another comparison in that folder"
    )
    parser.add_argument(
        "--launcher", metavar="COMMAND",
        help="the command that starts {ranks} ranks, e.g. 'srun --mpi=pmix --ntasks={ranks}' "
        "(default: mpirun -n {ranks})",
    )  # fmt: skip


def _add_chaos(commands: Any) -> None:
    parser = commands.add_parser("chaos", help="kill random ranks of a training, and report it", description=CHAOS)
    parser.add_argument(
        "config", nargs="?", metavar="CONFIG", help="a YAML file; examples are in configs/ (default: the digits)"
    )
    parser.add_argument("--ranks", type=int, default=4, metavar="N", help="ranks at the start (default: 4)")
    parser.add_argument("--kills", type=int, default=1, metavar="N", help="ranks to kill (default: 1)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="draws which ranks die, and when (default: 0)")
    parser.add_argument("--who", metavar="RANK,...", help="ranks that are among those that die, e.g. 0")
    parser.add_argument("--at-once", action="store_true", help="kill all of them at the same time")
    _add_set(parser)
    parser.add_argument("--output", metavar="DIR", help="the folder to write (default: runs/chaos-CONFIG)")
    parser.add_argument("--overwrite", action="store_true", help="replace earlier results in that folder")
    parser.add_argument(
        "--limit", type=float, default=3600.0, metavar="SECONDS",
        help="end a run that takes longer, and fail (default: 3600; and the disturbed one after two minutes and five "
        "times as long as the undisturbed one)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the content of chaos.json in place of tables")


def _add_elsewhere(parser: argparse.ArgumentParser, when: str = "") -> None:
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
        help="predict times by the measurements in FILE, which `nettorrent profile --to` wrote (default: this host's, "
        "if there are any; none: by constants)",
    )  # fmt: skip


def _add_set(parser: argparse.ArgumentParser, of: str = "the configuration") -> None:
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="changes",
        help=f"change a value of {of}, e.g. train.steps=100 or model.layers.0.dropout=0.1; may be repeated",
    )  # fmt: skip


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
