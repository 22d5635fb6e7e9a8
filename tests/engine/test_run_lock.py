"""A folder has one run at a time, and does not wait for one that was killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nettorrent_mpi.engine import run_lock
from nettorrent_mpi.engine.run_lock import LOCK, RunLock
from nettorrent_mpi.plan.errors import NetTorrentWarning, OutputError

HOLD = """
import sys, time
from pathlib import Path
from nettorrent_mpi.engine.run_lock import RunLock
RunLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds tmp_path / "run"."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A lock of another machine, refreshed just now; an owner that is gone is known by its silence of a second."""
    monkeypatch.setattr(run_lock, "STALE", 1.0)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    folder = tmp_path / "run"
    folder.mkdir()
    owner = run_lock._this_process() | {"host": "another", "boot": "another"}
    (folder / LOCK).write_text(json.dumps(owner))
    return folder


def test_a_lock_comes_and_goes(tmp_path: Path) -> None:
    with RunLock(tmp_path / "run"):
        owner = json.loads((tmp_path / "run" / LOCK).read_text())
        assert owner["pid"] == os.getpid()
        RunLock(tmp_path / "run").release()  # of the same process: not in its way, and not the one that removes it
        assert (tmp_path / "run" / LOCK).exists()
    assert not (tmp_path / "run").exists()  # as nothing was written
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file is a file, not a folder"):
        RunLock(tmp_path / "file")


def test_a_running_process_keeps_the_folder(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(OutputError, match=rf"run is in use by another run \(process {holder.pid} on .*--output DIR"):
        RunLock(tmp_path / "run")
    assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == holder.pid


def test_a_killed_process_does_not(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with RunLock(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == os.getpid()
    assert not list((tmp_path / "run").iterdir())


def test_a_number_that_another_process_has_by_now(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(json.dumps(run_lock._this_process() | {"started": "1"}))
    RunLock(tmp_path).release()


def test_a_link_to_nothing_is_no_lock(tmp_path: Path) -> None:
    (tmp_path / LOCK).symlink_to(tmp_path / "nothing")
    with RunLock(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
        assert not (tmp_path / LOCK).is_symlink()


def test_silence_elsewhere_is_waited_for(elsewhere: Path) -> None:
    began = time.monotonic()
    with pytest.warns(NetTorrentWarning, match=r"waiting for a sign of life of another run \(process \d+ on another"):
        RunLock(elsewhere).release()
    assert 0.5 < time.monotonic() - began < 10
    (elsewhere / LOCK).write_text("")  # killed while it made its lock
    os.utime(elsewhere / LOCK, (0, 0))
    RunLock(elsewhere).release()  # at once, as it is old


def test_a_sign_of_life_from_elsewhere(elsewhere: Path) -> None:
    refresh = threading.Timer(0.3, lambda: os.utime(elsewhere / LOCK))
    refresh.start()
    with pytest.warns(NetTorrentWarning), pytest.raises(OutputError, match="is in use by another run"):
        RunLock(elsewhere)
    refresh.join()


def test_a_requeued_job_waits_for_nobody(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "STALE", 1000.0)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    RunLock(elsewhere).release()


def test_a_rank_waits_for_no_lost_one_of_its_run(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "STALE", 1000.0)
    owner = json.loads((elsewhere / LOCK).read_text())
    (elsewhere / LOCK).write_text(json.dumps(owner | {"run": "1a2b"}))
    RunLock(elsewhere, "1a2b").release()


def test_a_lock_is_refreshed_and_its_loss_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "REFRESH", 0.05)
    path = tmp_path / LOCK
    with RunLock(tmp_path) as lock:
        os.utime(path, (0, 0))
        wait_until(lambda: path.stat().st_mtime > 1e9)
        path.unlink()
        wait_until(path.exists)
        lock.check()
        path.write_text(json.dumps(run_lock._this_process() | {"host": "another"}))
        wait_until(lambda: lock._lost)
        with pytest.raises(OutputError, match="another run has taken over"):
            lock.check()
    assert path.exists()


def wait_until(condition: object) -> None:
    assert callable(condition)
    for _ in range(100):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("in vain")


@pytest.mark.slow
def test_a_second_run_leaves_the_first_alone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train = [sys.executable, "-m", "nettorrent_mpi.train", "--output", str(run)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*train, "--set", "train.epochs=100000"], stdout=subprocess.DEVNULL, env=environment
    ) as first:
        try:
            for _ in range(600):
                if (run / "metrics.jsonl").exists():
                    break
                time.sleep(0.05)
            for option in ("--overwrite", "--resume"):
                done = subprocess.run([*train, option], capture_output=True, text=True, env=environment)
                assert done.returncode == 2, done.stderr
                assert "is in use by another run (process" in done.stderr
                assert len(done.stderr.splitlines()) == 1
            assert first.poll() is None
            assert (run / "config.yaml").read_text().count("epochs: 100000") == 1
        finally:
            first.kill()
    over = [*train, "--overwrite", "--set", "train.epochs=1"]
    done = subprocess.run(over, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert not (run / LOCK).exists()
