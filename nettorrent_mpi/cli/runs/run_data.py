"""A run folder as the commands read it, whether the run goes on, has ended or has failed.

Whatever the files hold, what is returned has the right types: a value that makes no sense is left out, and damage is
told in one line for each file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nettorrent_mpi.cli.runs.run_parts import RunPart, parts_of, settings_of
from nettorrent_mpi.cli.runs.values import LARGEST, is_count, items, number, one_line, text
from nettorrent_mpi.cli.time_left import TimeLeft
from nettorrent_mpi.data.files import opening, parsed, size_of
from nettorrent_mpi.engine.rank_seconds import PARTS, WAITING
from nettorrent_mpi.engine.record import FIGURES as SCORES
from nettorrent_mpi.engine.record import read_lines
from nettorrent_mpi.engine.run_files import no_run, run_of
from nettorrent_mpi.engine.run_lock import in_use
from nettorrent_mpi.engine.traced_run import TracedRun, read_traced
from nettorrent_mpi.plan.errors import DataError, UserError
from nettorrent_mpi.plan.records import dataclass
from nettorrent_mpi.plan.topology import Stage, Topology

RUNNING, DONE, DIVERGED, STOPPED, FAILED = "running", "done", "diverged", "stopped", "failed"
FIGURES = (
    "epoch", "samples", "time", "train_loss", "learning_rate", "samples_per_second", "consensus_distance",
    "test_loss", "test_accuracy", "validation_loss", "validation_accuracy",
)  # fmt: skip
MOST_RANKS, MOST_BYTES, MOST_TRACE = 1_000_000, 1 << 30, 200 << 20  # larger files and numbers are damage


class RankSeconds(NamedTuple):
    """RankSeconds are what a record says of the ranks: `each` is an array (ranks, PARTS) of seconds or, of many ranks,
    `swarms` one (swarms, PARTS, 3) of min, mean and max."""

    slowest: int
    each: np.ndarray | None
    swarms: np.ndarray | None


@dataclass(frozen=True)
class Point:
    """A Point is one record: the figures that it has, by their names."""

    step: int
    figures: Mapping[str, float]
    ranks: RankSeconds | None


class Best(NamedTuple):
    """A Best is an evaluation with the best accuracy of its kind, "test" or, where there is no test set, "validation",
    and the record with the other figures of the same step."""

    kind: str
    accuracy: float
    point: Point


@dataclass(frozen=True)
class RunData:
    """The content of a run folder. `about` is run.json, `settings` the configuration by dotted keys; `damage` has a
    line for each file that could not be read as a whole."""

    path: Path
    state: str
    about: Mapping[str, Any]
    settings: Mapping[str, str]
    config: str
    points: Sequence[Point]
    summary: Mapping[str, Any]
    damage: Sequence[str] = field(default=())

    @property
    def name(self) -> str:
        """The folder's name."""
        return one_line(self.path.name or self.path.absolute().name)

    @cached_property
    def topology(self) -> Topology | None:
        """The layout; None where it is not known."""
        stages, first = [], 0
        for stage in items(self.about.get("stages")):
            layers, rows, cols = len(self.layers(stage)), stage.get("rows"), stage.get("cols")
            if not (layers and is_count(rows) and is_count(cols)):
                return None
            stages.append(Stage(first, first + layers, rows, cols))
            first += layers
        replicas = self.about.get("replicas")
        if not stages or not is_count(replicas) or replicas * sum(stage.size for stage in stages) > MOST_RANKS:
            return None
        return Topology(replicas, tuple(stages))

    @staticmethod
    def layers(stage: Mapping[str, Any]) -> list[str]:
        """The names of a stage's weight layers."""
        layers = stage.get("layers")
        return [text(each) for each in layers if text(each)] if isinstance(layers, list) else []

    @cached_property
    def stage_names(self) -> list[str]:
        """The stages by their layers, like "conv2d1" or "linear1..linear3"."""
        names = [self.layers(stage) for stage in items(self.about.get("stages"))]
        return [each[0] if len(each) == 1 else f"{each[0]}..{each[-1]}" for each in names if each]

    @property
    def ranks(self) -> int | None:
        """The number of ranks."""
        found = self.about.get("ranks", self.summary.get("world_size"))
        return found if is_count(found) else None

    @property
    def layout(self) -> str:
        """The layout in one line; empty if it is not known."""
        return text(self.about.get("layout")) or text(self.summary.get("layout"))

    @property
    def steps(self) -> int | None:
        """The number of steps of the whole run."""
        found = self.about.get("steps")
        return found if is_count(found) else None

    @property
    def exchange(self) -> str:
        """The kind of the exchange by which replicas agree."""
        told = self.summary.get("exchange")
        return text(self.about.get("exchange")) or text(told.get("kind") if isinstance(told, dict) else None)

    def host(self, rank: int) -> str:
        """Return the host of a rank; empty if it is not known."""
        hosts = self.about.get("hosts")
        return text(hosts[rank]) if isinstance(hosts, list) and 0 <= rank < len(hosts) else ""

    def place(self, rank: int) -> str:
        """Say where a rank stands: "rank 3 (host a, stage 1 conv2d2)"."""
        told = [f"host {self.host(rank)}"] if self.host(rank) else []
        topology = self.topology
        if topology is not None and rank < topology.size:
            at = topology.place(rank)
            told.append(f"stage {at.stage} {self.stage_names[at.stage]}")
            told += [f"replica {at.replica}"] if topology.replicas > 1 else []
        return f"rank {rank}" + (f" ({', '.join(told)})" if told else "")

    def curve(self, name: str) -> list[tuple[float, float]]:
        """Return (step, value) of all records that have this figure."""
        return [(point.step, point.figures[name]) for point in self.points if name in point.figures]

    def last(self, name: str) -> float | None:
        """Return the latest value of a figure."""
        return next((p.figures[name] for p in reversed(self.points) if name in p.figures), None)

    @property
    def best(self) -> Best | None:
        """The first evaluation with the best accuracy; None where there is no accuracy."""
        for kind in ("test", "validation"):
            name = f"{kind}_accuracy"
            found = [point for point in self.points if name in point.figures]
            if found:
                point = max(found, key=lambda point: point.figures[name])
                return Best(kind, point.figures[name], point)
        return None

    @cached_property
    def parts(self) -> list[RunPart]:
        """The parts of the run in their order, the latest one last."""
        return parts_of(self.about, self.config, self.points[-1].step if self.points else 0)

    @property
    def since(self) -> int:
        """The step after which the latest part began."""
        return self.parts[-1].first - 1

    @property
    def seconds_left(self) -> float | None:
        """The seconds until the last step at the pace of the latest records; None as long as that is not known."""
        every = self.about.get("evaluate_every")
        if self.steps is None:
            return None
        left = TimeLeft(self.steps, every if is_count(every) else None, after=self.since)
        for point in self.points:
            if point.step > self.since and "time" in point.figures:
                left.see(point.step, point.figures, evaluated=any(name in point.figures for name in SCORES))
        return left.seconds

    def rank_seconds(self, latest: int | None = None) -> RankSeconds | None:
        """Return what the `latest` records (None: all) of the latest part say of the ranks together."""
        told = [point.ranks for point in self.points if point.ranks is not None and point.step > self.since]
        told = told if latest is None else told[-latest:]
        if not told:
            return None
        last = told[-1]
        if last.each is not None:
            alike = [t.each for t in told if t.each is not None and t.each.shape == last.each.shape]
            each = np.sum(alike, axis=0)
            return RankSeconds(int(each[:, :WAITING].sum(axis=1).argmax()), each, None)
        assert last.swarms is not None
        votes = [t.slowest for t in told]
        swarms = [t.swarms for t in told if t.swarms is not None and t.swarms.shape == last.swarms.shape]
        return RankSeconds(max(set(votes), key=votes.count), None, np.sum(swarms, axis=0))

    @property
    def traced_part(self) -> RunPart | None:
        """The part of the run that trace.json is of; None where it is of none that counts."""
        return next((part for part in reversed(self.parts) if part.about.get("traced") is True), None)

    def trace(self) -> TracedRun | None:
        """Read trace.json; None where there is none. Raises a DataError if it is damaged or too large to be read."""
        path = self.path / "trace.json"
        if not path.exists():
            return None
        content = _content(path, MOST_TRACE)
        return None if content is None else read_traced(content, str(path))


