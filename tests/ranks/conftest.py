"""Runs every test of this folder on all ranks together and gives it one verdict.

All ranks collect the same tests in the same order. After each phase of a test (setup, call, teardown) they exchange
their outcomes, and the worst one counts on every rank; so one rank's failed assert fails the test everywhere, and all
go on to the next test together. Only rank 0 prints, with the tracebacks of all ranks that failed.

A rank that failed may have left the others waiting for its message. It waits a while for their outcome, then prints its
traceback and ends the run; under Open MPI the others print where they stood (MPICH kills them without a signal they
could catch).
"""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from mpi4py import MPI

PATIENCE = float(os.environ.get("RANK_TESTS_PATIENCE", "10"))  # seconds that a rank that failed waits for the others
OUTCOMES = ("passed", "skipped", "failed")  # from the best to the worst

verdicts = MPI.COMM_WORLD.Dup()  # apart from the tests' own messages
rank, size = verdicts.rank, verdicts.size
stderr = 2

settings.register_profile("ranks", derandomize=True, database=None, deadline=None)  # the same examples on all ranks


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    global stderr
    stderr = os.dup(2)  # pytest captures 2 while tests run
    faulthandler.register(signal.SIGTERM, file=stderr, chain=True)
    settings.load_profile("ranks")
    if config.option.basetemp:
        Path(config.option.basetemp).mkdir(parents=True, exist_ok=True)
        config.option.basetemp = f"{config.option.basetemp}/rank{rank}"


@pytest.hookimpl(specname="pytest_configure", trylast=True)
def pytest_configure_silence(config: pytest.Config) -> None:
    """Only rank 0 keeps its terminal."""
    if rank != 0:
        config.pluginmanager.unregister(name="terminalreporter")


def pytest_report_header() -> str:
    return f"{size} ranks, {MPI.Get_library_version().split(',')[0].splitlines()[0]}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests that are for other rank counts."""
    other = [item for item in items if (mark := item.get_closest_marker("ranks")) and size not in mark.args]
    config.hook.pytest_deselected(items=other)
    items[:] = [item for item in items if item not in other]


def pytest_collection_finish(session: pytest.Session) -> None:
    """All ranks have to run the same tests, or they would wait for each other's verdicts for ever."""
    views = verdicts.allgather(([item.nodeid for item in session.items], session.testsfailed))
    if any(view != views[0] for view in views):
        pytest.exit(f"the ranks collected different tests: {views}", returncode=1)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    codes = exchange(OUTCOMES.index(report.outcome), report)
    worst = OUTCOMES[max(codes)]
    if worst == "failed":
        texts = verdicts.allgather(text_of(report) if report.failed else None)
        report.longrepr = "\n".join(f"--- rank {r} ---\n{text}" for r, text in enumerate(texts) if text is not None)
        report.sections = []
    elif worst == "skipped" and report.passed:
        report.longrepr = (str(item.path), 0, f"Skipped: skipped on rank {int(np.argmax(codes))}")
    report.outcome = worst
    return report


def exchange(code: int, report: pytest.TestReport) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Every rank's outcome of this phase. Ends the run if this rank failed and the others do not come."""
    codes = np.empty(size, np.int32)
    request = verdicts.Iallgather(np.array([code], np.int32), codes)
    started = time.monotonic()
    while not request.Test():
        if report.failed and time.monotonic() - started > PATIENCE:
            text = f"\n{report.nodeid} failed on rank {rank}; others still wait in it\n{text_of(report)}\n"
            os.write(stderr, text.encode())
            verdicts.Abort(1)
        time.sleep(0.001)  # leaves the core to the ranks that still compute
    return codes


def text_of(report: pytest.TestReport) -> str:
    return "\n".join([report.longreprtext, *(f"{title}:\n{text}" for title, text in report.sections)])


@pytest.fixture
def world() -> Generator[MPI.Intracomm, None, None]:
    """A communicator of all ranks for one test."""
    world = MPI.COMM_WORLD.Dup()
    yield world
    world.Free()


@pytest.fixture
def between_nodes(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Called, it makes engines exchange gradients and weights as between nodes, in messages: as if shared memory had no
    room. True: in several buckets, around rings, however small; False: by MPI's own algorithms."""

    def apart(around: bool) -> None:
        from nettorrent_mpi.comm import reducers, shared
        from nettorrent_mpi.engine import bucket_maker

        monkeypatch.setattr(shared, "room", lambda: 0)
        monkeypatch.setattr(bucket_maker, "FULL", 1000)
        monkeypatch.setattr(reducers, "PIECE", 600)
        monkeypatch.setattr(bucket_maker, "LEAST_SHARD", 100 if around else 1 << 40)

    return apart


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Called with how many ranks each of some hosts has, it makes worlds of that many ranks lie on them."""

    def lie(*counts: int) -> None:
        from nettorrent_mpi.comm import group

        nodes = [sum(counts[:host]) for host, count in enumerate(counts) for _ in range(count)]
        monkeypatch.setattr(group, "_nodes", lambda comm: nodes)

    return lie


@pytest.fixture
def double_precision() -> Iterator[None]:
    """PyTorch makes float64 tensors, the same ones in every test, and computes in one thread."""
    torch = pytest.importorskip("torch")
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    torch.manual_seed(3)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def world_size() -> int:
    return size


@pytest.fixture
def shared_path(tmp_path: Path) -> Path:
    """One empty folder, the same on all ranks."""
    return Path(verdicts.bcast(str(tmp_path), root=0))


@pytest.fixture(autouse=True)
def no_host_device_is_left() -> Iterator[None]:
    """Let a test that installs the host device (tests/gpu/host/main.py) leave none behind: `device: auto` would take
    it."""
    from nettorrent_mpi.comm import nccl
    from nettorrent_mpi.device import gpu, visible

    before = visible.look, gpu.open_runtime, nccl.open_library
    yield
    visible.look, gpu.open_runtime, nccl.open_library = before
