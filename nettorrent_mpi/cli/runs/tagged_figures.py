"""The figures of a run under the tags by which other programs show them."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

from nettorrent_mpi.cli.runs.run_data import Point, RunData
from nettorrent_mpi.cli.runs.values import text
from nettorrent_mpi.engine.rank_seconds import PARTS

TAGS = {
    "train_loss": "loss/train", "test_loss": "loss/test", "validation_loss": "loss/validation",
    "test_accuracy": "accuracy/test", "validation_accuracy": "accuracy/validation",
    "learning_rate": "training/learning_rate", "samples_per_second": "training/samples_per_second",
    "epoch": "training/epoch", "consensus_distance": "training/consensus_distance",
}  # fmt: skip


def tagged(run: RunData, point: Point) -> Iterator[tuple[str, float]]:
    """Yield the figures of a record with their tags: of the ranks, the fraction of their time for each of PARTS, in the
    mean of a swarm."""
    yield from ((TAGS[name], value) for name, value in point.figures.items() if name in TAGS)
    ranks = point.ranks
    if ranks is None:
        return
    yield "ranks/slowest", float(ranks.slowest)
    topology = run.topology if point.step > run.since else None  # of earlier parts it is not known
    if ranks.swarms is not None:
        swarms = [swarm[:, 1] for swarm in ranks.swarms]
    elif ranks.each is not None and topology is not None and topology.size == len(ranks.each):
        swarms = [ranks.each[topology.swarm(stage)].mean(axis=0) for stage in range(len(topology.stages))]
    else:
        return
    named = topology is not None and len(run.stage_names) == len(swarms)
    names = run.stage_names if named else [f"stage {n}" for n in range(len(swarms))]
    for number, (name, seconds) in enumerate(zip(names, swarms, strict=True)):
        for part, value in zip(PARTS, seconds / (seconds.sum() or 1.0), strict=True):
            yield f"{part}/{number} {name}", float(value)


def beginning(run: RunData) -> float:
    """Return when the training began, in seconds since 1970: 0 if that is not known."""
    try:
        return datetime.fromisoformat(text(run.parts[0].about.get("began"))).timestamp()
    except (ValueError, OverflowError):
        return 0.0
