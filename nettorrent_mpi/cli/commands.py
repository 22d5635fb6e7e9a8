"""The commands, the words after `nettorrent`: finding and running them."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from nettorrent_mpi.cli.first import is_first
from nettorrent_mpi.engine.signals import Signals
from nettorrent_mpi.plan.errors import ConfigError, DataError, NetTorrentWarning, UserError, readable

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from nettorrent_mpi.data.importing import Imported


def find(arguments: Sequence[str]) -> Callable[[Sequence[str], str], int]:
    """Return the function that carries out a command line. It is called with the command line and with how the
    environment was set, and returns the exit code. If the command runs on all ranks, each of them calls it."""
    command = next((a for a in arguments if not a.startswith("-")), "")
    if not {"-h", "--help"} & set(arguments) and "--version" not in arguments[:1]:
        if command == "train":
            signals = Signals()  # already here: a signal to stop may come while MPI loads
            from nettorrent_mpi.cli.run import train

            return partial(train, signals=signals)
        if command == "tune":
            signals = Signals()
            from nettorrent_mpi.tune.job import tune

            return partial(tune, signals=signals)
        if command == "evaluate":
            from nettorrent_mpi.cli.evaluate import evaluate

            return evaluate
        if command == "doctor":
            from nettorrent_mpi.doctor.doctor import doctor

            return doctor
        if command == "profile":
            from nettorrent_mpi.cli.profile import profile

            return profile
    return _run_alone


def tells_results(arguments: Sequence[str]) -> bool:
    """Whether standard output has a command's results. Those of a training or a search are in its folder."""
    shown = {"--dry-run", "--print-config", "-h", "--help"} & set(arguments)
    return not ({"train", "tune"} & set(arguments) and not shown)


@contextmanager
def warnings_shown() -> Iterator[None]:
    """Show the package's warnings as the command line shows errors: see `plan.errors.warn`."""
    shown = warnings.showwarning

    def show(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
    ) -> None:
        if not isinstance(message, NetTorrentWarning):
            shown(message, category, filename, lineno, file, line)
        elif message.alone or is_first():
            sys.stderr.write(f"nettorrent: warning: {message}\n")

    with warnings.catch_warnings():
        warnings.filterwarnings("default", category=NetTorrentWarning)
        warnings.showwarning = show
        yield


def _run_alone(arguments: Sequence[str], chosen: str) -> int:
    """Run a command that needs no ranks, or show help."""
    if is_first():
        from nettorrent_mpi.cli.arguments import parse

        args = parse(arguments)
        args.command_line = list(arguments)
        return _LOCAL[args.command](args) or 0
    return 0


def _export(args: argparse.Namespace) -> None:
    from nettorrent_mpi.cli.export import PROGRAMS, export, export_metrics

    if args.format in PROGRAMS:
        folder = export_metrics(args.run, args.output, args.format, overwrite=args.overwrite)
        shown = {
            "tensorboard": f"`tensorboard --logdir {folder.parent}` shows it",
            "wandb": f"`wandb sync {folder}/offline-run-*` uploads it",
            "mlflow": f"`MLFLOW_ALLOW_FILE_STORE=true mlflow ui --backend-store-uri {folder}` shows it",
        }
        sys.stdout.write(f"{folder}: written; {shown[args.format]}\n")
        return
    path = export(args.run, args.output, args.format, overwrite=args.overwrite)
    sys.stdout.write(f"{path} is written\n")


def _draw(args: argparse.Namespace) -> None:
    from nettorrent_mpi.cli.draw import draw

    draw(args.run, like=args.like, port=args.port)


def _predict(args: argparse.Namespace) -> int:
    from nettorrent_mpi.cli.predict import predict

    return predict(args.run, args.files, top=args.top, array=args.array, like=args.like, as_json=args.json)


def _inspect(args: argparse.Namespace) -> int:
    from nettorrent_mpi.cli.inspect import inspect

    return inspect(args.path, everything=args.all, as_json=args.json)


def _init(args: argparse.Namespace) -> None:
    from nettorrent_mpi.cli.init import init

    init(args)


def _completion(args: argparse.Namespace) -> None:
    from nettorrent_mpi.cli.arguments import make_parser

    try:
        import shtab
    except ImportError:
        raise UserError("completion needs the package shtab: pip install 'nettorrent_mpi[completion]'") from None
    sys.stdout.write(shtab.complete(make_parser(), args.shell) + "\n")


def _schema(args: argparse.Namespace) -> None:
    import json

    from nettorrent_mpi.config.schema import schema

    text = json.dumps(schema(), indent=2) + "\n"
    if args.output is None:
        sys.stdout.write(text)
        return
    from pathlib import Path

    from nettorrent_mpi.data.storage import check_file
    from nettorrent_mpi.engine.run_files import write_whole, written

    path = Path(args.output)
    check_file(path, overwrite=args.overwrite)
    with written(path, "--output FILE"):
        write_whole(path, text)


