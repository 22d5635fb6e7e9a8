"""A RUN that is none is told by every command in the same words, with the runs that are near."""

from __future__ import annotations

from pathlib import Path

import pytest

from nettorrent_mpi.__main__ import main
from tests.cli.runs.made import make

COMMANDS = [
    "evaluate {}", "predict {} x.npy", "draw {}", "export {} --format npz", "export {} --format tensorboard",
    "inspect {}", "runs {}", "watch {} --once", "report {}", "train --resume {}",
]  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("tensorboardX")
    make(Path("runs/letters"))
    make(Path("runs/plain"))
    Path("c.yaml").write_text("a: 1")
    Path("empty").mkdir()


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_no_run(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    for place, what, maker, near in (
        ("runs/leters", "does not exist", "", "did you mean runs/letters?"),
        ("empty", "has none of a run's files", "", "runs/ holds: letters, plain"),
        ("c.yaml", "is a file", " c.yaml", "runs/ holds: letters, plain"),
    ):
        capfd.readouterr()
        assert main(command.format(place).split()) == 2
        told = f"{place} {what}: name the folder of a run, which `nettorrent train{maker}` makes; {near}"
        assert capfd.readouterr().err == f"nettorrent: error: {told}\n"


@pytest.mark.parametrize("command", ["report {}", "watch {} --once", "runs {}", "export {} --format tensorboard"])
def test_a_file_of_a_run_stands_for_it(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    Path("runs/letters/model.h5").write_bytes(b"")
    Path("runs/letters/checkpoints/step-0000000100").mkdir(parents=True)
    for place in ("model.h5", "config.yaml", "checkpoints", "checkpoints/step-0000000100"):
        assert main(command.format(f"runs/letters/{place}").split()) == 0
        assert "letters" in capfd.readouterr().out


def test_what_a_run_lacks_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    for command in ("evaluate {}", "predict {} x.npy", "export {} --format npz"):
        assert main(command.format("runs/letters").split()) == 2
        assert "runs/letters: holds neither model.h5 nor a checkpoint yet" in capfd.readouterr().err
    assert main(["train", "--resume", "runs/letters"]) == 2
    assert "runs/letters holds no checkpoint to resume from" in capfd.readouterr().err
    Path("runs/letters/model.h5").write_bytes(b"")
    assert main(["train", "--resume", "runs/letters/model.h5"]) == 2
    assert "model.h5: holds no training state; give the folder of its run, runs/letters" in capfd.readouterr().err
