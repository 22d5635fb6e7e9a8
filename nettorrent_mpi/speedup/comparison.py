"""The runs of a comparison, in turns, and their results."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

# isort: split
from nettorrent_mpi.config.sections import Config
from nettorrent_mpi.config.writing import to_yaml
from nettorrent_mpi.engine.run_files import write_whole, written
from nettorrent_mpi.engine.traced_run import read_traced
from nettorrent_mpi.engine.usage import WARM_UP
from nettorrent_mpi.plan.errors import ChildError
from nettorrent_mpi.speedup import modes, runs, shares, sides
from nettorrent_mpi.speedup.figures import limit
from nettorrent_mpi.speedup.machine import Launcher
from nettorrent_mpi.speedup.modes import GPU, SERIAL, Candidate
from nettorrent_mpi.speedup.report import PICTURES, failure_in_words, to_markdown
from nettorrent_mpi.speedup.sides import COMPILE, OURS, Side
from nettorrent_mpi.speedup.timetable import Job, Timetable

TURN_SECONDS = 5.0  # seconds of a turn of one rank, unless --steps is given
TRIAL_STEPS = 10  # steps from which that is estimated
LEAST_STEPS = 10
TRACED_STEPS = 200  # at most
TRACED_ACTIONS = 60_000  # actions of a rank, at most: a trace holds no more than 65,536
TRAININGS = "trainings"  # the folder for the configurations of all runs


class Comparison:
    """A Comparison runs everything in turns. results.json is written after each of them."""

    def __init__(
        self,
        folder: Path,
        launcher: Launcher,
        plans: Sequence[Candidate],
        everyone: Sequence[Side],
        results: dict[str, Any],
        shared: Config,
        program: Sequence[str] = runs.PROGRAM,
    ):
        self._folder, self._launcher = folder, launcher
        self._plans = {(plan.mode, plan.ranks): plan for plan in plans}
        self._sides = list(everyone)
        self._results = results
        self._shared, self._program = shared, program

    def run(self, repeats: int, steps: int | None, accuracy: float | None) -> None:
        """Run all turns, then the traces, then the trainings to an accuracy."""
        self._clear()
        self._save()
        for side in self._sides:
            if side.impossible:
                tell(f"not measured: {sides.in_words(side.plain())}: {side.impossible}")
            for mode in side.also:
                tell(f"{mode} does the same as {side.mode} on {side.cpus} ranks: measured once")
        timetable = Timetable(self._longest_training)
        if steps is None:
            steps, timetable.turn = self._choose_steps()
        self._results["steps"] = steps
        if accuracy is not None:
            of = "validation" if self._shared.data.validation else "test"
            self._results["accuracy"] = {"wanted": accuracy, "of": of, "runs": []}
        jobs = self._jobs(repeats, steps, accuracy)
        tell(timetable.left(jobs))
        for number, job in enumerate(jobs):
            if self._entry(job.side)["impossible"]:
                continue
            began = time.monotonic()
            line = job.run()
            if line is not None:
                timetable.took(job, time.monotonic() - began)
                left = timetable.left([one for one in jobs[number + 1 :] if not self._entry(one.side)["impossible"]])
                tell(f"{line} ({left})" if left else line)
        self._results["complete"] = True
        self._save()

    def _jobs(self, repeats: int, steps: int, accuracy: float | None) -> list[Job]:
        """Return all runs in order: each is of a side that is possible."""
        there = [side for side in self._sides if not side.impossible]
        jobs = [
            Job("turn", side.name, partial(self._measure, side, steps, f"turn {turn + 1} of {repeats}"))
            for turn in range(repeats)
            for side in there
        ]
        # A GPU's work is not done when the launch of it, which a trace has, returns.
        ours = [side for side in self._largest(there) if side.kind == OURS and side.device == "cpu"]
        jobs += [Job("trace", side.name, partial(self._trace, side, min(steps, TRACED_STEPS))) for side in ours]
        if accuracy is not None:
            jobs += [Job("training", side.name, partial(self._train, side, accuracy)) for side in self._largest(there)]
        return jobs

    def _longest_training(self, name: str) -> float | None:
        """Return the seconds of a side's whole training, without evaluations; None until its speed is known."""
        one, speeds = self._plans[SERIAL, 1], self._entry(name)["samples_per_second"]
        assert one.config is not None
        return one.steps * one.config.train.batch_size / median(speeds) if speeds else None

    def finish(self) -> None:
        """Write report.md and the pictures."""
        plots: list[str] = []
        try:
            from nettorrent_mpi.speedup.plots import draw

            plots = draw(self._results, self._folder)
        except ImportError as error:
            tell(f"no pictures: {error} (pip install 'nettorrent_mpi[plots]')")
        report = to_markdown(self._results, plots)
        self._write("report.md", report)
        sys.stdout.write(report)
        tell(f"results.json, report.md{' and pictures' if plots else ''} are in {self._folder}")

    def fail(self, failure: dict[str, Any]) -> None:
        """Keep the results so far, with the reason why there are no more."""
        self._results["failure"] = failure
        self._save()
        if any(side["samples_per_second"] for side in self._results["sides"]):
            tell(f"not complete: {failure_in_words(self._results)}")
            self._write("report.md", to_markdown(self._results))

    def _choose_steps(self) -> tuple[int, float]:
        """Choose the number of steps with which one rank takes TURN_SECONDS; return it and the seconds of its turn."""
        plan = self._plans[SERIAL, 1]
        assert plan.config is not None
        began = time.monotonic()
        summary = self._trained("trial", modes.timed(plan.config, TRIAL_STEPS + WARM_UP), 1).summary
        start = time.monotonic() - began - summary["train_seconds"]
        fast = float(summary["samples_per_second"])
        chosen = max(LEAST_STEPS, math.ceil(TURN_SECONDS * fast / plan.config.train.batch_size))
        tell(f"{chosen} steps a turn, in which one rank takes about {TURN_SECONDS:g} s (--steps N changes it)")
        return chosen, start + chosen * plan.config.train.batch_size / fast

    def _measure(self, side: Side, steps: int, label: str) -> str | None:
        if side.kind == OURS:
            plan = self._plans[side.mode, side.cpus]
            assert plan.config is not None
            config = modes.timed(plan.config, steps + WARM_UP)
            summary = self._trained(side.name, config, side.cpus).summary
            self._results |= {"mpi": summary["mpi"], "kernels": summary["kernels"]}
            figure = float(summary["samples_per_second"])
        else:
            told = self._torch(side, ["--steps", str(steps)])
            if told is None:
                return None
            figure = float(told["samples_per_second"])
        entry = self._entry(side.name)
        entry["samples_per_second"].append(figure)
        self._save()
        return f"{label}: {sides.in_words(entry)}: {figure:,.0f} samples/s"

    def _largest(self, there: Sequence[Side]) -> list[Side]:
        """Return one rank, and every mode and peer on the largest number of existing cores or GPUs (or else on the
        fewest); a side that stands for several modes once."""
        found: dict[str, Side] = {}
        for mode in dict.fromkeys(mode for side in there for mode in (side.mode, *side.also)):
            own = [side for side in there if mode in (side.mode, *side.also)]
            there_are = self._launcher.cores if own[0].device == "cpu" else limit(self._results, "gpu")
            fitting = [side for side in own if side.cpus <= there_are]
            side = max(fitting, key=lambda s: s.cpus) if fitting else min(own, key=lambda s: s.cpus)
            found[side.name] = side
        return list(found.values())

    def _trace(self, side: Side, steps: int) -> str:
        plan = self._plans[side.mode, side.cpus]
        assert plan.config is not None
        assert plan.micro_batches is not None
        longest = 11 * plan.micro_batches + 7  # actions of a step
        steps = max(1, min(steps, TRACED_ACTIONS // longest - shares.SKIPPED))
        config = modes.timed(plan.config, steps + shares.SKIPPED, trace=True)
        text = self._trained(f"trace-{side.name}", config, plan.ranks).trace
        assert text is not None
        told = shares.shares(read_traced(text), steps + shares.SKIPPED, plan.micro_batches)
        self._results["traces"].append({"side": side.name, "steps": steps, "shares": told})
        self._save()
        return f"traced: {sides.in_words(self._entry(side.name))}"

    def _train(self, side: Side, accuracy: float) -> str | None:
        curve: list[tuple[float, float, float]]
        if side.kind == OURS:
            config = self._plans[side.mode, side.cpus].config
            assert config is not None
            trained = self._trained(f"accuracy-{side.name}", modes.until(config, accuracy), side.cpus)
            curve = runs.curve_of(trained.metrics)
        else:
            told = self._torch(side, ["--accuracy", str(accuracy)])
            if told is None:
                return None
            curve = told["curve"]
        seconds = next((at for at, _, reached in curve if reached >= accuracy), None)
        run = {"side": side.name, "seconds": seconds, "curve": curve}
        self._results["accuracy"]["runs"].append(run)
        self._save()
        reached = "not reached" if seconds is None else f"reached after {seconds:.1f} s"
        return f"accuracy {accuracy:g}: {sides.in_words(self._entry(side.name))}: {reached}"

    def _trained(self, name: str, config: Config, ranks: int) -> runs.Trained:
        """Train a configuration of ours, which stays in the folder to be run again."""
        return runs.train(self._write_config(name, config), ranks, self._launcher, self._program)

    def _torch(self, side: Side, options: list[str]) -> dict[str, Any] | None:
        """Return PyTorch's output; None if torch.compile does not work here, which the table then reports."""
        plan = self._plans.get((GPU, 1), self._plans[SERIAL, 1]) if side.device == "gpu" else self._plans[SERIAL, 1]
        serial = plan.config
        assert serial is not None
        path = self._write_config("torch", serial)
        try:
            return runs.torch_peer(path, [*side.options, *options], side.threads)
        except ChildError as error:
            if side.mode != COMPILE:
                raise
            why = error.lines[-1].strip() if error.lines else f"exit code {error.code}"
            self._entry(side.name)["impossible"] = f"torch.compile does not work here: {why}"
            self._save()
            tell(f"not measured: {sides.in_words(side.plain())}: torch.compile does not work here: {why}")
            return None

    def _entry(self, name: str) -> dict[str, Any]:
        """Return the entry of this side in the results."""
        return next(side for side in self._results["sides"] if side["name"] == name)

    def _write_config(self, name: str, config: Config) -> Path:
        return self._write(f"{TRAININGS}/{name}.yaml", to_yaml(config))

    def _clear(self) -> None:
        """Remove an earlier comparison's files, so that none of them is mistaken for one of this; no other files."""
        if not (self._folder / "results.json").exists():
            return
        pictures = [self._folder / f"{name}.{end}" for name in PICTURES for end in ("png", "svg")]
        for path in (*pictures, self._folder / "report.md", *(self._folder / TRAININGS).glob("*.yaml")):
            with written(path):
                path.unlink(missing_ok=True)

    def _save(self) -> None:
        self._write("results.json", json.dumps(self._results, indent=1) + "\n")

    def _write(self, name: str, text: str) -> Path:
        path = self._folder / name
        with written(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, text)
        return path


def tell(text: str) -> None:
    """Print progress."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
