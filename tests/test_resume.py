"""A run that stopped goes on from its checkpoint, on any number of ranks, to the weights of one that never stopped."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from nettorrent_mpi.engine.model_file import read_arrays

HERE = Path(__file__).resolve().parent
Run = subprocess.CompletedProcess[str]
TRAIN = ["-m", "nettorrent_mpi.train"]
CONFIG = """\
dtype: float64
data: {name: synthetic, rows: 330, test_rows: 40, shape: [8, 8, 2], classes: 4, validation: 0.1, augment: [flip]}
model:
  layers:
    - conv2d: {filters: 6, padding: same, activation: tanh, bias: false}
    - batch_norm
    - max_pool2d: 2
    - dropout: 0.2
    - flatten
    - linear: {units: 12, activation: relu}
    - layer_norm
    - linear: {units: 4}
train: {epochs: 3, batch_size: 32, micro_batches: 3, optimizer: OPTIMIZER, report_every: 4}
"""
OPTIMIZERS = ["{adam: {lr: 0.002}}", "{sgd: {lr: 0.05, momentum: 0.9}}", "{rmsprop: {lr: 0.001, centered: true}}"]
MIXED = "layout={replicas: 1, swarms: [{layers: 1, rows: 1, cols: 2}, {layers: 2, rows: 1, cols: 1}]}"


def trained(folder: Path) -> dict[str, np.ndarray]:
    return read_arrays(folder / "model.h5")


def same(mine: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert mine.keys() == other.keys()
    for key, array in other.items():
        np.testing.assert_allclose(mine[key], array, rtol=0, atol=1e-10 * np.abs(array).max(), err_msg=key)


def config_file(tmp_path: Path, optimizer: str = OPTIMIZERS[0]) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.replace("OPTIMIZER", optimizer))
    return path


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resumed_on_other_ranks(mpirun: Callable[..., Run], tmp_path: Path, optimizer: str) -> None:
    config = config_file(tmp_path, optimizer)
    assert mpirun(1, [*TRAIN, config, "--output", tmp_path / "whole"]).returncode == 0
    parts = [config, "--output", tmp_path / "parts"]
    assert mpirun(3, [*TRAIN, *parts, "--set", "train.epochs=1", "--set", MIXED]).returncode == 0
    more = mpirun(2, [*TRAIN, *parts, "--resume", "--set", "train.epochs=2"])
    assert more.returncode == 0, more.stderr
    again = mpirun(4, [*TRAIN, *parts, "--resume", tmp_path / "parts", "--set", "layout=auto"], mpi="mpich")
    assert again.returncode == 0, again.stderr
    same(trained(tmp_path / "parts"), trained(tmp_path / "whole"))
    whole, told = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    )
    assert [record["step"] for record in told] == [record["step"] for record in whole]
    assert [record["samples"] for record in told] == [record["samples"] for record in whole]
    np.testing.assert_allclose([r["train_loss"] for r in told], [r["train_loss"] for r in whole], rtol=1e-9)
    times = [record["time"] for record in told]
    assert times == sorted(times)
    assert len(list((tmp_path / "parts" / "checkpoints").iterdir())) == 2


@pytest.mark.parametrize("mpi", ["openmpi", "mpich"])
def test_stopped_by_a_signal(mpirun: Callable[..., Run], tmp_path: Path, mpi: str) -> None:
    config = config_file(tmp_path)
    run = [config, "--output", tmp_path / "run"]
    stopped = mpirun(3, [HERE / "programs" / "signalled.py", "12", "1", *run], mpi=mpi)
    assert stopped.returncode == 75, f"{stopped.stdout}\n{stopped.stderr}"
    assert re.search(r"stopped by a signal after step (1[3-9]|2\d); go on with --resume", stopped.stdout)
    assert not (tmp_path / "run" / "summary.json").exists()
    assert "Traceback" not in stopped.stderr
    done = mpirun(2, [*TRAIN, *run, "--resume"], mpi=mpi)
    assert done.returncode == 0, done.stderr
    assert mpirun(1, [*TRAIN, config, "--output", tmp_path / "whole"]).returncode == 0
    same(trained(tmp_path / "run"), trained(tmp_path / "whole"))


def test_what_cannot_be_resumed(mpirun: Callable[..., Run], tmp_path: Path) -> None:
    config = config_file(tmp_path)
    run = [*TRAIN, config, "--output", tmp_path / "run", "--set", "train.epochs=1"]

    def refused(*arguments: str | Path) -> str:
        done = mpirun(2, [*run, *arguments])
        assert done.returncode == 2, f"{done.stdout}\n{done.stderr}"
        errors = [line for line in done.stderr.splitlines() if line.startswith("nettorrent: error: ")]
        assert len(errors) == 1, done.stderr
        return errors[0]

    assert "holds no checkpoint" in refused("--resume")
    assert mpirun(2, run).returncode == 0
    assert "seed" in refused("--resume", "--set", "seed=7")
    assert "train.batch_size" in refused("--resume", "--set", "train.batch_size=16")
    assert "another run's results" in refused()
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    harmed = tmp_path / "harmed.h5"
    shutil.copy(checkpoint, harmed)
    with harmed.open("r+b") as file:
        file.truncate(harmed.stat().st_size // 2)
    assert "harmed.h5" in refused("--resume", harmed)
    assert mpirun(2, [*run, "--resume"]).returncode == 0  # nothing left to do, and nothing lost
    assert mpirun(2, [*run, "--overwrite"]).returncode == 0


def test_a_flipped_bit_of_the_model_seen_by_some_ranks_only(mpirun: Callable[..., Run], tmp_path: Path) -> None:
    """Ranks of the other stage read sound arrays; they must not wait for those that fail."""
    config = config_file(tmp_path)
    run = tmp_path / "run"
    assert mpirun(2, [*TRAIN, config, "--output", run, "--set", "train.steps=1"]).returncode == 0
    with h5py.File(run / "model.h5") as file:
        place = file["parameters/linear2/weight"].id.get_chunk_info(0).byte_offset
    with (run / "model.h5").open("r+b") as raw:
        raw.seek(place)
        byte = raw.read(1)[0]
        raw.seek(place)
        raw.write(bytes([byte ^ 1]))
    layout = "layout={replicas: 1, swarms: [{layers: 1, rows: 2}, {layers: 2, rows: 1}]}"
    for mpi in ("openmpi", "mpich"):
        done = mpirun(3, ["-m", "nettorrent_mpi", "evaluate", run, "--set", layout], mpi=mpi, timeout=30)
        assert done.returncode == 2, f"{done.stdout}\n{done.stderr}"
        assert done.stderr.count("nettorrent: error: ") == 1
        assert "model.h5: is not a whole file" in done.stderr