def read_run(path: Path) -> RunData:
    """Read the folder of the run that a path names. Raises DataError where there is none."""
    folder = run_of(path)
    if folder is None:
        raise no_run(path)
    damage: list[str] = []
    about, summary = (_json(folder / name, damage) for name in ("run.json", "summary.json"))
    config, settings = _config(folder / "config.yaml", damage)
    state = _state(folder, about, summary)
    points = _points(folder / "metrics.jsonl", damage, growing=state == RUNNING)
    return RunData(folder, state, about, settings, config, points, summary, damage)


def _state(folder: Path, about: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    used = in_use(folder)
    if used:
        return RUNNING
    ended = about.get("ended")
    if used is None and ended in (STOPPED, DIVERGED, DONE):
        return str(ended)
    return DONE if summary and used is None else FAILED


def _content(path: Path, most: int, damage: list[str] | None = None) -> bytes | None:
    """Return the content of a file; None if there is none, or, with a line in `damage`, if it cannot be read."""
    if not path.exists():
        return None
    try:
        size = size_of(path, "check it")
        if size > most:
            raise DataError(f"has {size / 1e6:,.0f} MB, and {most / 1e6:,.0f} MB at most are read", file=str(path))
        with opening(path, "check it") as file:
            return file.read()
    except UserError as error:
        if damage is None:
            raise
        damage.append(str(error))
        return None


def _json(path: Path, damage: list[str]) -> dict[str, Any]:
    content = _content(path, MOST_BYTES, damage)
    if content is None:
        return {}
    try:
        found = parsed(content)
    except ValueError as error:
        found = error
    if isinstance(found, dict):
        return found
    damage.append(f"{path} is damaged, and left out")
    return {}


def _config(path: Path, damage: list[str]) -> tuple[str, dict[str, str]]:
    from nettorrent_mpi.config.reading import text_of

    if not path.exists():
        return "", {}
    try:
        content = text_of(str(path))
        return content, settings_of(content, str(path))
    except UserError as error:
        damage.append(str(error))
        return "", {}


def _points(path: Path, damage: list[str], *, growing: bool) -> list[Point]:
    content = _content(path, MOST_BYTES, damage)
    if content is None:
        return []
    if growing:
        content = content[: content.rfind(b"\n") + 1]  # the last line may be half written
    lines, damaged = read_lines(content)
    if damaged:
        many = "1 line could not be read, and is" if damaged == 1 else f"{damaged} lines could not be read, and are"
        damage.append(f"{path}: {many} left out")
    return sorted((_point(record) for _, record in lines), key=lambda point: point.step)


def _point(record: Mapping[str, Any]) -> Point:
    figures = {name: value for name in FIGURES if (value := number(record.get(name))) is not None}
    return Point(int(record["step"]), figures, _rank_seconds(record.get("ranks")))


def _rank_seconds(told: Any) -> RankSeconds | None:
    if not isinstance(told, dict) or not is_count(told.get("slowest"), least=0):
        return None
    try:
        if isinstance(told.get("swarms"), list):
            swarms = np.array([[swarm[name] for name in PARTS] for swarm in told["swarms"]])
            each, fits = None, swarms.ndim == 3 and swarms.shape[1:] == (len(PARTS), 3)
            values = swarms
        else:
            swarms, each = None, np.array([told[name] for name in PARTS]).T
            values, fits = each, each.ndim == 2 and len(each) > told["slowest"]
    except (ValueError, TypeError, KeyError):
        return None
    if not fits or values.dtype.kind not in "if" or not ((values >= 0) & (values < LARGEST)).all():
        return None
    return RankSeconds(told["slowest"], each, swarms)
