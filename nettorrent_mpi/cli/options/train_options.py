"""The command lines that train, and plan trainings."""

from __future__ import annotations

from typing import Any

from nettorrent_mpi.cli.options.shared_options import add_config, add_elsewhere, add_output, add_overwrite, add_set

TRAIN = """\
Trains the network that CONFIG describes on all ranks of the run, and writes the results to the output folder:

    mpirun -n 4 nettorrent train configs/mnist.yaml
    mpirun -n 4 nettorrent train configs/mnist.yaml --set train.epochs=2
    nettorrent train configs/cifar.yaml --dry-run --ranks 64

Without mpirun it runs on one rank: the serial baseline. Without CONFIG it trains on the handwritten digits that ship
with the package. Open MPI's mpirun wants --oversubscribe for more ranks than cores, and, to run as root, the variables
OMPI_ALLOW_RUN_AS_ROOT=1 and OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1."""

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
    nettorrent simulate configs/cifar.yaml --ranks 100000 --output steps.json

Each rank computes as one of this machine does, if `nettorrent profile` has measured it with this network, or else as a
core of 100 GFLOP/s."""

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


def add_train_commands(commands: Any) -> None:
    """Add the commands to the subparsers."""
    train = commands.add_parser("train", help="train a network", description=TRAIN)
    add_config(train)
    add_output(train, "DIR", "the run's folder (default: the configuration's `output`)")
    add_overwrite(train, "the results of another run in that folder")
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
    add_elsewhere(train, "with --dry-run: ")

    profile = commands.add_parser("profile", help="measure this machine, for predictions", description=PROFILE)
    add_config(profile)
    add_output(
        profile, "FILE", "the file to write; profiles of other networks in it stay (default: this host's, in ~/.cache)"
    )
    profile.add_argument(
        "--seconds", type=float, default=30.0, metavar="S", help="about how long to measure (default: 30; at most 60)"
    )

    simulate = commands.add_parser(
        "simulate", help="predict steps in many layouts, on machines of any size", description=SIMULATE
    )
    add_config(simulate)
    simulate.add_argument("--ranks", type=int, metavar="N", help="how many (default: one on each core of the nodes)")
    add_elsewhere(simulate)
    add_output(simulate, "FILE", "also write predicted steps in the configured layout, for chrome://tracing")
    add_overwrite(simulate)

    tune = commands.add_parser("tune", help="search hyperparameters by groups of ranks", description=TUNE)
    tune.add_argument("search", metavar="SEARCH", help="a YAML file; examples are in configs/search/")
    tune.add_argument(
        "--groups", type=int, metavar="N", help="groups of ranks that train trials side by side (default: one a rank)"
    )
    add_set(tune, "the search's base")
    add_output(tune, "DIR", "the study's folder (default: the search's `output`)")
