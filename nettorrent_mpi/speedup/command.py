"""`nettorrent speedup`: checks what is asked for, runs everything in turns, writes results, report and pictures."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nettorrent_mpi.comm import offline  # noqa: F401

# isort: split
from nettorrent_mpi.app import config as configuration
from nettorrent_mpi.app.clock import WARM_UP
from nettorrent_mpi.app.config import Config
from nettorrent_mpi.app.setup import Setup
from nettorrent_mpi.plan.errors import ChildError, ConfigError, LaunchError, NetTorrentError, OutputError
from nettorrent_mpi.speedup import machine, modes, runs, shares, sides
from nettorrent_mpi.speedup.machine import Launcher
from nettorrent_mpi.speedup.modes import MODES, SERIAL, VALIDATION, Plan
from nettorrent_mpi.speedup.report import failure_in_words, one_line, to_markdown
from nettorrent_mpi.speedup.sides import COMPILE, OURS, PEERS, Side

TURN_SECONDS = 5.0  # that a turn of one rank takes, unless --steps tells
TRIAL_STEPS = 10  # from which that is reckoned
LEAST_STEPS = 10
TRACED_STEPS = 200  # at most: a trace holds each action of each step
TORCH_WARM_UP = 11  # steps: torch_peer.WARM_UP and one of an epoch's last size; that module loads PyTorch
HOW_TO_INSTALL = "PyTorch is not installed, so nothing is compared with it: pip install 'nettorrent_mpi[compare]'"


def speedup(args: argparse.Namespace) -> None:
    """The command. Raises UserErrors before anything is started or written, ChildError if a program fails."""
    if any(name in os.environ for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")):
        raise LaunchError("speedup starts the ranks itself: run it without mpirun")
    counts = _counts(args.ranks)
    names = _chosen(args.modes, MODES, "mode")
    asked = _asked_peers(args.peers)
    for option, value in (("--repeats", args.repeats), ("--steps", args.steps)):
        if value is not None and value < 1:
            raise ConfigError(f"{option} {value}: at least 1")
    if args.accuracy is not None and not 0 < args.accuracy <= 1:
        raise ConfigError(f"--accuracy {args.accuracy}: a fraction above 0 and at most 1, as 0.95")
    config = configuration.load(args.config, args.changes)
    shared = modes.baseline(config, names)
    one, setup = modes.serial(shared)
    if args.accuracy is not None and setup.dataset.classes is None:
        raise ConfigError(f"--accuracy: data set {config.data.name} has no classes, so nothing is right or wrong")
    if args.accuracy is not None and setup.dataset.test is None and not len(setup.sampler.validation_rows):
        raise ConfigError("--accuracy: there are no test rows; keep some back with --set data.validation=0.1")
    launcher = Launcher(args.launcher)
    plans = [one]
    for ranks in counts:
        plans += [modes.plan(name, config, shared, setup.network.facts, ranks) for name in names if ranks > 1]
    name = Path(args.config).stem if args.config else "digits"
    folder = Path(args.output or f"runs/speedup-{name}")
    _check_folder(folder, args.overwrite)

    everyone = [*sides.ours(plans), *sides.peers(asked, counts, setup)]
    notes = _notes(config, shared, args.peers)
    results = _about(args, name, setup, one, counts, names, everyone, notes)
    comparison = Comparison(folder, launcher, plans, everyone, results, shared)
    try:
        with _stopped_like_interrupted():
            comparison.run(args.repeats, args.steps, args.accuracy)
    except ChildError as error:
        comparison.fail({"command": error.command, "exit_code": error.code, "lines": error.lines})
        raise NetTorrentError(f"{error}\nwhat was measured before is in {folder / 'results.json'}") from error
    except KeyboardInterrupt:
        comparison.fail({"interrupted": True})
        raise NetTorrentError(f"interrupted; what was measured before is in {folder / 'results.json'}") from None
    comparison.finish()


# ---- what is asked for ---------------------------------------------------------------------------
def _counts(text: str) -> list[int]:
    """Rank counts. The first need not be 1: one rank is always measured."""
    words = text.split(",")
    counts = [int(word) for word in words if word.strip().isdecimal()]
    if len(counts) < len(words) or 0 in counts or counts != sorted(set(counts)):
        raise ConfigError(f"--ranks {text}: ascending whole numbers, at least 1, as 1,2,4")
    return counts


def _chosen(text: str | None, known: Sequence[str] | dict[str, Any], what: str) -> list[str]:
    """The words of a list with commas, each once; all that there are where it is not given."""
    if text is None:
        return list(known)
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if word not in known:
            raise ConfigError(f"--{what}s {text}: unknown {what} {word!r}; there are {', '.join(known)}")
    return list(dict.fromkeys(words))


def _asked_peers(text: str | None) -> list[str]:
    if text == "none":
        return []
    there = sides.torch_is_there()
    if text is None:
        if not there:
            _tell(HOW_TO_INSTALL)
        return list(PEERS) if there else []
    chosen = _chosen(text, PEERS, "peer")
    if not there:
        raise ConfigError(f"--peers {text}: {HOW_TO_INSTALL}")
    return chosen


def _check_folder(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file, not a folder; choose another with --output DIR")
    if (folder / "results.json").exists() and not overwrite:
        raise OutputError(
            f"{folder} holds another comparison's results.json; choose another folder with --output DIR, or replace "
            "it with --overwrite"
        )


def _notes(config: Config, shared: Config, asked: str | None) -> list[str]:
    """What the report tells of how the comparison was set up."""
    notes = []
    if shared.data.validation != config.data.validation:
        notes.append(
            f"elite chooses on validation rows, and the configuration keeps none back: here all sides train without a "
            f"tenth of the training rows (data.validation: {VALIDATION})."
        )
    if asked is None and not sides.torch_is_there():
        notes.append(HOW_TO_INSTALL + ".")
    return notes


def _about(
    args: argparse.Namespace,
    name: str,
    setup: Setup,
    one: Plan,
    counts: list[int],
    names: list[str],
    everyone: list[Side],
    notes: list[str],
) -> dict[str, Any]:
    """results.json before anything is measured."""
    assert one.config is not None
    facts, train = setup.network.facts, one.config.train
    return {
        "format": 1,
        "complete": False,
        "failure": None,
        "command": shlex.join(["nettorrent", *args.command_line]),
        "config": name,
        "settings": configuration.to_plain(one.config),
        "network": {
            "weight_layers": len(facts),
            "parameters": sum(layer.parameters for layer in facts),
            "operations": sum(layer.operations for layer in facts),
            "batch_norm": setup.network.has_batch_norm,
        },
        "batch_size": train.batch_size,
        "dtype": one.config.dtype,
        "optimizer": train.optimizer.kind,
        "ranks": counts,
        "modes": names,
        "repeats": args.repeats,
        "steps": args.steps,
        "warm_up": {"ours": WARM_UP, "torch": TORCH_WARM_UP},
        "host": machine.describe_host(),
        "mpi": None,
        "notes": notes,
        "sides": [side.plain() for side in everyone],
        "traces": [],
        "accuracy": None,
    }


# ---- running -------------------------------------------------------------------------------------
class Comparison:
    """Everything that is run, in turns. results.json is written after each of them."""

    def __init__(
        self,
        folder: Path,
        launcher: Launcher,
        plans: Sequence[Plan],
        everyone: Sequence[Side],
        results: dict[str, Any],
        shared: Config,
    ):
        self._folder, self._launcher = folder, launcher
        self._plans = {(plan.mode, plan.ranks): plan for plan in plans}
        self._sides = list(everyone)
        self._results = results
        self._shared = shared

    def run(self, repeats: int, steps: int | None, accuracy: float | None) -> None:
        """All turns, then the traces, then the trainings to an accuracy."""
        self._clear()
        self._save()
        for side in self._sides:
            if side.impossible:
                _tell(f"not measured: {sides.in_words(side.plain())}: {side.impossible}")
        steps = steps or self._choose_steps()
        self._results["steps"] = steps
        for turn in range(repeats):
            for side in self._sides:
                if not self._told(side)["impossible"]:
                    self._measure(side, steps, f"turn {turn + 1} of {repeats}")
        for plan in self._to_trace():
            self._trace(plan, min(steps, TRACED_STEPS))
        if accuracy is not None:
            of = "validation" if self._shared.data.validation else "test"
            self._results["accuracy"] = {"wanted": accuracy, "of": of, "runs": []}
            for side in self._largest():
                self._train(side, accuracy)
        self._results["complete"] = True
        self._save()

    def finish(self) -> None:
        """report.md and the pictures."""
        plots: list[str] = []
        try:
            from nettorrent_mpi.speedup.plots import draw

            plots = draw(self._results, self._folder)
        except ImportError as error:
            _tell(f"no pictures: {error} (pip install 'nettorrent_mpi[plots]')")
        report = to_markdown(self._results, plots)
        with _written(self._folder / "report.md"):
            runs.write_whole(self._folder / "report.md", report)
        sys.stdout.write(report)
        _tell(f"results.json, report.md{' and pictures' if plots else ''} are in {self._folder}")

    def fail(self, failure: dict[str, Any]) -> None:
        """Keep what there is, and why there is no more."""
        self._results["failure"] = failure
        self._save()
        if any(side["samples_per_second"] for side in self._results["sides"]):
            _tell(f"not complete: {failure_in_words(self._results)}")
            runs.write_whole(self._folder / "report.md", to_markdown(self._results))

    def _choose_steps(self) -> int:
        """So many that one rank takes TURN_SECONDS."""
        plan = self._plans[SERIAL, 1]
        assert plan.config is not None
        summary = self._trained("trial", modes.timed(plan.config, TRIAL_STEPS + WARM_UP), 1).summary
        fast = float(summary["samples_per_second"])
        chosen = max(LEAST_STEPS, math.ceil(TURN_SECONDS * fast / plan.config.train.batch_size))
        _tell(f"{chosen} steps a turn, in which one rank takes about {TURN_SECONDS:g} s (--steps N changes it)")
        return chosen

    def _measure(self, side: Side, steps: int, label: str) -> None:
        if side.kind == OURS:
            plan = self._plans[side.mode, side.cpus]
            assert plan.config is not None
            config = modes.timed(plan.config, steps + WARM_UP)
            summary = self._trained(side.name, config, side.cpus).summary
            self._results["mpi"] = summary["mpi"]
            figure = float(summary["samples_per_second"])
        else:
            told = self._torch(side, ["--steps", str(steps)])
            if told is None:
                return
            figure = float(told["samples_per_second"])
        self._told(side)["samples_per_second"].append(figure)
        self._save()
        _tell(f"{label}: {one_line(self._told(side), figure)}")

    def _to_trace(self) -> list[Plan]:
        """One rank, and each mode on the most ranks that have cores of their own (or else on the fewest)."""
        found = [self._plans[SERIAL, 1]]
        for mode in self._results["modes"]:
            there = [plan for (m, _), plan in self._plans.items() if m == mode and plan.config is not None]
            if there:
                fitting = [plan for plan in there if plan.ranks <= self._launcher.cores]
                found.append(max(fitting, key=lambda p: p.ranks) if fitting else min(there, key=lambda p: p.ranks))
        return found

    def _trace(self, plan: Plan, steps: int) -> None:
        assert plan.config is not None
        assert plan.micro_batches is not None
        config = modes.timed(plan.config, steps + shares.SKIPPED, trace=True)
        text = self._trained(f"trace-{plan.mode}-{plan.ranks}", config, plan.ranks).trace
        assert text is not None
        told = shares.shares(shares.read(text), steps + shares.SKIPPED, plan.micro_batches)
        self._results["traces"].append({"mode": plan.mode, "ranks": plan.ranks, "steps": steps, "shares": told})
        self._save()
        _tell(f"traced: {'one rank' if plan.mode == SERIAL else f'{plan.mode}, {plan.ranks} ranks'}")

    def _largest(self) -> list[Side]:
        """One rank, and every mode and peer on the most cores on which it was measured and that there are (or else on
        the fewest)."""
        found = []
        measured = [side for side in self._sides if self._told(side)["samples_per_second"]]
        for mode in dict.fromkeys(side.mode for side in measured):
            own = [side for side in measured if side.mode == mode]
            fitting = [side for side in own if side.cpus <= self._launcher.cores]
            found.append(max(fitting, key=lambda s: s.cpus) if fitting else min(own, key=lambda s: s.cpus))
        return found

    def _train(self, side: Side, accuracy: float) -> None:
        curve: list[tuple[float, float, float]]
        if side.kind == OURS:
            config = self._plans[side.mode, side.cpus].config
            assert config is not None
            trained = self._trained(f"accuracy-{side.name}", modes.until(config, accuracy), side.cpus)
            curve = runs.curve_of(trained.metrics)
        else:
            told = self._torch(side, ["--accuracy", str(accuracy)])
            if told is None:
                return
            curve = told["curve"]
        seconds = next((at for at, _, reached in curve if reached >= accuracy), None)
        run = {"side": side.name, "seconds": seconds, "curve": curve}
        self._results["accuracy"]["runs"].append(run)
        self._save()
        reached = "not reached" if seconds is None else f"reached after {seconds:.1f} s"
        _tell(f"accuracy {accuracy:g}: {sides.in_words(self._told(side))}: {reached}")

    def _trained(self, name: str, config: Config, ranks: int) -> runs.Trained:
        """A training of ours; its configuration stays in the folder, to be run again."""
        return runs.train(self._write_config(name, config), ranks, self._launcher)

    def _torch(self, side: Side, options: list[str]) -> dict[str, Any] | None:
        """What PyTorch told; None where torch.compile does not work here, which is then told in the table."""
        serial = self._plans[SERIAL, 1].config
        assert serial is not None
        path = self._write_config("torch", serial)
        try:
            return runs.torch_peer(path, [*side.options, *options], side.threads)
        except ChildError as error:
            if side.mode != COMPILE:
                raise
            why = error.lines[-1].strip() if error.lines else f"exit code {error.code}"
            self._told(side)["impossible"] = f"torch.compile does not work here: {why}"
            self._save()
            _tell(f"not measured: {sides.in_words(side.plain())}: torch.compile does not work here: {why}")
            return None

    def _told(self, side: Side) -> dict[str, Any]:
        """The side's entry in the results."""
        told: dict[str, Any] = self._results["sides"][self._sides.index(side)]
        return told

    def _write_config(self, name: str, config: Config) -> Path:
        path = self._folder / "configs" / f"{name}.yaml"
        with _written(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            runs.write_whole(path, configuration.to_yaml(config))
        return path

    def _clear(self) -> None:
        """Remove an earlier comparison's files, so that none of them is taken for one of this."""
        for path in (*self._folder.glob("*.png"), *self._folder.glob("*.svg"), self._folder / "report.md"):
            path.unlink(missing_ok=True)
        shutil.rmtree(self._folder / "configs", ignore_errors=True)

    def _save(self) -> None:
        path = self._folder / "results.json"
        with _written(path):
            self._folder.mkdir(parents=True, exist_ok=True)
            runs.write_whole(path, json.dumps(self._results, indent=1) + "\n")


@contextlib.contextmanager
def _written(path: Path) -> Iterator[None]:
    """What cannot be written is an OutputError that names the file."""
    try:
        yield
    except OSError as error:
        text = f"{path} could not be written ({error.strerror or error}); choose another folder with --output DIR"
        raise OutputError(text) from error


@contextlib.contextmanager
def _stopped_like_interrupted() -> Iterator[None]:
    """SIGTERM, as batch systems send it, ends the programs that were started, as Ctrl-C does."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before: Callable[..., Any] | int | None = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _tell(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
