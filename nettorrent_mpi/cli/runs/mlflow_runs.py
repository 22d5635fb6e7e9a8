"""The metrics of a run as a run of MLflow, in a folder that `mlflow ui` shows and imports."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # plain files, which need no server and no database

from mlflow.entities import Metric, RunTag
from mlflow.tracking import MlflowClient

from nettorrent_mpi.cli.runs.run_data import RunData
from nettorrent_mpi.cli.runs.tagged_figures import beginning, tagged

NAME = "mlruns"
EXPERIMENT = "nettorrent"
MOST = 1000  # metrics that one call may have


def write_events(run: RunData, folder: Path) -> Path:
    """Add a run to the store `folder`/mlruns, and return it. Raises OSErrors."""
    folder.mkdir(parents=True, exist_ok=True)
    store = folder / NAME
    client, zero = MlflowClient(tracking_uri=store.resolve().as_uri()), beginning(run)
    known = client.get_experiment_by_name(EXPERIMENT)
    experiment = client.create_experiment(EXPERIMENT) if known is None else known.experiment_id
    made = client.create_run(experiment, start_time=round(1000 * zero), run_name=run.path.resolve().name)
    metrics = [
        Metric(tag.replace(",", " "), value, round(1000 * (zero + point.figures.get("time", 0.0))), point.step)
        for point in run.points
        for tag, value in tagged(run, point)
    ]
    for start in range(0, len(metrics), MOST):
        client.log_batch(made.info.run_id, metrics=metrics[start : start + MOST])
    if run.config:
        client.log_batch(made.info.run_id, tags=[RunTag("config.yaml", run.config)])
    client.set_terminated(made.info.run_id, end_time=metrics[-1].timestamp if metrics else None)
    return store
