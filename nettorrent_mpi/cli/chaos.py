"""The command `nettorrent chaos`: a run of which random ranks are killed, beside the same run undisturbed."""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nettorrent_mpi.cli.launching import StartedRun, stopped_like_interrupted, tolerant_mpirun
from nettorrent_mpi.cli.run_folder import RunFolder
from nettorrent_mpi.cli.tables import aligned
from nettorrent_mpi.engine.run_files import write_whole, written
from nettorrent_mpi.engine.run_lock import RunLock
from nettorrent_mpi.env import launched
from nettorrent_mpi.plan.errors import ConfigError, LaunchError, NetTorrentError
from nettorrent_mpi.plan.records import dataclass
from nettorrent_mpi.planning import load_config, plan_run

EARLIEST, LATEST = 0.02, 0.9  # the part of the training in which ranks are killed
POLL = 0.02  # seconds between looks at metrics.jsonl
LAST_LINES = 12  # lines of a failed run's output that are shown
RESULTS = ("chaos.json", "undisturbed", "disturbed")


@dataclass(frozen=True)
class Kill:
    """A Kill is planned: some ranks die at once, `delay` of a report's interval after the run has told of a step that
    is at least the part `progress` of all."""

    ranks: tuple[int, ...]
    progress: float
    delay: float


def draw(ranks: int, kills: int, seed: int, who: Sequence[int] = (), *, at_once: bool = False) -> list[Kill]:
    """Draw `kills` of the ranks, those of `who` among them, and when each dies."""
    dice = random.Random(seed)
    others = [rank for rank in range(ranks) if rank not in who]
    victims = [*who, *dice.sample(others, kills - len(who))]
    dice.shuffle(victims)
    count = 1 if at_once else kills
    moments = sorted(dice.uniform(EARLIEST, LATEST) for _ in range(count))
    groups = [tuple(victims)] if at_once else [(rank,) for rank in victims]
    return [Kill(group, round(at, 4), round(dice.random(), 3)) for group, at in zip(groups, moments, strict=True)]


def train(command: Sequence[str], output: Path, limit: float) -> dict[str, Any]:
    """Run a training that writes its results to `output`, and return them."""
    with StartedRun([*command, "--output", str(output)], _log(output)) as run:
        while run.code is None and run.seconds < limit:
            time.sleep(POLL)
        return _results(run, output, limit)


def disturb(
    command: Sequence[str], output: Path, kills: Sequence[Kill], limit: float, steps: int, interval: float
) -> dict[str, Any]:
    """Run a training of `steps` steps as `train` does, and kill its ranks. `interval` is the time between two of its
    reports in seconds."""
    with StartedRun([*command, "--output", str(output)], _log(output)) as run:
        done: list[dict[str, Any]] = []
        for kill in kills:
            while run.code is None and run.seconds < limit and _step(output) < kill.progress * steps:
                time.sleep(POLL)
            time.sleep(kill.delay * interval)
            found = run.ranks()
            if run.code is not None or run.seconds >= limit or not found:
                break
            there = [rank for rank in kill.ranks if rank in found]  # those that find no place leave
            for rank in there:
                with suppress(ProcessLookupError):
                    os.kill(found[rank], signal.SIGKILL)
            done += [{"rank": rank, "step": _step(output), "seconds": round(run.seconds, 3)} for rank in there]
        while run.code is None and run.seconds < limit:
            time.sleep(POLL)
        return _results(run, output, limit) | {"killed": done}


def chaos(args: argparse.Namespace) -> None:
    """Run the command. Raises UserErrors before anything is started or written, NetTorrentError if a run fails."""
    if launched(os.environ):
        raise LaunchError("chaos starts the ranks itself: run it without mpirun or srun")
    who = _ranks(args.who, args.ranks)
    if args.ranks < 2:
        raise ConfigError(f"--ranks {args.ranks}: at least 2, so that one is left")
    if not max(1, len(who)) <= args.kills < args.ranks:
        least = f"at least the {len(who)} of --who" if len(who) > 1 else "at least 1"
        raise ConfigError(f"--kills {args.kills}: {least}, and fewer than the {args.ranks} ranks")
    mpirun = tolerant_mpirun()
    config = load_config(args.config, *args.changes)
    plan_run(config, args.ranks, None, data_needed=False)
    name = Path(args.config).stem if args.config else "digits"
    folder = Path(args.output or f"runs/chaos-{name}")
    RunFolder(str(folder)).check(args.overwrite, RESULTS)
    program = [sys.executable, "-m", "nettorrent_mpi.train", *([args.config] if args.config else []), "--overwrite"]
    program += [word for change in args.changes for word in ("--set", change)]
    command = [*mpirun, "-n", str(args.ranks), *program]
    kills = draw(args.ranks, args.kills, args.seed, who, at_once=args.at_once)
    results: dict[str, Any] = {
        "config": args.config or "digits",
        "set": args.changes,
        "command": shlex.join(command),
        "ranks": args.ranks,
        "seed": args.seed,
        "kills": [asdict(kill) for kill in kills],
    }
    with RunLock(folder), stopped_like_interrupted():
        results["undisturbed"] = calm = train(command, folder / "undisturbed", args.limit)
        _save(folder, results)
        _check(calm, command, folder)
        limit = min(args.limit, 120 + 5 * calm["seconds"])
        results["disturbed"] = stormy = disturb(
            command, folder / "disturbed", kills, limit, calm["steps"], calm["report_interval"]
        )
        results |= compared(calm, stormy)
        _save(folder, results)
        _check(stormy, command, folder)
    sys.stdout.write(json.dumps(results, indent=2) + "\n" if args.json else describe(results, folder))


