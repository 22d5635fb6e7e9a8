"""`nettorrent export RUN --format wandb` and `--format mlflow`: their own libraries read what was written."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nettorrent_mpi.__main__ import main
from tests.cli.runs.made import TWO, make, records
from tests.conftest import ROOT

BEGAN = 1767225600  # 2026-01-01


def log_of(content: bytes) -> Iterator[bytes]:
    """The records of a log as LevelDB writes them, in blocks of 32 KiB after a head of 7 bytes."""
    place, whole = 7, b""
    while place + 7 <= len(content):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        size, kind = struct.unpack_from("<HB", content, place + 4)
        whole += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            yield whole
            whole = b""


@pytest.mark.slow
def test_wandb_reads_an_offline_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    run = make(tmp_path / "run")
    for _ in range(2):  # again, while a run goes on
        assert main(["export", str(run), "--format", "wandb"]) == 0
    assert "wandb sync" in capfd.readouterr().out
    (file,) = (run / "wandb" / "wandb").glob("offline-run-*/*.wandb")
    history, ids = list[dict[str, Any]](), set()
    for data in log_of(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        if record.HasField("run"):
            ids.add(record.run.run_id)
        if record.HasField("history"):
            history.append({i.key or "/".join(i.nested_key): i.value_json for i in record.history.item})
    lines = records(TWO)
    assert len(ids) == 1
    assert [float(each["loss/train"]) for each in history] == pytest.approx([line["train_loss"] for line in lines])
    assert [float(each["_timestamp"]) - BEGAN for each in history] == pytest.approx([line["time"] for line in lines])


@pytest.mark.slow
def test_mlflow_reads_a_run(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    pytest.importorskip("mlflow")
    run, shared = make(tmp_path / "run"), tmp_path / "all"
    for more in ([], ["--output", str(shared)]) * 2:  # MLflow keeps what a process knows
        words = ["--format", "mlflow", *more]
        subprocess.run([sys.executable, "-m", "nettorrent_mpi", "export", str(run), *words], cwd=ROOT, check=True)
    assert "mlflow ui" in capfd.readouterr().out
    from mlflow.tracking import MlflowClient

    def read(store: Path) -> list[list[Any]]:
        client = MlflowClient(tracking_uri=store.as_uri())
        experiment = client.get_experiment_by_name("nettorrent")
        assert experiment is not None
        runs = client.search_runs([experiment.experiment_id])
        return [client.get_metric_history(each.info.run_id, "loss/train") for each in runs]

    lines = records(TWO)
    (metrics,) = read(run / "mlflow" / "mlruns")
    assert [(m.step, m.value) for m in metrics] == [(line["step"], line["train_loss"]) for line in lines]
    assert [m.timestamp / 1000 - BEGAN for m in metrics] == pytest.approx([line["time"] for line in lines], abs=1e-3)
    assert len(read(shared / "mlruns")) == 2  # a folder of several runs
