"""The command lines that compare trainings, and that check a machine."""

from __future__ import annotations

from typing import Any

from nettorrent_mpi.cli.options.shared_options import add_output, add_overwrite, add_set

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

CHAOS = """\
Trains the network that CONFIG describes twice: undisturbed, and while random ranks are killed at random times. The
training has to survive that, and to end as well. Reports what was killed, how fast the run recovered, how many steps
were done again, and both accuracies:

    nettorrent chaos configs/mnist.yaml --ranks 4 --kills 2 --seed 1
    nettorrent chaos configs/mnist.yaml --ranks 6 --kills 3 --who 0 --set layout.replicas=3 --set exchange=gossip

It starts the ranks itself, on this machine and under Open MPI's mpirun --with-ft ulfm; do not put mpirun before it. The
output folder gets chaos.json (all figures), and the folders and the output of both runs."""

DOCTOR = """\
Checks the environment in which a training would run, and says of each part whether it is in order, and what to do where
it is not: launcher and MPI, cores and threads, limits, BLAS and other libraries, GPUs, /dev/shm, /tmp, the output
folder, messages between ranks and nodes, their clocks; at last it trains the digits for two seconds. Run it as you
would run the training, in the job script, too:

    mpirun -n 4 nettorrent doctor
    nettorrent doctor --json

Without mpirun it checks one process, and whether mpirun can start two. Each check has a limit of time: what hangs or
crashes is named, and so is a rank that does not answer. The exit code is 2 if there is a fault, else 0."""


def add_comparison_commands(commands: Any) -> None:
    """Add the commands to the subparsers."""
    doctor = commands.add_parser("doctor", help="check whether a training would run here", description=DOCTOR)
    add_output(doctor, "DIR", "the folder where results are to be written (default: runs)")
    doctor.set_defaults(output="runs")
    doctor.add_argument(
        "--limit", type=float, default=30.0, metavar="SECONDS", help="how long a check may take (default: 30)"
    )
    doctor.add_argument(
        "--checks", metavar="NAME,...", help="some of the checks (under mpirun, MPI starts all the same)"
    )
    doctor.add_argument("--json", action="store_true", help="write everything as JSON")
    _add_speedup(commands)
    _add_chaos(commands)


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
        help="a selection of rows, cols, gpipe, 1f1b, zero_bubble, async, replicas, gossip, elite, layers, auto "
        "(default: all)",
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
    add_set(parser)
    add_output(parser, "DIR", "the folder to write (default: runs/speedup-CONFIG)")
    add_overwrite(parser, "the results of another comparison in that folder")
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
    add_set(parser)
    add_output(parser, "DIR", "the folder to write (default: runs/chaos-CONFIG)")
    add_overwrite(parser, "earlier results in that folder")
    parser.add_argument(
        "--limit", type=float, default=3600.0, metavar="SECONDS",
        help="end a run that takes longer, and fail (default: 3600; and the disturbed one after two minutes and five "
        "times as long as the undisturbed one)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the content of chaos.json in place of tables")
