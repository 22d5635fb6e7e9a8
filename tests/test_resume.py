"""A run that stopped goes on from its checkpoint, on any number of ranks, to the weights of one that never stopped."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from nettorrent_mpi.cli.runs.run_data import read_run
from nettorrent_mpi.engine.model_file import read_arrays
from tests.checkpoints import whole

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
  loss: {cross_entropy: {class_weights: balanced}}
train: {epochs: 3, batch_size: 32, micro_batches: 3, optimizer: OPTIMIZER, report_every: 4}
"""
OPTIMIZERS = ["{adam: {lr: 0.002}}", "{sgd: {lr: 0.05, momentum: 0.9}}", "{rmsprop: {lr: 0.001, centered: true}}"]
MIXED4 = "{replicas: 1, swarms: [{layers: 1, rows: 1, cols: 2}, {layers: 2, rows: 2, cols: 1}]}"
MIXED = "layout={replicas: 1, swarms: [{layers: 1, rows: 1, cols: 2}, {layers: 2, rows: 1, cols: 1}]}"


# Nothing depends on how fast this machine is, or on how long the run will be.
GOSSIP = "deadline: none, part: 0.25, rate_factor: 1.5"


slow = pytest.mark.slow


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


def command(config: Path, output: Path, *arguments: str | Path, **changes: object) -> list[str]:
    """`train`; `changes` are keys with __ for the dots."""
    sets = [part for key, value in changes.items() for part in ("--set", f"{key.replace('__', '.')}={value}")]
    return ["train", str(config), "--output", str(output), *map(str, arguments), *sets]


