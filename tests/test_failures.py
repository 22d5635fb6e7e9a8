"""Bad input gives one clear error and exit code 2 on all ranks; a rank that raises ends all ranks within 2 s."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image

HERE = Path(__file__).resolve().parent
TRAIN = ["-m", "nettorrent_mpi.train"]
Run = subprocess.CompletedProcess[str]
slow, long = pytest.mark.slow, pytest.mark.long
MPIS = ["openmpi", pytest.param("mpich", marks=slow)]

CONFIG = """\
data: {{name: {data}}}
model:
  layers:
    - flatten
    - linear: {{units: 8, activation: relu}}
    - linear: {{units: 6, activation: relu}}
    - linear: {{units: {units}}}
train: {{steps: 3, batch_size: 16, micro_batches: 2, optimizer: {{sgd: {{lr: 0.1}}}}}}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.format(data="digits", units=10))
    return path


def told_once(done: Run, code: int, pattern: str) -> None:
    text = f"\n{done.stdout}\n{done.stderr}"
    assert done.returncode == code, text
    errors = re.findall(r"^nettorrent: error: .*$", done.stderr, re.MULTILINE)
    assert len(errors) == 1, text
    assert re.search(pattern, errors[0]), text
    assert "Traceback" not in done.stderr, text


def of_series(told: tuple[int, str, str]) -> Run:
    """One of a series of commands: its exit code and what was written, by which rank ever."""
    return subprocess.CompletedProcess([], told[0], "", told[1] + told[2])


BAD = {
    "unknown key": (["--set", "train.bach_size=3"], r"bach_size.*batch_size"),
    "wrong type": (["--set", "train.batch_size=many"], r"train\.batch_size.*many"),
    "unknown option": (["--bogus"], r"--bogus"),
    "too few ranks": (
        ["--set", "layout={replicas: 1, swarms: [{layers: 3, rows: 2, cols: 2}]}"], r"needs 4 ranks, the run has 3"
    ),
    "more stages than layers": (
        ["--set", "layout={swarms: [{layers: 1}, {layers: 1}, {layers: 1}, {layers: 1}]}"],
        r"4 swarms for the network's 3 weight layers",
    ),
    "shapes that do not fit": (["--set", "model.layers.0=relu"], r"relu1.*linear1|linear1.*relu1"),
    "too few units": (["--set", "model.layers.3.linear.units=4"], r"linear3.*10 classes"),
    "several": (["--set", "model.layers.0=dense", "--set", "train.epochz=3", "--set", "dtype=x"], r"3 mistakes$"),
    "a size of a layer": (["--set", "model.layers.0=max_pool2d: 9"], r"--set .*model\.layers\[0\]: .*window of 9 x 9"),
    "loss that undoes": (["--set", "model.layers.3.linear.activation=sigmoid"], r"linear3\.sigmoid.*cross_entropy"),
    "endless warm-up": (["--set", "train.schedule={cosine: {warmup_steps: 10000}}"], r"warmup_steps: 10000 steps, but"),
    "missing data": (
        ["--set", "data.name=mnist", "--set", "data.root=/nonexistent"], r"/nonexistent/mnist.*fetch mnist"
    ),
    "no such user": (["--set", "data.name=mnist", "--set", "data.root=~nosuchuser"], r"data\.root: ~nosuchuser: "),
    "too long a name": (["--output", 300 * "o"], r"o{300}.*File name too long"),
}  # fmt: skip


@pytest.mark.parametrize("mpi", MPIS)
def test_mistakes_are_told_once(series: Callable[..., Any], tmp_path: Path, config: Path, mpi: str) -> None:
    commands = [["train", config, "--output", tmp_path / "run", *arguments] for arguments, _ in BAD.values()]
    told = series(3, tmp_path / "series", commands, mpi=mpi, on=True)
    for (_, pattern), each in zip(BAD.values(), told, strict=True):
        told_once(of_series(each), 2, pattern)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("case", "mpi"), [("unknown key", "mpich"), ("missing data", "openmpi")])
