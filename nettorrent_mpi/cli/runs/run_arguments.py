"""The command lines of the commands that read run folders."""

from __future__ import annotations

from typing import Any

from nettorrent_mpi.cli.options.shared_options import add_output, add_overwrite

SORTS = ("run", "state", "ranks", "exchange", "epochs", "accuracy", "loss", "seconds", "samples_per_second")

RUNS = """\
Lists the runs below a folder: whether they are running, done, stopped, diverged or failed, their layout, accuracy and
speed. Of two or more named runs, it shows the results and the settings in which they differ side by side:

    nettorrent runs
    nettorrent runs runs/ --sort accuracy
    nettorrent runs runs/a runs/b

The accuracy is the best one so far, on the test rows or, where there are none, on the validation rows; the loss is that
of the training at the same time, and "at epoch" says when. A run that is not over and whose processes are gone has
failed; the exit code stays 0."""

WATCH = """\
Shows a run while it goes on, and ends when it ends: curves of loss and accuracy, step, speed and time left, how long
each rank computes, communicates and waits, and which rank is the slowest:

    nettorrent watch runs/cifar
    nettorrent watch runs/cifar --web

It reads the run's folder and nothing else, so it works on a login node while the job runs elsewhere. --web serves the
page of `nettorrent report RUN` at an address of this machine that others cannot guess, until Ctrl-C. From your own
machine, reach it by `ssh -L PORT:127.0.0.1:PORT login-node`."""

REPORT = """\
Writes a run as one HTML file that opens anywhere, without network: curves, the layout with ranks and hosts, the time
line of a step (of a run with `trace: true`), where each rank's time went, the environment, and how to repeat it, with
every command from the beginning on:

    nettorrent report runs/cifar
    nettorrent report runs/cifar --output cifar.html

Without --output it is report.html in the run's folder. A run that is still going on can be reported, too."""


def add_run_commands(commands: Any) -> None:
    """Add the commands to the subparsers."""
    runs = commands.add_parser("runs", help="list the runs in a folder, compare some", description=RUNS)
    runs.add_argument(
        "places", nargs="*", metavar="FOLDER", help="folders with runs in or below them, or runs (default: runs)"
    )
    runs.add_argument("--sort", choices=SORTS, default="run", metavar="COLUMN", help=f"one of {', '.join(SORTS)}")
    runs.add_argument("--json", action="store_true", help="write everything as JSON, the settings included")

    watch = commands.add_parser("watch", help="show a run while it goes on", description=WATCH)
    watch.add_argument("run", metavar="RUN", help="the run's folder")
    watch.add_argument("--once", action="store_true", help="show the present state once, and end")
    watch.add_argument("--web", action="store_true", help="serve a page that follows the run, on 127.0.0.1")
    watch.add_argument("--port", type=int, default=0, metavar="N", help="the port of --web (default: a free one)")

    report = commands.add_parser("report", help="write a run as one HTML file", description=REPORT)
    report.add_argument("run", metavar="RUN", help="the run's folder")
    add_output(report, "FILE", "the file to write (default: report.html in the run's folder)")
    add_overwrite(report, "an existing file that --output names")