def _runs(args: argparse.Namespace) -> int:
    from nettorrent_mpi.cli.runs.listing import runs

    return runs(args.places, sort=args.sort, as_json=args.json)


def _watch(args: argparse.Namespace) -> int:
    from nettorrent_mpi.cli.runs.watching import watch

    return watch(args.run, once=args.once, web=args.web, port=args.port)


def _report(args: argparse.Namespace) -> int:
    from nettorrent_mpi.cli.runs.reporting import report

    return report(args.run, args.output, overwrite=args.overwrite)


def _speedup(args: argparse.Namespace) -> None:
    from nettorrent_mpi.speedup.command import speedup

    speedup(args)


def _simulate(args: argparse.Namespace) -> None:
    from nettorrent_mpi.cli.simulate import simulate

    simulate(args)


def _chaos(args: argparse.Namespace) -> None:
    from nettorrent_mpi.cli.chaos import chaos

    chaos(args)


def _data(args: argparse.Namespace) -> None:
    from pathlib import Path

    if args.action == "fetch":
        from nettorrent_mpi.data.fetch import fetch

        folder, archive = fetch(args.name, Path(args.root), _tell_bytes)
        sys.stdout.write(f"{args.name} is complete in {folder}\n")
        if archive is not None:
            size = f"{archive.stat().st_size / 1e6:,.0f} MB"
            sys.stdout.write(f"{archive} ({size}) stays until all that it has is fetched; you may remove it\n")
        return
    source = Path(args.source)
    target = Path(args.output or f"{source.stem or source.absolute().stem}.h5")
    made = _import(args, source, target)
    kinds = ""
    if made.classes:
        shown = readable(", ".join(made.classes[:10]))
        kinds = f" in {len(made.classes):,} classes: {shown}{', ...' if len(made.classes) > 10 else ''}"
    sys.stdout.write(
        f"{target}: {made.rows} training rows and {made.test_rows} test rows of shape {made.shape}{kinds}\n"
    )
    sys.stdout.writelines(f"  {readable(note)}\n" for note in made.notes)


def _import(args: argparse.Namespace, source: Path, target: Path) -> Imported:
    from pathlib import Path

    from nettorrent_mpi.data.csv_file import ENDINGS, import_csv
    from nettorrent_mpi.data.folder import import_folder
    from nettorrent_mpi.data.npz_file import import_npz

    kind, size = source.suffix.lower(), _size(args.size)
    table = kind in ENDINGS and not source.is_dir()
    for option, given in (("--label", args.label), ("--header", args.header)):
        if given is not None and not table:
            raise ConfigError(f"{option} is for tables ({', '.join(ENDINGS)}), and {source} is none")
    test = _test(args.test, table)
    if table:
        header = None if args.header is None else args.header == "yes"
        return import_csv(source, target, size, test=test, label=args.label, header=header, overwrite=args.overwrite)
    assert not isinstance(test, Path)
    if kind == ".npz" and not source.is_dir():
        return import_npz(source, target, size, test=test, overwrite=args.overwrite)
    if source.is_file():
        raise DataError(f"is no folder of images, no table ({', '.join(ENDINGS)}) and no .npz", file=str(source))
    if size is not None and len(size) > 2:
        raise ConfigError(
            f"--size {args.size}: images have the channels that they have: write height x width, as 32x32"
        )
    both = None if size is None else (size[0], size[1])
    return import_folder(source, target, both, test=test, overwrite=args.overwrite, progress=_tell_images)


def _size(text: str | None) -> tuple[int, ...] | None:
    words = [] if text is None else text.split("x")
    if text is not None and (len(words) not in (2, 3) or not all(word.isdecimal() for word in words)):
        raise ConfigError(f"--size {text}: write height x width, as 32x32, or height x width x channels")
    return tuple(map(int, words)) or None


def _test(text: str | None, table: bool) -> float | Path | None:
    """Read --test: a fraction, or, for a table, another one with the test rows."""
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        if table:
            from pathlib import Path

            return Path(text)
    raise ConfigError(f"--test {text}: a fraction of at least 0 and below 1, as 0.2")


def _tell_bytes(name: str, done: int, total: int | None) -> None:
    if sys.stderr.isatty():
        of = f" of {total / 1e6:.1f}" if total else ""
        sys.stderr.write(f"\r{name}: {done / 1e6:.1f}{of} MB\033[K" + ("\n" if done == total else ""))


def _tell_images(done: int, total: int) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{done} of {total} images\033[K" + ("\n" if done == total else ""))


_LOCAL: dict[str, Callable[[argparse.Namespace], int | None]] = {  # they return the exit code, if it is not 0
    "draw": _draw,
    "predict": _predict,
    "export": _export,
    "inspect": _inspect,
    "init": _init,
    "completion": _completion,
    "schema": _schema,
    "runs": _runs,
    "report": _report,
    "watch": _watch,
    "speedup": _speedup,
    "chaos": _chaos,
    "simulate": _simulate,
    "data": _data,
}