def test_a_mistake_ends_the_program(
    mpirun: Callable[..., Run], tmp_path: Path, config: Path, mpi: str, case: str
) -> None:
    arguments, pattern = BAD[case]
    done = mpirun(3, [*TRAIN, config, "--output", tmp_path / "run", *arguments], mpi=mpi, timeout=30)
    told_once(done, 2, pattern)
    assert not (tmp_path / "run").exists()


def idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    with gzip.open(path, "wb") as file:
        file.write(header + array.astype(np.uint8).tobytes())


def mnist(folder: Path, harm: str) -> Path:
    """A file of `folder`/mnist, which is harmed; the others are well."""
    (folder / "mnist").mkdir(parents=True)
    random = np.random.default_rng(0)
    for name, rows in (("train", 64), ("t10k", 32)):
        idx(folder / "mnist" / f"{name}-images-idx3-ubyte.gz", random.integers(0, 256, (rows, 8, 8)))
        idx(folder / "mnist" / f"{name}-labels-idx1-ubyte.gz", random.integers(0, 10, rows))
    path = folder / "mnist" / "train-images-idx3-ubyte.gz"
    data = bytearray(path.read_bytes())
    if harm == "truncated":
        data = data[: len(data) // 2]
    elif harm == "corrupt":
        data[len(data) // 2] ^= 0xFF
    else:
        data = bytearray(b"<html>not found</html>")
    path.write_bytes(bytes(data))
    return path


def test_harmed_and_missing_files(series: Callable[..., Any], tmp_path: Path, config: Path) -> None:
    """A mistake in the data or the configuration ends all ranks."""
    commands: list[list[str | Path]] = [["train", tmp_path / "no.yaml"]]
    patterns = [r"no\.yaml: there is no such file"]
    for harm in ("truncated", "corrupt", "not gzip"):
        mnist(tmp_path / harm, harm)
        commands.append(["train", config, "--set", "data.name=mnist", "--set", f"data.root={tmp_path / harm}"])
        patterns.append(r"train-images-idx3-ubyte\.gz at byte \d+")
    whole, half = tmp_path / "data.h5", tmp_path / "half_data.h5"
    with h5py.File(whole, "w") as file:
        file["x"], file["y"] = np.zeros((50, 8, 8, 1), np.uint8), np.zeros(49, np.int64)
    half.write_bytes(whole.read_bytes()[:700])
    for path in (whole, half):
        commands.append(["train", config, "--set", "data.name=hdf5", "--set", f"data.root={path}"])
        patterns.append(r"data\.h5")
    for words in commands:
        words += ["--output", tmp_path / "run"]
    told = series(3, tmp_path / "series", commands, on=True)
    for pattern, each in zip(patterns, told, strict=True):
        told_once(of_series(each), 2, pattern)
    assert not (tmp_path / "run").exists()


@slow
def test_another_runs_folder(series: Callable[..., Any], tmp_path: Path, config: Path) -> None:
    run: list[str | Path] = ["train", config, "--output", tmp_path / "run"]
    series(2, tmp_path / "first", [run])
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    (again,) = series(2, tmp_path / "again", [run], on=True)
    told_once(of_series(again), 2, r"another run's results.*--overwrite")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    series(2, tmp_path / "over", [[*run, "--overwrite"]])


@pytest.mark.parametrize("mpi", MPIS)
def test_divergence(mpirun: Callable[..., Run], tmp_path: Path, config: Path, mpi: str) -> None:
    arguments = ["--set", "train.optimizer.sgd.lr=1e30", "--set", "train.steps=50", "--output", tmp_path / "run"]
    done = mpirun(3, [*TRAIN, config, *arguments], mpi=mpi)
    told_once(done, 1, r"step \d+: the output of layer linear\d.* is not finite \(seen on rank \d\)")
    assert "Warning" not in done.stderr


def test_a_divergence_of_finite_numbers(series: Callable[..., Any], tmp_path: Path) -> None:
    train = "{steps: 5, batch_size: 2000, optimizer: {sgd: {lr: LR}}}"
    model = "{layers: [flatten, {linear: 10}], loss: mean_squared_error}"
    commands = []
    for lr in (0.1, 1.3, 300):
        config = tmp_path / f"{lr}.yaml"
        config.write_text(f"data: {{name: digits}}\nmodel: {model}\ntrain: {train.replace('LR', str(lr))}\n")
        commands.append(["train", config, "--output", tmp_path / f"{lr}"])
    *told, evaluated = series(2, tmp_path / "series", [*commands, ["evaluate", tmp_path / "1.3"]], on=True)
    assert [code for code, *_ in told] == [0, 0, 1]
    assert re.fullmatch(r"test: loss \d+\.\d+, accuracy \d+\.\d+ %\n", evaluated[1]), "nothing about the training"
    for (code, first, others), warned in zip(told, (0, 1, 1), strict=True):
        assert (first + others).count("nettorrent: warning: the training loss is ") == warned, first
        assert ("the training diverged" in first) == bool(code)
    assert json.loads((tmp_path / "300" / "summary.json").read_text())["final_loss"] > 1e9
    assert (tmp_path / "300" / "model.h5").exists()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """disk(size): a folder that is a small disk of its own."""
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("mounting a small disk needs root")
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        mounted = subprocess.run(command, capture_output=True, text=True)
        if mounted.returncode:
            pytest.skip(f"cannot mount a small disk: {mounted.stderr.strip()}")
        return folder

    yield mount
    subprocess.run(["umount", folder], capture_output=True)


@slow
@pytest.mark.parametrize("size", ["4k", "12k"])
def test_full_disk(
    mpirun: Callable[..., Run], disk: Callable[[str], Path], tmp_path: Path, config: Path, size: str
) -> None:
    done = mpirun(2, [*TRAIN, config, "--output", disk(size) / "run"])
    told_once(done, 2, r"could not be written: the disk is full")
    assert not [*(tmp_path / "disk").rglob("*.part"), *(tmp_path / "disk").rglob("*.tmp")]


@slow
def test_a_disk_that_is_read_only(
    series: Callable[..., Any], disk: Callable[[str], Path], tmp_path: Path, config: Path
) -> None:
    folder = disk("1m")
    series(1, tmp_path / "first", [["train", config, "--output", folder / "run"]])
    images = tmp_path / "images"
    for name in ("a", "b"):
        (images / name).mkdir(parents=True)
        Image.fromarray(np.zeros((2, 2), np.uint8)).save(images / name / "1.png")
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    commands: list[list[str | Path]] = [
        ["train", config, "--output", folder / "another"],
        ["train", config, "--output", folder / "run", "--resume", "--set", "train.steps=9"],
        ["export", folder / "run", "--output", folder / "model.npz"],
        ["data", "import", images, "--output", folder / "data.h5", "--test", "0"],
    ]
    for told in series(1, tmp_path / "second", commands, on=True):
        told_once(of_series(told), 2, "Read-only file system")
    (tmp_path / "noaccess").mkdir(mode=0)
    command = [sys.executable, *TRAIN, config, "--set", "data.name=mnist", "--set", f"data.root={tmp_path}/noaccess"]
    caps = "-dac_override,-dac_read_search"
    told_once(
        subprocess.run(
            ["setpriv", f"--bounding-set={caps}", f"--inh-caps={caps}", *map(str, command)],
            capture_output=True,
            text=True,
        ),
        2,
        "noaccess.*Permission denied",
    )


@slow
def test_a_disk_without_room_for_checkpoints(
    mpirun: Callable[..., Run], disk: Callable[[str], Path], config: Path
) -> None:
    """Training goes on without them, and its results are there."""
    changes = ["train.steps=180", "train.optimizer=adam", "model.layers.1.linear.units=256"]
    sets = [word for change in changes for word in ("--set", change)]
    run = disk("200k") / "run"
    done = mpirun(2, [*TRAIN, config, "--output", run, *sets])
    assert done.returncode == 0, done.stderr
    told = re.findall(
        r"^nettorrent: warning: there is no checkpoint of step (\d+): .* the disk is full", done.stderr, re.M
    )
    assert told == ["90", "180"], done.stderr
    assert "Traceback" not in done.stderr
    assert {path.name for path in run.iterdir() if path.is_file()} == {
        "config.yaml", "metrics.jsonl", "model.h5", "summary.json"
    }  # fmt: skip
    assert not [*run.rglob("*.part"), *run.rglob("*.tmp")]


PHASES = ["setup", "wiring", "data", "forward", "backward", "reduce", "update", "report", "evaluate", "save", "close"]
SHORT = ["--set", "train.steps=12", "--set", "train.report_every=2"]


def ended_together(done: Run, phase: str, ended: float, ranks: int = 3) -> None:
    """Everything ended within 2 s, with one traceback."""
    text = f"\n{done.stdout}\n{done.stderr}"
    failed = re.search(r"FAILED AT ([\d.]+)", done.stderr)
    assert failed, text
    assert done.returncode == 1, text
    assert ended - float(failed[1]) < 2.5, text  # 2 s, and what the launcher takes to clean up
    assert done.stderr.count("Traceback") == 1, text
    assert done.stderr.count(f"RuntimeError: made to fail in {phase}") == 1, text
    assert f"rank 1 of {ranks}" in done.stderr, text


def test_an_error_of_a_process_that_is_alone_is_all_that_is_told(tmp_path: Path, config: Path) -> None:
    """Also where a script has loaded MPI, whose own message says nothing, or that it cannot be found."""
    run = [HERE / "programs" / "failing.py", "forward", "0", config, "--output", tmp_path / "run", *SHORT]
    done = subprocess.run([sys.executable, *map(str, run)], cwd=HERE.parent, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.count("Traceback")) == (1, 1), done.stderr
    assert "MPI_ABORT" not in done.stderr
    assert "Sorry" not in done.stderr


BOTH = ["openmpi", "mpich"]
QUICK = [("openmpi", "forward"), ("mpich", "report")]
ONCE = [(BOTH[i % 2], phase) for i, phase in enumerate(PHASES) if phase not in ("forward", "report")]


@pytest.mark.parametrize(
    ("mpi", "phase"),
    [
        pytest.param(mpi, phase, marks=() if (mpi, phase) in QUICK else slow if (mpi, phase) in ONCE else long)
        for phase in PHASES
        for mpi in BOTH
    ],
)
def test_a_raising_rank_ends_all(
    mpirun: Callable[..., Run], tmp_path: Path, config: Path, mpi: str, phase: str
) -> None:
    run = [config, "--output", tmp_path / "run", *SHORT]
    done = mpirun(3, [HERE / "programs" / "failing.py", phase, "1", *run], mpi=mpi, timeout=60)
    ended_together(done, phase, time.time())


# Four ranks: two replicas of two stages, or a pipeline of two stages of two rows, which is not flushed.
REPLICAS = "layout={replicas: 2, swarms: [{layers: 2}, {layers: 1}]}"
APART = {
    **{
        f"gossip, overlap {overlap}, deadline {deadline}": [
            f"exchange={{gossip: {{overlap: {overlap}, deadline: {deadline}, exact_every: 2, mix: loss}}}}",
            REPLICAS,
        ]
        for overlap in ("true", "false")
        for deadline in ("auto", "none")
    },
    "elite": ["exchange={elite: {every_samples: 32}}", "data.validation=0.05", REPLICAS],
    "tournament": [
        "exchange={elite: {every_samples: 32, mode: tournament}}",
        "data.validation=0.05",
        "layout={replicas: 4}",
    ],
    "none": ["exchange=none", REPLICAS],
    "async": ["pipeline=async", "layout={swarms: [{layers: 2, rows: 2}, {layers: 1, rows: 2}]}"],
}
GOSSIP = [name for name in APART if name.startswith("gossip")]
EVERYWHERE = ["forward", "after_update", "open", "merge", "finish", "settle", "average", "shown", "become", "collect"]
WHERE = {
    **dict.fromkeys(GOSSIP[1:], EVERYWHERE),
    GOSSIP[0]: [*EVERYWHERE, "divide"],
    "elite": ["compare", "become", "evaluate", "collect"],
    "tournament": ["adopt", "reports"],
    "none": ["update", "report", "reports", "shown", "become", "collect"],
    "async": ["forward", "backward", "update", "reports", "evaluate"],
}
SOME = [
    (GOSSIP[0], "open", "mpich"), (GOSSIP[1], "finish", "openmpi"), (GOSSIP[2], "settle", "mpich"),
    (GOSSIP[3], "merge", "mpich"), ("elite", "compare", "mpich"), ("tournament", "adopt", "openmpi"),
    ("none", "shown", "mpich"), ("async", "backward", "mpich"),
]  # fmt: skip
ALL = [(mode, phase, mpi) for mode, phases in WHERE.items() for phase in phases for mpi in BOTH]


@pytest.mark.parametrize(
    ("mode", "phase", "mpi"),
    [pytest.param(*case, marks=() if case == SOME[1] else slow if case in SOME else long) for case in ALL],
)
def test_a_raising_rank_ends_replicas_that_wait_for_nobody(
    mpirun: Callable[..., Run], tmp_path: Path, config: Path, mode: str, phase: str, mpi: str
) -> None:
    changes = [word for change in APART[mode] for word in ("--set", change)]
    run = [config, "--output", tmp_path / "run", *SHORT, *changes]
    done = mpirun(4, [HERE / "programs" / "failing.py", phase, "1", *run], mpi=mpi, timeout=60)
    ended_together(done, phase, time.time(), 4)


# What a rank may do other than raise an error, and the exit code of all.
EARLY = {"exit": 3, "kill": None}


@pytest.mark.parametrize(
    ("how", "mpi"),
    [pytest.param("exit", "openmpi", marks=slow), pytest.param("exit", "mpich", marks=slow), ("kill", "mpich")],
)
def test_a_rank_that_ends_early_ends_all(
    mpirun: Callable[..., Run], tmp_path: Path, config: Path, how: str, mpi: str
) -> None:
    changes = [word for change in APART[GOSSIP[0]] for word in ("--set", change)]
    run = [config, "--output", tmp_path / "run", *SHORT, *changes]
    done = mpirun(4, [HERE / "programs" / "failing.py", f"step:{how}", "1", *run], mpi=mpi, timeout=30)
    ended, text = time.time(), f"\n{done.stdout}\n{done.stderr}"
    failed = re.search(r"FAILED AT ([\d.]+)", done.stderr)
    assert failed, text
    assert ended - float(failed[1]) < 2.5, text
    assert done.returncode == EARLY[how] or (how == "kill" and done.returncode != 0), text
    assert "Traceback" not in done.stderr, text
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize(
    ("mode", "mpi"),
    [
        (GOSSIP[0], "openmpi"),
        pytest.param(GOSSIP[3], "mpich", marks=slow),
        pytest.param("async", "mpich", marks=slow),
    ],
)
def test_a_signal_to_one_rank_stops_all_after_the_same_step(
    mpirun: Callable[..., Run], tmp_path: Path, config: Path, mode: str, mpi: str
) -> None:
    changes = [word for change in APART[mode] for word in ("--set", change)]
    run = [config, "--output", tmp_path / "run", *changes, "--set", "train.steps=80", "--set", "train.report_every=7"]
    stopped = mpirun(4, [HERE / "programs" / "failing.py", "step:term", "1", *run], mpi=mpi)
    text = f"\n{stopped.stdout}\n{stopped.stderr}"
    assert stopped.returncode == 75, text
    assert "Traceback" not in stopped.stderr, text
    found = re.search(r"stopped by a signal after step (\d+); continue with --resume", stopped.stdout)
    assert found, text
    step = int(found[1])
    assert 4 <= step < 80
    assert re.findall(r"STEPS (\d+)", stopped.stderr) == [str(step)] * 4, text
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{step:010d}"]
    assert not (tmp_path / "run" / "summary.json").exists()
    resumed = mpirun(4, [*TRAIN, *run, "--resume"], mpi=mpi)
    assert resumed.returncode == 0, resumed.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert (summary["steps"], summary["stopped_by"]) == (80, "steps")
    assert [line["step"] for line in lines if line["step"] > step] == [n for n in (*range(7, 80, 7), 80) if n > step]
    assert summary["final_loss"] < 0.9 * lines[0]["train_loss"]