@pytest.fixture(scope="module")
def resumed(series: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of each optimizer: a whole run, and one of three parts on other ranks each time."""
    root = tmp_path_factory.mktemp("resumed")
    folders = {optimizer: root / str(i) for i, optimizer in enumerate(OPTIMIZERS)}
    whole, first, second, third = [], [], [], []
    for optimizer, folder in folders.items():
        folder.mkdir()
        config, parts = config_file(folder, optimizer), folder / "parts"
        whole.append(command(config, folder / "whole"))
        first.append(command(config, parts, "--set", MIXED, train__epochs=1))
        second.append(command(config, parts, "--resume", train__epochs=2))
        third.append(command(config, parts, "--resume", parts, layout="auto"))
    series(1, root / "whole", whole)
    series(3, root / "first", first)
    series(2, root / "second", second)
    series(4, root / "third", third, mpi="mpich")
    return folders


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resumed_on_other_ranks(resumed: dict[str, Path], optimizer: str) -> None:
    folder = resumed[optimizer]
    same(trained(folder / "parts"), trained(folder / "whole"))
    whole, told = (
        [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    )
    assert [record["step"] for record in told] == [record["step"] for record in whole]
    assert [record["samples"] for record in told] == [record["samples"] for record in whole]
    np.testing.assert_allclose([r["train_loss"] for r in told], [r["train_loss"] for r in whole], rtol=1e-9)
    times = [record["time"] for record in told]
    assert times == sorted(times)
    assert len(list((folder / "parts" / "checkpoints").iterdir())) == 2


def test_run_json_has_all_parts(resumed: dict[str, Path]) -> None:
    run = read_run(resumed[OPTIMIZERS[0]] / "parts")
    whole, last = run.steps, run.parts[-1].last
    assert whole == last
    epoch = run.about["steps_per_epoch"]
    found = [(part.first, part.last, part.about["ranks"], part.about["ended"]) for part in run.parts]
    assert found == [(1, epoch, 3, "done"), (epoch + 1, 2 * epoch, 2, "done"), (2 * epoch + 1, whole, 4, "done")]
    assert [part.settings["train.epochs"] for part in run.parts[:2]] == ["1", "2"]
    assert run.parts[0].command.startswith("mpirun -n 3 nettorrent train ") or "OPENBLAS" in run.parts[0].command
    assert "-n 4 nettorrent train" in run.parts[-1].command
    assert run.parts[1].about["source"].endswith(f"step-{epoch:010}")
    assert all(part.about["seed"] == int(part.settings["seed"]) for part in run.parts)


@pytest.mark.parametrize("mpi", ["openmpi", pytest.param("mpich", marks=slow)])
def test_stopped_by_a_signal(mpirun: Callable[..., Run], tmp_path: Path, resumed: dict[str, Path], mpi: str) -> None:
    config = config_file(tmp_path)
    run = [config, "--output", tmp_path / "run"]
    stopped = mpirun(3, [HERE / "programs" / "signalled.py", "12", "1", *run], mpi=mpi)
    assert stopped.returncode == 75, f"{stopped.stdout}\n{stopped.stderr}"
    assert re.search(r"stopped by a signal after step (1[3-9]|2\d); continue with --resume", stopped.stdout)
    assert not (tmp_path / "run" / "summary.json").exists()
    assert "Traceback" not in stopped.stderr
    done = mpirun(2, [*TRAIN, *run, "--resume"], mpi=mpi)
    assert done.returncode == 0, done.stderr
    same(trained(tmp_path / "run"), trained(resumed[OPTIMIZERS[0]] / "whole"))


@slow
@pytest.mark.parametrize("mpi", ["openmpi", "mpich"])
def test_replicas_and_a_pipeline_without_flush_are_stopped_by_a_signal(
    mpirun: Callable[..., Run], tmp_path: Path, mpi: str
) -> None:
    """All ranks stop after the same step, though they hear of it while they are in different ones; and go on as if they
    had not."""
    config = config_file(tmp_path)
    how = ["--set", "layout={replicas: 2, swarms: [{layers: 1}, {layers: 2}]}", "--set", "pipeline=async"]
    how += ["--set", f"exchange={{gossip: {{{GOSSIP}, mix: loss, every: 2}}}}", "--set", "kernels=numpy"]
    how += ["--set", "train.evaluate_every=3"]
    run = [config, "--output", tmp_path / "run", *how]
    stopped = mpirun(4, [HERE / "programs" / "signalled.py", "12", "1", *run], mpi=mpi)
    assert stopped.returncode == 75, f"{stopped.stdout}\n{stopped.stderr}"
    told = re.search(r"stopped by a signal after step (\d+); continue with --resume", stopped.stdout)
    assert told, stopped.stdout
    assert 13 <= int(told[1]) < 30
    saved = arrays_of_checkpoint(tmp_path / "run")
    assert {key.split("/")[1] for key in saved if key.startswith("replicas/")} == {"0", "1"}
    done = mpirun(4, [*TRAIN, *run, "--resume"], mpi=mpi)
    assert done.returncode == 0, done.stderr
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))
    assert steps[-1] == 30
    undisturbed = mpirun(4, [*TRAIN, config, "--output", tmp_path / "whole", *how], mpi=mpi)
    assert undisturbed.returncode == 0, undisturbed.stderr
    assert timeless(tmp_path / "run") == timeless(tmp_path / "whole")
    found, expected = trained(tmp_path / "run"), trained(tmp_path / "whole")
    assert all(found[key].tobytes() == array.tobytes() for key, array in expected.items())


def test_what_cannot_be_resumed(series: Callable[..., Any], tmp_path: Path) -> None:
    config = config_file(tmp_path)
    run = command(config, tmp_path / "run", train__epochs=1)

    def refused(told: tuple[int, str, str], words: str) -> None:
        code, *texts = told
        assert code == 2, texts
        errors = [line for line in "".join(texts).splitlines() if line.startswith("nettorrent: error: ")]
        assert len(errors) == 1, texts
        assert words in errors[0]

    resume = [*run, "--resume"]
    without, done, seed, size, another = series(
        2,
        tmp_path / "before",
        [resume, run, [*resume, "--set", "seed=7"], [*resume, "--set", "train.batch_size=16"], run],
        on=True,
    )
    refused(without, "holds no checkpoint")
    assert done[0] == 0, done
    refused(seed, "seed")
    refused(size, "train.batch_size")
    refused(another, "another run's results")
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    harmed, copy = tmp_path / "harmed", tmp_path / "copy"
    shutil.copytree(checkpoint, harmed)
    shutil.copytree(checkpoint, copy)
    os.truncate(harmed / "shard-00000.h5", 1000)
    from_harmed = command(config, tmp_path / "other", "--resume", harmed)
    told = series(2, tmp_path / "after", [from_harmed, [*resume, copy], [*run, "--overwrite"]], on=True)
    refused(told[0], "harmed/shard-00000.h5: is not the file that was written (it has 1,000 of ")
    refused(told[1], "another run's results")
    assert told[2][0] == 0, told


def test_what_is_finished_stays(series: Callable[..., Any], tmp_path: Path) -> None:
    """A resume says from which step; where nothing is left to train, it changes nothing."""
    config, run, early = config_file(tmp_path), tmp_path / "run", tmp_path / "early"
    whole = command(config, run, train__epochs=2)
    reaching = command(config, early, train__epochs=2, train__stop_at="{accuracy: 0.01}")
    _, reached = series(1, tmp_path / "before", [whole, reaching])
    assert "with --resume and a higher train.stop_at.accuracy trains it on" in " ".join(reached[1].split())
    before = {folder: contents(folder) for folder in (run, early)}
    told = series(
        1,
        tmp_path / "again",
        [[*whole, "--resume"], [*whole, "--resume", "auto"], [*reaching, "--resume"], [*reaching, "--resume", "auto"]],
    )
    for (_, first, others), folder in zip(told, (run, run, early, early), strict=True):
        assert f"{folder} is complete after step" in first
        assert ("to train on, raise " + ("train.epochs" if folder == run else "train.stop_at.accuracy")) in first
        assert "nothing is left to train" in first
        assert others == ""
    assert {folder: contents(folder) for folder in (run, early)} == before
    # A run that was killed while it wrote its results has a checkpoint of its last step and no summary.
    (run / "summary.json").unlink()
    completed, longer = series(1, tmp_path / "on", [[*whole, "--resume"], command(config, early, "--resume")])
    assert "resumes after step 20 of 20, from " in completed[1]
    summary = json.loads((run / "summary.json").read_text())
    old = json.loads(before[run]["summary.json"])
    kept = ("steps", "test_accuracy", "test_loss", "final_loss", "stopped_by")
    assert {key: summary[key] for key in kept} == {key: old[key] for key in kept}
    assert "resumes after step 10 of 30, from " in longer[1]
    assert json.loads((early / "summary.json").read_text())["steps"] == 30


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_resume_auto(series: Callable[..., Any], tmp_path: Path) -> None:
    """One command begins a run and goes on with it; what it cannot go on with, it does not replace."""
    config, run = config_file(tmp_path), tmp_path / "run"
    auto = command(config, run, "--resume", "auto", train__epochs=2)
    run.mkdir()
    (run / "config.yaml").write_text("")  # a job that ended before its first checkpoint
    (run / "metrics.jsonl").write_text('{"step": 4}\n')
    begun, going_on, both = series(
        2,
        tmp_path / "series",
        [command(config, run, "--resume", "auto", train__epochs=1), auto, [*auto, "--overwrite"]],
        on=True,
    )
    assert begun[0] == 0
    assert "resumes" not in begun[1]
    assert going_on[0] == 0
    assert "resumes after step 10 of 20, from " in going_on[1]
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [4, 8, 10, 12, 16, 20]
    assert both[0] == 2
    assert "leave one out" in both[1]
    shutil.rmtree(run / "checkpoints")
    ((code, text, _),) = series(2, tmp_path / "lost", [auto], on=True)
    assert code == 2
    assert "another run's results (summary.json, model.h5)" in text


@slow
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


def test_damaged_files(series: Callable[..., Any], tmp_path: Path, resumed: dict[str, Path]) -> None:
    """The older checkpoint takes the place of the newest one, which is named; nothing else is lost."""
    config, run = config_file(tmp_path), tmp_path / "run"
    shutil.copytree(resumed[OPTIMIZERS[0]] / "parts", run)
    older, newest = sorted((run / "checkpoints").iterdir())
    index = newest / "index.h5"
    os.truncate(index, index.stat().st_size - 1000)
    for stale in ("step-0000000025.tmp", "step-0000000005.old"):
        (run / "checkpoints" / stale).mkdir()
        (run / "checkpoints" / stale / "shard-00000.h5").write_text("of a run that was killed")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_bytes("\n".join([*lines, "\0\0\0", '{"step": 31, "ep']).encode())
    results = {name: (run / name).read_bytes() for name in ("model.h5", "summary.json")}
    commands = [
        command(config, run, "--resume", run / "model.h5"),
        command(config, run, "--resume", newest),
        command(config, run, "--resume"),
    ]
    weights, damaged, done = series(2, tmp_path / "series", commands, on=True)
    assert (weights[0], damaged[0], done[0]) == (2, 2, 0), done
    assert re.search(r"error: .*model\.h5: holds no training state", weights[1])
    assert re.search(r"error: .*step-0000000030/index\.h5: is not the file that was written", damaged[1])
    warnings = [line for line in done[1].splitlines() if line.startswith("nettorrent: warning: ")]
    assert len(warnings) == 2, done[1]
    assert "warning" not in done[2]
    assert re.search(r"step-0000000030/index\.h5: is not the .*; going on with step-0000000020 instead", warnings[0])
    assert "metrics.jsonl: 2 lines could not be read" in warnings[1]
    told = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in told] == [json.loads(line)["step"] for line in lines]
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == [older.name, newest.name]
    same(trained(run), trained(resumed[OPTIMIZERS[0]] / "whole"))
    assert results["summary.json"] != (run / "summary.json").read_bytes()


REPLICAS = {
    2: [
        ("{replicas: 2, swarms: [{layers: 3}]}", "1f1b", exchange)
        for exchange in (
            "none",
            "{elite: 96}",
            "{elite: {every_samples: 96, mode: tournament, metric: validation_accuracy}}",
            f"{{gossip: {{{GOSSIP}}}}}",
            f"{{gossip: {{{GOSSIP}, mix: push_sum, probability: 0.7}}}}",
            f"{{gossip: {{{GOSSIP}, exact_every: 3, slow_momentum: 0.5}}}}",
            f"{{gossip: {{{GOSSIP}, average: [parameters, optimizer]}}}}",
            f"{{gossip: {{{GOSSIP}, mix: {{linear: {{target: 40}}}}}}}}",
        )
    ],
    4: [
        ("{replicas: 4, swarms: [{layers: 3}]}", "1f1b", f"{{gossip: {{{GOSSIP}, pairing: ring}}}}"),
        ("{replicas: 4, swarms: [{layers: 3}]}", "1f1b", f"{{gossip: {{{GOSSIP}, pairing: random, mix: push_sum}}}}"),
        ("{replicas: 2, swarms: [{layers: 3, rows: 2}]}", "1f1b", f"{{gossip: {{{GOSSIP}, mix: push_sum}}}}"),
        ("{replicas: 2, swarms: [{layers: 1}, {layers: 2}]}", "async", f"{{gossip: {{{GOSSIP}}}}}"),
        ("{replicas: 1, swarms: [{layers: 1}, {layers: 1, rows: 2}, {layers: 1}]}", "async", "allreduce"),
    ],
}


@slow
@pytest.mark.parametrize("ranks", REPLICAS)
def test_each_replica_goes_on(series: Callable[..., Any], tmp_path: Path, ranks: int) -> None:
    """To the same weights as if it had not stopped, where the layout is the same."""
    config, commands = config_file(tmp_path), []
    for i, (layout, pipeline, exchange) in enumerate(REPLICAS[ranks]):
        how = {"layout": layout, "pipeline": pipeline, "exchange": exchange}
        whole, parts = tmp_path / f"whole{i}", tmp_path / f"parts{i}"
        commands.append(command(config, whole, **how))
        if i == ranks // 2 + 2:  # all that stopping does
            commands.append(command(config, parts, **how, train__epochs=2))
            commands.append(command(config, parts, "--resume", **how))
        else:
            commands.append(command(config, parts, "--resume", whole / "checkpoints" / "step-0000000020", **how))
    series(ranks, tmp_path / "series", commands, mpi="openmpi" if ranks == 2 else "mpich")
    for i, case in enumerate(REPLICAS[ranks]):
        whole, parts = (arrays_of_checkpoint(tmp_path / f"{name}{i}") for name in ("whole", "parts"))
        same(whole, parts)
        same(trained(tmp_path / f"parts{i}"), trained(tmp_path / f"whole{i}"))
        if case[2] != "allreduce":
            assert any(key.startswith("replicas/1/optimizer/m/") for key in whole), case


ALL = "deadline: none, part: 1.0"
BITWISE = {
    "rows": {"layout": "{swarms: [{layers: 3, rows: 2}]}"},
    "async": {"layout": "{swarms: [{layers: 1}, {layers: 2}]}", "pipeline": "async"},
    "withholding": {"exchange": f"{{gossip: {{{ALL}}}}}"},
    "loss, every": {"exchange": f"{{gossip: {{{GOSSIP}, mix: loss, every: 3}}}}"},
    "int8": {"exchange": f"{{gossip: {{{GOSSIP}, compress: int8, every: 2}}}}"},
    "push_sum": {"exchange": f"{{gossip: {{{ALL}, mix: push_sum, probability: 0.7}}}}"},
    "slow momentum": {"exchange": f"{{gossip: {{{GOSSIP}, exact_every: 3, slow_momentum: 0.5}}}}"},
    "optimizer": {"exchange": f"{{gossip: {{{ALL}, average: [parameters, optimizer]}}}}"},
    "consensus": {"exchange": f"{{gossip: {{{GOSSIP}, every: 3, consensus: {{max: 0.0001}}}}}}"},
    "elite": {"exchange": "{elite: 96}"},
    "none": {"exchange": "none"},
}
QUICK = ("rows", "async", "loss, every")


@pytest.mark.parametrize(
    "names", [QUICK, pytest.param([name for name in BITWISE if name not in QUICK], marks=pytest.mark.long)]
)
def test_a_rest_in_between_changes_no_bit(series: Callable[..., Any], tmp_path: Path, names: Sequence[str]) -> None:
    """Neither in the run that goes on, nor in one that is resumed there on the same ranks: where nobody has planned
    it."""
    config, first, second, started = config_file(tmp_path), [], [], {}
    how = {"layout": "{replicas: 2}", "dtype": "float32", "kernels": "numpy", "train__epochs": 2}
    often = {"checkpoint": "{every_seconds: 0.001, every_epochs: null, keep: 100}"}
    for name in names:
        first.append(command(config, tmp_path / f"{name}-whole", **how | BITWISE[name]))
        first.append(command(config, tmp_path / f"{name}-resting", **how | BITWISE[name] | often))
    series(2, tmp_path / "first", first, timeout=200)
    for name in names:
        saved = sorted((tmp_path / f"{name}-resting" / "checkpoints").iterdir())
        steps = [int(path.name.removeprefix("step-")) for path in saved]
        started[name] = next(step for step in steps if step % 10)
        from_there = saved[steps.index(started[name])]
        second.append(command(config, tmp_path / f"{name}-resumed", "--resume", from_there, **how | BITWISE[name]))
    series(2, tmp_path / "second", second, timeout=200)
    for name in names:
        whole = arrays_of_checkpoint(tmp_path / f"{name}-whole") | trained(tmp_path / f"{name}-whole")
        for end in ("resting", "resumed"):
            found = arrays_of_checkpoint(tmp_path / f"{name}-{end}") | trained(tmp_path / f"{name}-{end}")
            assert found.keys() == whole.keys()
            different = [key for key, array in whole.items() if found[key].tobytes() != array.tobytes()]
            assert not different, (name, end)
        told = {end: timeless(tmp_path / f"{name}-{end}") for end in ("whole", "resting", "resumed")}
        assert told["resting"] == told["whole"], name
        assert told["resumed"] == [record for record in told["whole"] if record["step"] > started[name]], name


def timeless(run: Path) -> list[dict[str, Any]]:
    """The records of a run, without its times."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


TIMES = ("time", "samples_per_second", "ranks")


@slow
def test_a_checkpoint_every_second(series: Callable[..., Any], tmp_path: Path) -> None:
    """Ranks whose clocks differ agree on the steps, in a pipeline too."""
    config = config_file(tmp_path)
    how = {"layout": MIXED.removeprefix("layout="), "train__epochs": 2, "train__report_every": 1}
    often = {"checkpoint": "{every_seconds: 0.001, every_epochs: null, keep: 100}"}
    series(3, tmp_path / "series", [command(config, tmp_path / name, **how, **(often if name == "often" else {}))
                                    for name in ("often", "whole")])  # fmt: skip
    same(trained(tmp_path / "often"), trained(tmp_path / "whole"))
    saved = [int(path.name.removeprefix("step-")) for path in (tmp_path / "often" / "checkpoints").iterdir()]
    assert len(saved) > 4
    assert any(step % 10 for step in saved)


def arrays_of_checkpoint(run: Path) -> dict[str, np.ndarray]:
    """Everything in the newest one."""
    return whole(max((run / "checkpoints").iterdir()))


@slow
def test_replicas_go_on_as_others(series: Callable[..., Any], tmp_path: Path) -> None:
    """With another number of replicas, or as one network, a run goes on from the average; and one network's run goes on
    as several replicas. Estimates of compressed messages begin anew: so it need not be the same run, but a good one."""
    config = config_file(tmp_path)
    two, four = "{replicas: 2, swarms: [{layers: 3, rows: 2}]}", "{replicas: 4, swarms: [{layers: 3}]}"
    apart = {"layout": two, "exchange": f"{{gossip: {{{GOSSIP}, probability: 0.2}}}}"}
    exact = {"layout": two, "exchange": "allreduce"}
    packed = {"layout": four, "exchange": "{gossip: {compress: int8, pairing: ring, deadline: none}}"}
    gossip = {"layout": four, "exchange": f"{{gossip: {{{GOSSIP}, pairing: hypercube}}}}"}
    begun = {"apart": apart, "exact": exact, "packed": packed}
    after = [
        ("apart", "gossip", gossip),
        ("apart", "allreduce", {"layout": MIXED4, "exchange": "allreduce"}),
        ("apart", "elite", {"layout": four, "exchange": "{elite: 64}"}),
        ("exact", "gossip", gossip),
        ("packed", "packed", packed),
        ("packed", "none", {"layout": two, "exchange": "none"}),
    ]
    commands = [command(config, tmp_path / name, **how, train__epochs=2) for name, how in begun.items()]
    for name, to, how in after:
        run, still = tmp_path / f"{name}-{to}", tmp_path / f"{name}-{to}-still"
        commands.append(command(config, run, "--resume", tmp_path / name, **how))
        commands.append(command(config, still, "--resume", tmp_path / name, **how, train__epochs=2))
    series(4, tmp_path / "series", commands)
    for name, to, _ in after:
        saved = arrays_of_checkpoint(tmp_path / name)
        average = {key.removeprefix("parameters/"): a for key, a in saved.items() if key.startswith("parameters/")}
        if name != "exact":
            replicas = sorted({key.split("/")[1] for key in saved if key.startswith("replicas/")})
            # A replica's values are its weights and what it withholds from itself until peers know it.
            each = {
                key: [
                    saved[f"replicas/{r}/parameters/{key}"] + saved.get(f"replicas/{r}/exchange/withheld/{key}", 0)
                    for r in replicas
                ]
                for key in average
            }
            assert any(not np.array_equal(arrays[0], arrays[1]) for arrays in each.values())
            for key, array in average.items():
                np.testing.assert_allclose(array, np.mean(each[key], axis=0), rtol=0, atol=1e-14, err_msg=key)
        still = trained(tmp_path / f"{name}-{to}-still")
        for key, array in average.items():  # nothing was left to do: the weights are what was restored
            np.testing.assert_allclose(still[key], array, rtol=0, atol=1e-14, err_msg=key)
        before, now = (json.loads((tmp_path / run / "summary.json").read_text()) for run in (name, f"{name}-{to}"))
        assert now["steps"] == 30
        assert now["final_loss"] < before["final_loss"], (name, to)
        assert now["test_loss"] < before["test_loss"] * 1.1, (name, to)