def compared(calm: dict[str, Any], stormy: dict[str, Any]) -> dict[str, Any]:
    """Return what the disturbed run's failures have cost."""
    ours, theirs = stormy.get("test_accuracy"), calm.get("test_accuracy")
    return {
        "recovery_seconds": [each["seconds"] for each in stormy.get("failures", ())],
        "steps_lost": [each["step"] - each["resumed_from"] for each in stormy.get("failures", ())],
        "accuracy_difference": None if ours is None or theirs is None else round(ours - theirs, 6),
    }


def describe(results: dict[str, Any], folder: Path) -> str:
    """Show the results as tables."""
    calm, stormy = results["undisturbed"], results["disturbed"]
    failures = stormy["failures"]
    told = [
        f"{len(stormy['killed'])} of {results['ranks']} ranks were killed (seed {results['seed']}): "
        + ", ".join(f"rank {each['rank']} at step {each['step']}" for each in stormy["killed"])
    ]
    late = sum(len(kill["ranks"]) for kill in results["kills"]) - len(stormy["killed"])
    if late:
        left = ", or had no place for them" if any(each.get("left_out") for each in failures) else ""
        told.append(f"{late} more would have been killed, but the run had ended before{left}")
    if failures:
        header = ("lost ranks", "at step", "went on from", "steps lost", "recovered in", "ranks left")
        rows = [
            (
                ", ".join(map(str, each["lost"])), str(each["step"]), str(each["resumed_from"]), str(lost),
                f"{each['seconds']:.2f} s", str(each["left"]),
            )
            for each, lost in zip(failures, results["steps_lost"], strict=True)
        ]  # fmt: skip
        told += ["", aligned(header, rows, left=("lost ranks",))]
    header = ("run", "ranks at the end", "steps", "seconds", "training loss", "test accuracy")
    rows = [
        (
            name, str(run["world_size"]), str(run["steps"]), f"{run['seconds']:.1f}", f"{run['final_loss']:.4f}",
            "-" if run["test_accuracy"] is None else f"{100 * run['test_accuracy']:.2f} %",
        )
        for name, run in (("undisturbed", calm), ("disturbed", stormy))
    ]  # fmt: skip
    told += ["", aligned(header, rows, left=("run",)), "", f"all figures: {folder / 'chaos.json'}"]
    return "\n".join(told) + "\n"


def _results(run: StartedRun, output: Path, limit: float) -> dict[str, Any]:
    """Return what a run that has ended, or has taken longer than `limit` seconds, has left."""
    late, seconds = run.code is None, run.seconds
    run.end()
    found: dict[str, Any] = {"code": run.code, "seconds": round(seconds, 3), "processes_left": run.left}
    summary = output / "summary.json"
    if late or not summary.exists():
        lines = [line for line in _log(output).read_text(errors="replace").splitlines() if line.strip()]
        why = f"not done after {limit:.0f} s" if late else f"ended with exit code {run.code} and no results"
        return found | {"complete": False, "why": why, "lines": lines[-LAST_LINES:]}
    told = json.loads(summary.read_text(encoding="utf-8"))
    times = [record["time"] for record in _records(output)]
    names = ("world_size", "layout", "steps", "train_seconds", "final_loss", "test_accuracy")
    return found | {
        "complete": True,
        **{name: told[name] for name in names},
        "failures": told.get("failures", []),
        "report_interval": round((times[-1] - times[0]) / (len(times) - 1), 4) if len(times) > 1 else 0.0,
    }


def _records(output: Path, last: int | None = None) -> list[dict[str, Any]]:
    """Return the records of a run, which may be writing another; with `last` only those in so many bytes at the end."""
    try:
        with (output / "metrics.jsonl").open("rb") as file:
            file.seek(0 if last is None else max(0, file.seek(0, os.SEEK_END) - last))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return []
    found = []
    for line in lines:
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


def _step(output: Path) -> int:
    """Return the last step of which a run has told."""
    records = _records(output, 4096)
    return int(records[-1]["step"]) if records else 0


def _log(output: Path) -> Path:
    """Return the file with a run's output, beside its folder."""
    return output.with_name(output.name + ".log")


def _ranks(text: str | None, ranks: int) -> list[int]:
    words = text.split(",") if text else []
    found = [int(word) for word in words if word.strip().isdecimal()]
    if len(found) < len(words) or len(set(found)) < len(found) or any(rank >= ranks for rank in found):
        raise ConfigError(f"--who {text}: different ranks from 0 to {ranks - 1}, as 0,2")
    return found


def _save(folder: Path, results: dict[str, Any]) -> None:
    with written(folder / "chaos.json"):
        write_whole(folder / "chaos.json", json.dumps(results, indent=2) + "\n")


def _check(run: dict[str, Any], command: Sequence[str], folder: Path) -> None:
    """Raise an error if a run did not come to its end."""
    if not run["complete"]:
        lines = "".join(f"\n  {line}" for line in run["lines"])
        text = f"{shlex.join(command)}: {run['why']}{':' if lines else ''}{lines}"
        raise NetTorrentError(f"{text}\nthe results so far are in {folder / 'chaos.json'}")
