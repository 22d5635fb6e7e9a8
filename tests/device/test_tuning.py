"""The trial: the fastest way is found, remembered, and right."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nettorrent_mpi.device import choices
from nettorrent_mpi.device.cpu import onednn, tuning
from nettorrent_mpi.device.cpu.tuning import Tuning


@pytest.fixture
def findings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of findings, in a folder that is not there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tuning._path.cache_clear()
    yield tuning._path()
    tuning._path.cache_clear()


OUT = np.zeros(3)


def slow() -> None:
    time.sleep(0.01)


def quick() -> None:
    pass


def never() -> None:
    raise AssertionError("tried again")


def test_the_fastest_way_is_found_and_remembered(findings: Path) -> None:
    trial = Tuning()
    assert trial.fastest("waiting", {"slow": slow, "quick": quick}, OUT) == "quick"
    assert trial.fastest("waiting", {"slow": never, "quick": never}, OUT) == "quick"  # by this device
    trial = Tuning()
    assert trial.fastest("waiting", {"slow": never, "quick": never}, OUT) == "quick"  # by the file
    assert "quick" in json.loads(findings.read_text())[tuning._subject()].values()
    assert trial.fastest("waiting", {"slow": slow, "slower": lambda: time.sleep(0.02)}, OUT) == "slow"  # other ways


def test_missing_libraries_are_those_that_could_be_installed() -> None:
    assert Tuning("numpy").missing == []  # as the user wanted
    there = {"numba": "Numba", "onednn": "oneDNN"}
    wanted = {"Numba", *(["oneDNN"] if onednn.published() else [])}
    assert set(Tuning().missing) == wanted - {there[name] for name in Tuning().names if name in there}


def test_findings_of_other_versions_do_not_count(findings: Path) -> None:
    Tuning().fastest("waiting", {"slow": slow, "quick": quick}, OUT)
    told = json.loads(findings.read_text())[tuning._subject()]
    for text in (json.dumps({"another": told}), "{", "[]", '{"another": 1}', ""):
        findings.write_text(text)
        assert Tuning().fastest("waiting", {"slow": quick, "quick": slow}, OUT) == "slow"


def test_findings_of_other_settings_are_kept(findings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for threads in ("1", "2", "1"):  # as of runs with more ranks and with fewer
        monkeypatch.setattr(tuning, "_subject", lambda threads=threads: f"{threads} threads")
        before = findings.read_text() if findings.exists() else ""
        again = threads == "1" and "1 threads" in before
        assert Tuning().fastest("waiting", {"slow": slow, "quick": never if again else quick}, OUT) == "quick"
    for other in range(2 * choices.SUBJECTS):
        monkeypatch.setattr(tuning, "_subject", lambda other=other: f"subject {other}")
        Tuning().fastest("waiting", {"slow": quick, "quick": quick}, OUT)
    assert list(json.loads(findings.read_text())) == [
        f"subject {other}" for other in range(choices.SUBJECTS, 2 * choices.SUBJECTS)
    ]


def test_a_way_that_cannot_do_the_size_is_not_chosen(findings: Path) -> None:
    def fail() -> None:
        raise onednn.OneDnnError("no such size")

    assert Tuning().fastest("failing", {"one": fail, "slow": slow}, OUT) == "slow"


@pytest.mark.parametrize("error", [1.0, np.nan, 0.0])
def test_a_way_that_computes_something_else_is_not_chosen(error: float, findings: Path) -> None:
    out = np.zeros((4, 3), np.float32)

    def right() -> None:
        time.sleep(0.01)
        out[...] = np.arange(12).reshape(4, 3)

    def other() -> None:
        out[...] = np.arange(12).reshape(4, 3)
        out[2, 1] += error

    assert Tuning().fastest("computing", {"right": right, "other": other}, out) == ("right" if error else "other")


def test_rows_that_are_not_finite_rule_no_way_out(findings: Path) -> None:
    out = np.zeros(3)

    def right() -> None:
        time.sleep(0.01)
        out[...] = np.nan

    assert Tuning().fastest("computing", {"right": right, "other": lambda: out.fill(np.nan)}, out) == "other"


def test_findings_that_cannot_be_kept_are_found_all_the_same(
    tmp_path: Path, findings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file where the folder would be")
    assert Tuning().fastest("waiting", {"slow": slow, "quick": quick}, OUT) == "quick"


def _choose(tried: Any, answers: Any) -> None:
    def way() -> None:
        tried.put(1)
        time.sleep(0.005)

    answers.put(Tuning().fastest("racing", {"one": way, "other": way}, OUT))


def test_processes_of_a_host_choose_alike(findings: Path) -> None:
    context = multiprocessing.get_context("fork")
    tried, answers = context.Queue(), context.Queue()
    processes = [context.Process(target=_choose, args=(tried, answers)) for _ in range(4)]
    for process in processes:
        process.start()
    found = {answers.get(timeout=30) for _ in processes}
    count = 0
    for process in processes:
        process.join(30)
    while not tried.empty():
        count += tried.get()
    assert len(found) == 1
    assert count == 2 * (1 + tuning.REPEATS), "more than one of them tried"


CACHES = """
import json, resource, sys
from pathlib import Path
import numpy as np
from nettorrent_mpi.device.cpu.loop import Loop
from nettorrent_mpi.device.cpu.tuning import Tuning

def double(x):
    for i in range(x.size):
        x[i] *= 2

def check():
    x = np.arange(3.0)
    Loop(double)(x)
    assert x.tolist() == [0, 2, 4]
    assert Tuning().fastest("adding", {"one": lambda: x.fill(1), "two": lambda: x.fill(1)}, x) in ("one", "two")

folder, (soft, hard) = Path(sys.argv[1]), resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))  # nothing longer can be written, as on a full disk
check()
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
check()
kept = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size > 20]
assert {path.suffix for path in kept} == {".nbi", ".nbc", ".json"}, kept
for path in kept:
    path.write_bytes(path.read_bytes()[:15])
check()
"""


@pytest.mark.skipif(find_spec("numba") is None, reason="needs Numba")
def test_caches_that_cannot_be_written_or_are_damaged(tmp_path: Path) -> None:
    program = tmp_path / "caches.py"  # Numba keeps code of functions in files only
    program.write_text(CACHES)
    places = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, str(program), str(tmp_path / "cache")]
    done = subprocess.run(command, env={**os.environ, **places}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
