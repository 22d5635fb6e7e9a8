"""`nettorrent speedup` as a program: mistakes, whole comparisons under real launchers, failures, interruptions."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
DIGITS = str(ROOT / "configs" / "digits.yaml")
Installed = Callable[[str], tuple[list[str], dict[str, str]]]
# A short epoch whose result does not depend on who computes it.
FEW = "data={name: synthetic, rows: 300, test_rows: 100, shape: [8, 8, 1], classes: 10}"
CHANGES = (FEW, "dtype=float64", "kernels=numpy", "model.layers.6.dropout=0", "train.epochs=1")
EXACT = [*(word for change in CHANGES for word in ("--set", change)), "--accuracy", "0.999"]


def command(*words: object, folder: Path) -> list[str]:
    return [sys.executable, "-m", "nettorrent_mpi", "speedup", *map(str, words), "--output", str(folder)]


def compare(
    *words: object, folder: Path, env: dict[str, str] | None = None, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    merged = {**os.environ, **(env or {})}
    return subprocess.run(
        command(*words, folder=folder), cwd=cwd, env=merged, capture_output=True, text=True, check=False, timeout=400
    )


MISTAKES: list[tuple[list[str], str]] = [
    (["--ranks", "2,1"], "--ranks 2,1: ascending whole numbers"),
    (["--ranks", "0,1"], "--ranks 0,1: ascending"),
    (["--ranks", "1,two"], "--ranks 1,two: ascending"),
    (["--modes", "rows,colums"], "unknown mode 'colums'; there are rows, cols, gpipe"),
    (["--peers", "tensorflow"], "unknown peer 'tensorflow'; there are torch, torch_channels_last"),
    (["--repeats", "0"], "--repeats 0: at least 1"),
    (["--steps", "-3"], "--steps -3: at least 1"),
    (["--accuracy", "95"], "--accuracy 95.0: a fraction"),
    (["--launcher", "mpirun -n 2"], "write {ranks} where the number of ranks belongs"),
    (["--launcher", "no-such-program {ranks}"], "there is no program no-such-program"),
    (["--set", "train.batch_size=none"], "train.batch_size"),
    (["--set", "device=gpu"], "device is gpu: compare with one GPU (--baseline gpu)"),
    (["--baseline", "gpu"], "a GPU is asked for, but "),
    (["--baseline", "gpus"], "did you mean gpu?"),
    (["--set", "data={name: mnist, root: /nowhere}"], "/nowhere"),
]


def test_mistakes(tmp_path: Path) -> None:
    """Each is told in one line, and nothing is started or written."""
    file, folder = tmp_path / "commands", tmp_path / "out"
    lists = [["speedup", DIGITS, *words, "--peers", "none", "--output", str(folder)] for words, _ in MISTAKES]
    for words in lists:
        if words.count("--peers") > 1:
            del words[-4:-2]
    file.write_text(json.dumps(lists))
    subprocess.run(
        [sys.executable, ROOT / "tests" / "programs" / "commands.py", file], cwd=ROOT, check=True, timeout=60
    )
    for (_, wanted), (code, told) in zip(MISTAKES, json.loads((tmp_path / "commands.done").read_text()), strict=True):
        assert code == 2, told
        assert told.startswith("nettorrent: error: ")
        assert told.count("\n") == 1
        assert wanted in told
    assert not folder.exists()


def test_not_under_mpirun(tmp_path: Path) -> None:
    done = compare(DIGITS, folder=tmp_path / "out", env={"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"})
    assert done.returncode == 2
    assert "run it without mpirun" in done.stderr


def test_another_comparison_is_kept(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{}")
    done = compare(DIGITS, folder=tmp_path)
    assert done.returncode == 2
    assert "--overwrite" in done.stderr
    assert (tmp_path / "results.json").read_text() == "{}"


def check_files(folder: Path, pictures: set[str]) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    assert results["complete"]
    assert results["failure"] is None
    for key in ("cpu", "cores", "python", "packages", "commit", "date"):
        assert key in results["host"]
    for side in results["sides"]:
        assert (side["impossible"] is None) == bool(side["samples_per_second"])
        assert all(figure > 0 for figure in side["samples_per_second"])
    for trace in results["traces"]:
        assert trace["side"] in {f"{side['mode']}-{len(trace['shares'])}" for side in results["sides"]}
        assert all(sum(share.values()) == pytest.approx(1, abs=1e-6) for share in trace["shares"])
    report = (folder / "report.md").read_text()
    assert report.startswith("# Speedup of digits\n")
    assert "| one rank | 1 |" in report
    if importlib.util.find_spec("matplotlib") is not None:
        assert {path.name for path in folder.glob("*.*g")} == {f"{p}.{end}" for p in pictures for end in ("svg", "png")}
        assert all(path.stat().st_size > 1000 for path in folder.glob("*.*g"))
    return results


@pytest.mark.parametrize("mpi", [pytest.param("openmpi", marks=pytest.mark.slow), "mpich"])
def test_modes(tmp_path: Path, installed_mpi: Installed, mpi: str) -> None:
    """Also a mode that is not possible; more ranks than cores on machines with two."""
    words, env = installed_mpi(mpi)
    few = ["--steps", "6", "--repeats", "1", "--peers", "none", "--set", "kernels=numpy"]
    more = [] if mpi == "openmpi" else ["--launcher", f"{words[0]} -n {{ranks}}"]
    modes, ranks = ("layers,1f1b", "2,5") if mpi == "openmpi" else ("replicas", "2")
    done = compare(DIGITS, "--ranks", ranks, "--modes", modes, *few, *more, folder=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    results = check_files(tmp_path, {"speedup", "efficiency", "shares"})
    assert ("Open MPI" if mpi == "openmpi" else "MPICH") in results["mpi"]
    assert (tmp_path / "report.md").read_text() == done.stdout
    told = {side["name"]: side for side in results["sides"]}
    if mpi == "openmpi":
        assert list(told) == ["serial-1", "layers-2", "layers-5", "1f1b-5"]
        assert told["layers-2"]["also"] == ["1f1b"]
        assert "5 stages for 4 weight layers" in told["1f1b-5"]["impossible"]
        assert [len(side["samples_per_second"]) for side in results["sides"]] == [1, 1, 1, 0]
        assert "1f1b does the same as layers on 2 ranks: measured once\n" in done.stderr
        assert "\n5 runs left\nturn 1 of 1: one rank: " in done.stderr
        assert " samples/s (4 runs, about " in done.stderr
        if results["host"]["cores"] < 5:
            assert "5 ranks exceed the" in done.stdout
    else:
        assert [len(side["samples_per_second"]) for side in results["sides"]] == [1, 1]
    assert results["steps"] == 6
    assert {path.stem for path in (tmp_path / "trainings").iterdir()} >= {name for name in told if name != "1f1b-5"}


@pytest.mark.slow
def test_peers_train_the_same(tmp_path: Path, installed_mpi: Installed) -> None:
    """After an epoch, in float64 and without dropout, everybody's accuracy is the same."""
    pytest.importorskip("torch", reason="PyTorch, to compare with, is not installed (the extra `compare`)")
    _, env = installed_mpi("openmpi")
    few = ["--ranks", "1,2", "--modes", "rows", "--peers", "torch,ddp", "--steps", "3", "--repeats", "1"]
    done = compare(DIGITS, *few, *EXACT, folder=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    results = check_files(tmp_path, {"speedup", "efficiency", "shares", "accuracy"})
    names = [side["name"] for side in results["sides"]]
    assert names == ["serial-1", "rows-2", "torch-1", "torch-2", "ddp-2"]
    runs = {run["side"].split("-")[0]: run for run in results["accuracy"]["runs"]}
    assert set(runs) == {"serial", "rows", "torch", "ddp"}
    curves = [[point[1:] for point in run["curve"]] for run in runs.values()]
    assert [epoch for epoch, _ in curves[0]] == [1.0]
    assert curves[0][0][1] > 0.15  # a class is a tenth of the rows
    for curve in curves[1:]:
        assert curve == [pytest.approx(curves[0][0])]
    assert all(run["seconds"] is None for run in runs.values())


FAILING = """\
import subprocess, sys
if "rows" in " ".join(sys.argv):
    sys.exit("this launcher is out of order")
sys.exit(subprocess.run(sys.argv[2:]).returncode)
"""


@pytest.mark.slow
def test_a_failing_program(tmp_path: Path) -> None:
    """What was measured before stays; the command that failed and its last lines are told."""
    (tmp_path / "launch.py").write_text(FAILING)
    launcher = f"{sys.executable} {tmp_path}/launch.py {{ranks}}"
    words = ["--ranks", "2", "--modes", "rows", "--peers", "none", "--steps", "3", "--launcher", launcher]
    done = compare(DIGITS, *words, folder=tmp_path / "out")
    assert done.returncode == 1
    assert "launch.py 2" in done.stderr
    assert "failed with exit code 1" in done.stderr
    assert "this launcher is out of order" in done.stderr
    assert "Traceback" not in done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert not results["complete"]
    assert results["failure"]["exit_code"] == 1
    assert len(results["sides"][0]["samples_per_second"]) == 1
    assert "**Incomplete: " in (tmp_path / "out" / "report.md").read_text()
    again = compare(DIGITS, *words, folder=tmp_path / "out")
    assert again.returncode == 2
    assert "--overwrite" in again.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_interrupted(tmp_path: Path, number: int) -> None:
    """The program that runs at the moment is ended, too."""
    marker = tmp_path / "started"
    (tmp_path / "launch.py").write_text(
        f"import os, pathlib, time\npathlib.Path({str(marker)!r}).write_text(str(os.getpid()))\ntime.sleep(100)\n"
    )
    launcher = f"{sys.executable} {tmp_path}/launch.py {{ranks}}"
    words = ["--ranks", "2", "--modes", "rows", "--peers", "none", "--steps", "3", "--launcher", launcher]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        process = subprocess.Popen(
            command(DIGITS, *words, folder=tmp_path / "out"), cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
    finally:
        signal.signal(signal.SIGINT, before)
    for _ in range(600):
        if marker.exists() and marker.read_text():
            break
        time.sleep(0.05)
    process.send_signal(number)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "interrupted; the results so far are in" in told
    assert json.loads((tmp_path / "out" / "results.json").read_text())["failure"] == {"interrupted": True}
    with pytest.raises(ProcessLookupError):
        os.kill(int(marker.read_text()), 0)
