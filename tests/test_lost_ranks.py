"""A training goes on when ranks die, under Open MPI with `mpirun --with-ft ulfm`: real processes, killed by SIGKILL."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
LOSING = HERE / "programs" / "losing.py"
PATIENCE = 120  # seconds
Run = subprocess.CompletedProcess[str]
slow, long = pytest.mark.slow, pytest.mark.long

CONFIG = """\
data: {name: digits, validation: 0.2}
model:
  layers:
    - flatten
    - linear: {units: 24, activation: relu}
    - linear: {units: 16, activation: relu}
    - linear: {units: 10}
train: {steps: 40, batch_size: 36, micro_batches: 2, report_every: 5, optimizer: {adam: {lr: 0.01}}}
dtype: float64
redundancy: {buddy: {every_steps: 10}}
"""
ROWS = "layout={swarms: [{layers: 3, rows: 4}]}"
COLS = "layout={swarms: [{layers: 2, rows: 1, cols: 2}, {layers: 1, rows: 2}]}"
STAGES = "layout={swarms: [{layers: 1}, {layers: 1, rows: 2}, {layers: 1}]}"
SPLIT = "pipeline=zero_bubble"
FIVE = "layout={swarms: [{layers: 2, rows: 1, cols: 2}, {layers: 1, rows: 3}]}"
REPLICAS = "layout={replicas: 2, swarms: [{layers: 2}, {layers: 1}]}"
MEMORY = "memory"


class Ended(NamedTuple):
    """An Ended run, its program and its folder."""

    done: Run
    folder: Path

    @property
    def summary(self) -> dict[str, Any]:
        text = (self.folder / "summary.json").read_text()
        return dict(json.loads(text))

    @property
    def steps(self) -> list[int]:
        """The steps of the lines of metrics.jsonl."""
        return [json.loads(line)["step"] for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    @property
    def weights(self) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        with h5py.File(self.folder / "model.h5") as file:
            file["parameters"].visititems(
                lambda name, item: found.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None
            )
        return found


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return path


Lose = Callable[..., Ended]


@pytest.fixture
def lose(mpirun: Callable[..., Run], tmp_path: Path, config: Path) -> Lose:
    """lose(ranks, deaths, *changes): trains on so many ranks, of which some die, to the end."""

    def run(ranks: int, deaths: str, *changes: str) -> Ended:
        folder = tmp_path / "run"
        words = [word for change in changes for word in ("--set", change)]
        done = mpirun(ranks, [LOSING, deaths, config, "--output", folder, *words], mpi="ulfm", timeout=PATIENCE)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr, done.stderr
        assert (folder / "summary.json").exists(), f"{done.stdout}\n{done.stderr}"
        return Ended(done, folder)

    return run


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """The run of one rank, which nothing happens to."""
    folder = tmp_path_factory.mktemp("serial")
    (folder / "config.yaml").write_text(CONFIG)
    command = [sys.executable, "-m", "nettorrent_mpi.train", folder / "config.yaml", "--output", folder / "run"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    return Ended(done, folder / "run")


def goes_on(ended: Ended, serial: Ended, ranks: int, *lost: list[int]) -> list[dict[str, Any]]:
    """Assert that the run lost these ranks, one list for each failure, and has come to the serial run's weights all
    the same; return what its summary says about the failures."""
    failures = list(ended.summary["failures"])
    text = f"{failures}\n{ended.done.stdout}\n{ended.done.stderr}"
    assert [failure["lost"] for failure in failures] == list(lost), text
    assert failures[-1]["left"] == ended.summary["world_size"] == ranks, text
    about = json.loads((ended.folder / "run.json").read_text())
    assert (about["after"], about["ranks"]) == (failures[-1]["resumed_from"], ranks), text
    assert "lost after step" in about["lost"], text
    assert ended.steps == serial.steps, text
    for name, wanted in serial.weights.items():
        np.testing.assert_allclose(ended.weights[name], wanted, rtol=1e-10, atol=1e-12, err_msg=text)
    for failure in failures:
        if failure["source"] == MEMORY:
            assert 0 <= failure["step"] - failure["resumed_from"] <= 11, text
    return failures


@pytest.mark.parametrize(
    ("ranks", "deaths", "changes", "left", "lost"),
    [
        pytest.param(4, "0:forward:57", [STAGES], 3, [[0]], id="the first rank, of a pipeline"),
        pytest.param(4, "3:weights:23", [STAGES, SPLIT], 3, [[3]], id="the last rank, of split passes", marks=slow),
        pytest.param(
            4, "0:inputs:1,1:weights:58", [STAGES, SPLIT], 2, [[0], [1]], id="two of split passes", marks=long
        ),
        pytest.param(4, "3:reduce:17,2:update:33", [ROWS], 2, [[3], [2]], id="two of a team's rows", marks=long),
        pytest.param(4, "1:backward:33", [COLS], 3, [[1]], id="a col", marks=long),
        pytest.param(4, "2:gather:13", [REPLICAS], 3, [[2]], id="of an exact replica", marks=long),
    ],
)
def test_an_exact_training_goes_on(
    lose: Lose, serial: Ended, ranks: int, deaths: str, changes: list[str], left: int, lost: list[list[int]]
) -> None:
    failures = goes_on(lose(ranks, deaths, *changes), serial, left, *lost)
    assert all(failure["source"] == MEMORY for failure in failures), failures


@pytest.mark.parametrize(
    ("every", "ranks", "deaths", "changes", "left", "lost"),
    [
        pytest.param(1, 4, "0:forward:57", [STAGES], 3, [[0]], id="1 stages", marks=slow),
        pytest.param(1, 4, "1:copy:9", [ROWS], 3, [[1]], id="1 copying", marks=long),
        pytest.param(1, 4, "2:finish:9", [COLS], 3, [[2]], id="1 waiting", marks=long),
        pytest.param(5, 4, "3:update:18,2:backward:50", [ROWS], 2, [[3], [2]], id="5 two", marks=long),
        pytest.param(5, 4, "0:copy:4,1:gather:30", [STAGES], 2, [[0], [1]], id="5 copying", marks=long),
        pytest.param(5, 4, "0:gather:18,3:refresh:2", [COLS], 2, [[0, 3]], id="5 before the first copies", marks=long),
    ],
)
def test_at_most_the_steps_of_an_interval_are_lost(
    lose: Lose, serial: Ended, every: int, ranks: int, deaths: str, changes: list[str], left: int, lost: list[list[int]]
) -> None:
    """A copy that has come in part only, when its rank died, is not taken for a complete one."""
    ended = lose(ranks, deaths, f"redundancy={{buddy: {{every_steps: {every}}}}}", *changes)
    for failure in goes_on(ended, serial, left, *lost):
        assert failure["source"] == MEMORY
        assert failure["step"] - failure["resumed_from"] <= every, failure


@long
def test_a_state_that_is_lost_with_its_copy_begins_again(lose: Lose, serial: Ended) -> None:
    """Both buddies of some blocks die before there are copies anew."""
    ended = lose(5, "0:gather:18,4:refresh:2", FIVE)
    assert goes_on(ended, serial, 3, [0, 4])[0]["source"] == "the beginning"


APART = "layout={replicas: 2, swarms: [{layers: 2}, {layers: 1}]}"
ALONE = "layout={replicas: 4}"


@pytest.mark.parametrize(
    ("deaths", "changes", "replicas", "lost"),
    [
        pytest.param("0:exchange:9,2:forward:41", [ALONE, "exchange={gossip: {}}"], 2, 2, id="gossip", marks=slow),
        pytest.param("1:merge:9", [ALONE, "exchange={gossip: {deadline: none}}"], 3, 1, id="patient", marks=long),
        pytest.param(
            "1:average:2",
            [ALONE, "exchange={gossip: {exact_every: 6, slow_momentum: 0.5}}"],
            3,
            1,
            id="average",
            marks=long,
        ),
        pytest.param(
            "3:exchange:11", [APART, "exchange={gossip: {deadline: none, exact_every: 5}}"], 1, 1, id="patient stages"
        ),
        pytest.param("0:backward:33", [APART, "exchange={gossip: {}}"], 1, 1, id="stages", marks=long),
        pytest.param("3:inputs:33", [APART, SPLIT, "exchange={gossip: {}}"], 1, 1, id="split passes", marks=long),
        pytest.param("1:calibrate:1", [ALONE, "exchange={gossip: {part: auto}}"], 3, 1, id="calibration", marks=long),
        pytest.param("1:become:1", [ALONE, "exchange={elite: {every_samples: 300}}"], 3, 1, id="elite", marks=long),
        pytest.param("2:compare:1", [APART, "exchange={elite: {every_samples: 300}}"], 1, 1, id="judged", marks=long),
        pytest.param("0:gather:13", [ALONE, "exchange=none"], 3, 1, id="none", marks=long),
        pytest.param("3:evaluate:1", [ALONE, "exchange={gossip: {}}"], 3, 1, id="evaluation", marks=long),
    ],
)
def test_other_replicas_lose_no_step(lose: Lose, deaths: str, changes: list[str], replicas: int, lost: int) -> None:
    ended = lose(4, deaths, *changes)
    failures = ended.summary["failures"]
    text = f"{failures}\n{ended.done.stdout}\n{ended.done.stderr}"
    assert sum(len(failure["lost"]) for failure in failures) == lost, text
    assert all(failure["resumed_from"] == failure["step"] for failure in failures), text
    assert all(failure["source"] == MEMORY for failure in failures), text
    assert f"{replicas} replica{'s' if replicas > 1 else ''} x" in ended.summary["layout"], text
    assert ended.steps[-1] == 40, text
    assert ended.summary["test_accuracy"] > 0.3, text


@slow
def test_rank_0_of_the_survivors_shows_what_is_shown_once(
    mpirun: Callable[..., Run], tmp_path: Path, config: Path
) -> None:
    changes = ("train.optimizer={sgd: {lr: 5000}}", "train.clip_norm=1", "layout={swarms: [{layers: 3, rows: 3}]}")
    words = [word for change in changes for word in ("--set", change)]
    command = [LOSING, "0:forward:9", config, "--output", tmp_path / "run", *words]
    done = mpirun(3, command, mpi="ulfm", timeout=PATIENCE)
    text = f"{done.stdout}\n{done.stderr}"
    assert "rank 0 was lost" in done.stdout, text
    assert done.stderr.count("nettorrent: warning: the training loss is") == 1, text


THREE = "layout={replicas: 3, swarms: [{layers: 2}, {layers: 1}]}"


@pytest.mark.parametrize(
    ("ranks", "deaths", "changes", "lost", "left_out", "replicas"),
    [
        pytest.param(6, "1:exchange:9,4:forward:60", [THREE, "exchange={gossip: {}}"], [[1], [4]], [[0], []], [2, 1],
                     id="gossip, with the first rank", marks=slow),
        pytest.param(6, "3:forward:20,4:step:30", [THREE, "exchange={elite: {every_samples: 300}}"], [[3], [4]],
                     [[2], []], [2, 1], id="elite", marks=long),
        pytest.param(6, "5:step:12,1:step:25", [THREE, "exchange=none"], [[5], [1]], [[4], []], [2, 1], id="none",
                     marks=long),
        pytest.param(5, "0:step:12,3:step:25", ["layout={replicas: 5}", "exchange={gossip: {}}"], [[0], [3]], [[], []],
                     [4, 3], id="replicas of one rank", marks=long),
        pytest.param(6, "1:step:12,4:take:1", [THREE, "exchange={gossip: {}}"], [[1, 4]], [[]], [1],
                     id="it gets one again", marks=long),
        pytest.param(6, "1:step:12,2:take:1", [THREE, "exchange={gossip: {}}"], [[1, 2]], [[]], [1],
                     id="it is the first again", marks=long),
        pytest.param(6, "1:step:12,0:give:1", [THREE, "exchange={gossip: {}}"], [[0, 1]], [[]], [2],
                     id="it is lost", marks=long),
    ],
)  # fmt: skip
def test_live_replicas_stay_as_they_are(
    lose: Lose,
    ranks: int,
    deaths: str,
    changes: list[str],
    lost: list[list[int]],
    left_out: list[list[int]],
    replicas: list[int],
) -> None:
    """None is merged with others so that all ranks have a place: one that has none leaves, and is told of."""
    ended = lose(ranks, deaths, *changes, "checkpoint={every_steps: 15}")
    failures = ended.summary["failures"]
    text = f"{failures}\n{ended.done.stdout}\n{ended.done.stderr}"
    assert [failure["lost"] for failure in failures] == lost, text
    assert [failure["left_out"] for failure in failures] == left_out, text
    assert [failure["replicas"] for failure in failures] == replicas, text
    assert [failure["live_replicas"] for failure in failures] == replicas, text
    assert all(failure["resumed_from"] == failure["step"] for failure in failures), text
    assert ended.summary["world_size"] == failures[-1]["left"], text
    assert ended.done.stdout.count("has no place in 2 replicas of 2 and leaves") == sum(map(len, left_out)), text
    assert ended.steps[-1] == 40, text
    assert (ended.folder / "checkpoints" / "step-0000000040").is_dir(), text
    assert not (ended.folder / "lock.json").exists()
    assert ended.summary["test_accuracy"] > 0.3, text


@long
@pytest.mark.parametrize(
    ("deaths", "lost"),
    [
        ("1:setup:1", []),
        ("0:wiring:1", []),
        ("2:data:1", []),
        ("0:begin:1", [[0]]),
        ("0:copy:2", [[0]]),
        ("2:report:3", [[2]]),
        ("1:evaluate:1", [[1]]),
        ("0:checkpoint:2", [[0]]),
        ("2:summary:1", [[2]]),
        ("0:save:1", [[0]]),
        ("1:close:1", []),
        ("0:free:1", []),
        ("2:step:25,0:shrink:1", [[0, 2]]),
        ("1:step:25,0:restore:1", [[0, 1]]),
        ("0:step:25,3:take:1", [[0, 3]]),
        ("0:step:25,2:refresh:2", [[0, 2]]),
        ("0:step:5,2:step:30,1:step:39", [[0], [2], [1]]),
    ],
)
def test_every_phase_is_survived(lose: Lose, serial: Ended, deaths: str, lost: list[list[int]]) -> None:
    ended = lose(4, deaths, STAGES, "checkpoint={every_steps: 15}")
    assert [failure["lost"] for failure in ended.summary["failures"]] == lost, ended.done.stdout
    for name, wanted in serial.weights.items():
        np.testing.assert_allclose(ended.weights[name], wanted, rtol=1e-10, atol=1e-12)
    assert ended.steps == serial.steps
