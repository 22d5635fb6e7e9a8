"""The answers of a study: its best trial, how much each parameter matters, and how many trials an hour its jobs made.

study.json            everything
trials.csv            a line for each trial
best.yaml             the configuration of the best one
parallel.svg          parallel coordinates: a line for each trial, over its parameters (with matplotlib)
speedup.svg           trials an hour over the number of groups, where jobs had different ones
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, median
from typing import Any

from nettorrent_mpi.cli.run_folder import commit
from nettorrent_mpi.cli.tables import aligned
from nettorrent_mpi.config.search_file import Search
from nettorrent_mpi.config.search_space import Choice, Parameter
from nettorrent_mpi.config.writing import to_yaml
from nettorrent_mpi.engine.run_files import write_whole, written
from nettorrent_mpi.plan.records import dataclass
from nettorrent_mpi.planning import load_config
from nettorrent_mpi.tune import parzen
from nettorrent_mpi.tune.study import Study
from nettorrent_mpi.tune.trials import COMPLETE, Trial, point_in_words, value_in_words

SHOWN = 10  # trials in the table on the terminal
PARTS = 4  # of a range, each with as many trials


def write(study: Study, search: Search) -> bool:
    """Write the results of the study, and show them; return whether any trial is complete. Raises OutputError."""
    with study.alone():
        trials = study.trials()
        done = [trial for trial in trials if trial.done]
        first, shares, jobs = best(done), importances(search.parameters, done), rates(done)
        told = {
            "search": search.plain(),
            "complete": len(done) == search.trials,
            "best": None if first is None else asdict(first),
            "importances": [asdict(each) for each in shares],
            "jobs": [asdict(each) for each in jobs],
            "trials": [asdict(trial) for trial in trials],
            "commit": commit(),
        }
        files = {"study.json": json.dumps(told, indent=2) + "\n", "trials.csv": _csv(search, trials)}
        if first is not None:
            files["best.yaml"] = _config_of(study, first)
        for name, text in files.items():
            with written(study.folder / name):
                write_whole(study.folder / name, text)
        drawn = _draw(study.folder, search, done, jobs)
    sys.stdout.write(_in_words(study.folder, search, done, shares, jobs, [*files, *drawn]))
    sys.stdout.flush()
    return first is not None


def best(trials: Sequence[Trial]) -> Trial | None:
    """Return the complete trial with the highest accuracy, the first of several."""
    complete = [trial for trial in trials if trial.state == COMPLETE]
    return max(complete, key=lambda trial: (trial.accuracy or 0.0, -trial.number), default=None)


def _config_of(study: Study, trial: Trial) -> str:
    """Return the configuration of a trial, with a run folder of its own."""
    config = load_config(study.folder_of(trial.number) / "config.yaml")
    return to_yaml(replace(config, output=str(study.folder / "best")))


# ---- importance ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Importance:
    """An Importance says how much a parameter matters for a trial to be among the better half: `share`, of 1 for all
    parameters; None where there are too few complete trials to say, or no Optuna. `means` has the mean accuracy at each
    of its values, or in each quarter of a range."""

    parameter: str
    share: float | None
    means: Mapping[str, float]

    @property
    def at_best(self) -> str:
        """The value, or the part of the range, with the highest mean accuracy."""
        return max(self.means, key=lambda each: self.means[each], default="")


def importances(parameters: Mapping[str, Parameter], trials: Sequence[Trial]) -> list[Importance]:
    """Return the importance of each parameter (`parzen.importances`), the highest first."""
    complete = [trial for trial in trials if trial.state == COMPLETE]
    shares = parzen.importances(parameters, complete) if parzen.tells_importances() else None
    found = [
        Importance(name, None if shares is None else shares[name], _means(_parts(name, parameter, complete), complete))
        for name, parameter in parameters.items()
    ]
    return sorted(found, key=lambda each: -(each.share or 0.0))


def _means(parts: Sequence[str], trials: Sequence[Trial]) -> dict[str, float]:
    """Return the mean accuracy of the trials in each part."""
    found: dict[str, list[float]] = {}
    for trial, part in zip(trials, parts, strict=True):
        found.setdefault(part, []).append(trial.accuracy or 0.0)
    return {part: fmean(accuracies) for part, accuracies in found.items()}


def _parts(name: str, parameter: Parameter, trials: Sequence[Trial]) -> list[str]:
    """Return the value of each trial in words, or the quarter of the range in which it lies."""
    values: list[Any] = [trial.point[name] for trial in trials]
    distinct = sorted(set(values)) if not isinstance(parameter, Choice) else []
    if len(distinct) <= PARTS:
        return [value_in_words(value) for value in values]
    order = sorted(range(len(values)), key=lambda index: values[index])
    cuts = {values[order[len(order) * part // PARTS]] for part in range(PARTS)}
    part_of = [max(cut for cut in cuts if cut <= value) for value in values]
    inside = {cut: [value for value, own in zip(values, part_of, strict=True) if own == cut] for cut in cuts}
    words = {cut: f"{value_in_words(min(own))} to {value_in_words(max(own))}" for cut, own in inside.items()}
    return [words[cut] for cut in part_of]


# ---- speed ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Rate:
    """A Rate says how many trials a job brought to their ends, and how many that were in an hour, from the beginning of
    the first to the end of the last."""

    job: str
    groups: int
    trials: int
    seconds: float

    @property
    def per_hour(self) -> float:
        """Trials an hour."""
        return 3600 * self.trials / self.seconds if self.seconds > 0 else 0.0


def rates(trials: Sequence[Trial]) -> list[Rate]:
    """Return the rate of each job, in the order of their beginnings."""
    found: dict[str, list[Trial]] = {}
    for trial in sorted(trials, key=lambda each: each.began):
        found.setdefault(trial.job, []).append(trial)
    return [
        Rate(job, own[0].groups, len(own), max(trial.ended or 0 for trial in own) - own[0].began)
        for job, own in found.items()
    ]


def by_groups(jobs: Sequence[Rate]) -> dict[int, float]:
    """Return the median number of trials an hour of the jobs with each number of groups."""
    counts = sorted({job.groups for job in jobs})
    return {count: median(job.per_hour for job in jobs if job.groups == count) for count in counts}


# ---- words and pictures --------------------------------------------------------------------------
def _csv(search: Search, trials: Sequence[Trial]) -> str:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    names = ("number", "state", "accuracy", "test_accuracy", "epochs", "seconds", "group", "groups", "ranks", "reason")
    table.writerow([*names, *search.parameters])
    for trial in trials:
        row = [getattr(trial, name) for name in names]
        table.writerow([*row, *(trial.point.get(name) for name in search.parameters)])
    return text.getvalue()


def _draw(folder: Path, search: Search, trials: Sequence[Trial], jobs: Sequence[Rate]) -> list[str]:
    if find_spec("matplotlib") is None:
        sys.stdout.write("no picture is drawn without matplotlib: pip install 'nettorrent_mpi[plots]'\n")
        return []
    from nettorrent_mpi.tune.pictures import draw

    return draw(folder, search.parameters, trials, by_groups(jobs))


def _percent(accuracy: float | None) -> str:
    return "" if accuracy is None else f"{100 * accuracy:.2f} %"


def _in_words(
    folder: Path,
    search: Search,
    trials: Sequence[Trial],
    shares: Sequence[Importance],
    jobs: Sequence[Rate],
    files: Sequence[str],
) -> str:
    """Return what is shown at the end of a job."""
    complete = sorted((t for t in trials if t.state == COMPLETE), key=lambda t: (-(t.accuracy or 0), t.number))
    states = [trial.state for trial in trials]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(sorted(states)))
    lines = ["", f"{len(trials)} of {search.trials} trials: {counts or 'none has ended'}"]
    first = best(trials)
    if first is not None:
        rows = [
            [str(t.number), _percent(t.accuracy), f"{t.epochs:.4g}", f"{t.seconds:.1f}", point_in_words(t.point)]
            for t in complete[:SHOWN]
        ]
        lines += ["", aligned(["trial", "validation", "epochs", "seconds", "parameters"], rows, ["parameters"])]
        lines += ["", f"what matters for being among the better half of {len(complete)} complete trials:"]
        unknown = f"needs {parzen.LEAST} trials" if parzen.tells_importances() else "needs Optuna"
        rows = [
            [
                each.parameter,
                unknown if each.share is None else f"{100 * each.share:.0f} %",
                each.at_best,
                _percent(each.means.get(each.at_best)),
            ]
            for each in shares
        ]
        lines.append(aligned(["parameter", "importance", "best", "mean there"], rows, ["parameter", "best"]))
        if not parzen.tells_importances():
            lines.append(f"importances are those of Optuna 5: {parzen.INSTALL}")
        test = "" if first.test_accuracy is None else f", {_percent(first.test_accuracy)} on the test set"
        lines += ["", f"best: trial {first.number}, {_percent(first.accuracy)} on the validation rows{test}"]
        lines.append(f"train it anew: nettorrent train {folder / 'best.yaml'}")
    speeds = by_groups(jobs)
    if speeds:
        each = (f"{rate:,.0f} with {count} group{'s' if count > 1 else ''}" for count, rate in speeds.items())
        lines.append(f"trials an hour: {', '.join(each)}")
    return "\n".join([*lines, f"results: {folder}: {', '.join(files)}", ""])
