"""The metrics of a run as an event file, which TensorBoard shows and others import."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import text as text_summary

from nettorrent_mpi.cli.runs.run_data import Point, RunData, text
from nettorrent_mpi.data.storage import replacing
from nettorrent_mpi.engine.rank_seconds import PARTS

NAME = "events.out.tfevents.0.nettorrent"  # TensorBoard reads what has `tfevents` in its name
TAGS = {
    "train_loss": "loss/train", "test_loss": "loss/test", "validation_loss": "loss/validation",
    "test_accuracy": "accuracy/test", "validation_accuracy": "accuracy/validation",
    "learning_rate": "training/learning_rate", "samples_per_second": "training/samples_per_second",
    "epoch": "training/epoch", "consensus_distance": "training/consensus_distance",
}  # fmt: skip


def write_events(run: RunData, folder: Path) -> Path:
    """Write the event file of a run into a folder, whole or not at all, and return its path. Raises OSErrors."""
    folder.mkdir(parents=True, exist_ok=True)
    path, zero = folder / NAME, _beginning(run)
    with replacing(path) as part:
        writer = RecordWriter(str(part.absolute()))
        writer.write(Event(wall_time=zero, file_version="brain.Event:2").SerializeToString())
        if run.config:
            told = text_summary("config.yaml", "\n".join(f"    {line}" for line in run.config.splitlines()))
            writer.write(Event(wall_time=zero, step=0, summary=told).SerializeToString())
        for point in run.points:
            values = [Summary.Value(tag=tag, simple_value=value) for tag, value in _scalars(run, point)]
            when = zero + point.figures.get("time", 0.0)
            event = Event(wall_time=when, step=point.step, summary=Summary(value=values))
            writer.write(event.SerializeToString())
        writer.close()
    return path


def _scalars(run: RunData, point: Point) -> Iterator[tuple[str, float]]:
    """Yield the figures of a record: of the ranks, the fraction of their time for each of PARTS, in the mean of a
    swarm."""
    yield from ((TAGS[name], value) for name, value in point.figures.items() if name in TAGS)
    ranks = point.ranks
    if ranks is None:
        return
    yield "ranks/slowest", float(ranks.slowest)
    topology = run.topology
    if ranks.swarms is not None:
        swarms = [swarm[:, 1] for swarm in ranks.swarms]
    elif ranks.each is not None and topology is not None and topology.size == len(ranks.each):
        swarms = [ranks.each[topology.swarm(stage)].mean(axis=0) for stage in range(len(topology.stages))]
    else:
        return
    names = run.stage_names if len(run.stage_names) == len(swarms) else [f"stage {n}" for n in range(len(swarms))]
    for number, (name, seconds) in enumerate(zip(names, swarms, strict=True)):
        for part, value in zip(PARTS, seconds / (seconds.sum() or 1.0), strict=True):
            yield f"{part}/{number} {name}", float(value)


def _beginning(run: RunData) -> float:
    """Return when the training began, in seconds since 1970: 0 if that is not known."""
    try:
        return datetime.fromisoformat(text(run.about.get("began"))).timestamp()
    except (ValueError, OverflowError):
        return 0.0
