"""The metrics of a run as an event file, which TensorBoard shows and others import."""

from __future__ import annotations

from pathlib import Path

from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import text as text_summary

from nettorrent_mpi.cli.runs.run_data import RunData
from nettorrent_mpi.cli.runs.tagged_figures import beginning, tagged
from nettorrent_mpi.data.storage import replacing

NAME = "events.out.tfevents.0.nettorrent"  # TensorBoard reads what has `tfevents` in its name


def write_events(run: RunData, folder: Path) -> Path:
    """Write the event file of a run into a folder, whole or not at all, and return its path. Raises OSErrors."""
    folder.mkdir(parents=True, exist_ok=True)
    path, zero = folder / NAME, beginning(run)
    with replacing(path) as part:
        writer = RecordWriter(str(part.absolute()))
        writer.write(Event(wall_time=zero, file_version="brain.Event:2").SerializeToString())
        if run.config:
            told = text_summary("config.yaml", "\n".join(f"    {line}" for line in run.config.splitlines()))
            writer.write(Event(wall_time=zero, step=0, summary=told).SerializeToString())
        for point in run.points:
            values = [Summary.Value(tag=tag, simple_value=value) for tag, value in tagged(run, point)]
            when = zero + point.figures.get("time", 0.0)
            event = Event(wall_time=when, step=point.step, summary=Summary(value=values))
            writer.write(event.SerializeToString())
        writer.close()
    return path
