"""`nettorrent export RUN --format tensorboard`: TensorBoard reads the metrics that the run has written."""

from __future__ import annotations

from pathlib import Path

import pytest

from nettorrent_mpi.__main__ import main
from nettorrent_mpi.plan.topology import Stage, Topology
from tests.cli.runs.made import TWO, make, records

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def scalars(folder: Path) -> dict[str, list[tuple[int, float, float]]]:
    """Return what TensorBoard reads in a folder: (step, value, wall time) by tag."""
    found = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    return {tag: [(e.step, e.value, e.wall_time) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_tensorboard_reads_every_figure(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = make(tmp_path / "run")
    for _ in range(2):  # again, while a run goes on
        assert main(["export", str(run), "--format", "tensorboard"]) == 0
    assert f"tensorboard --logdir {run}" in capfd.readouterr().out
    found, lines = scalars(run / "tensorboard"), records(TWO)
    assert [step for step, _, _ in found["loss/train"]] == [line["step"] for line in lines]
    assert [value for _, value, _ in found["loss/train"]] == pytest.approx([line["train_loss"] for line in lines])
    assert [value for _, value, _ in found["accuracy/test"]] == pytest.approx([1 - 0.5 / n for n in range(2, 11, 2)])
    began = 1767225600  # 2026-01-01
    assert [when - began for _, _, when in found["training/learning_rate"]] == [line["time"] for line in lines]
    assert {value for _, value, _ in found["ranks/slowest"]} == {1}
    parts = {name: found[f"{name}/0 linear1"][0][1] for name in ("compute", "communication", "waiting")}
    assert parts == pytest.approx({"compute": 0.6, "communication": 0.125, "waiting": 0.275})
    assert len(list((run / "tensorboard").iterdir())) == 1


def test_many_ranks_and_a_named_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    topology = Topology(1, (Stage(0, 1, 300, 1), Stage(1, 2, 1, 1)))
    run, target = make(tmp_path / "run", topology, metrics=records(topology, slowest=300)), tmp_path / "x" / "y"
    command = ["export", str(run), "-o", str(target), "--format", "tensorboard"]
    assert [main(command), main(command), main([*command, "--overwrite"])] == [0, 2, 0]
    assert "--overwrite" in capfd.readouterr().err
    assert scalars(target)["waiting/1 linear2"][0][1] == pytest.approx(0.05)


def test_what_cannot_be_exported(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = make(tmp_path / "run")
    (tmp_path / "file").write_text("")
    for words, arguments in (
        ("name the file with --output", [str(run)]),
        ("does not exist", [str(tmp_path / "nothing"), "--format", "tensorboard"]),
        ("is a file, not a folder", [str(run), "-o", str(tmp_path / "file" / "x"), "--format", "tensorboard"]),
        ("invalid choice", [str(run), "--format", "tensorbord"]),
    ):
        assert main(["export", *arguments]) == 2
        error = capfd.readouterr().err
        assert words in error
        assert error.count("\n") == 1
