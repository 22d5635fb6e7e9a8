"""What a run loads before its first step. Loading takes most of the time until then, on every rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nettorrent_mpi.comm.library import LATE

# What rank 0 alone reads a command line and a configuration with, and shows progress with.
READS = {
    "pydantic", "yaml", "importlib.metadata", "argparse", "difflib", "statistics",
    "nettorrent_mpi.cli.arguments", "nettorrent_mpi.cli.progress", "nettorrent_mpi.config.reading",
    "nettorrent_mpi.config.settings",
    "nettorrent_mpi.config.translation", "nettorrent_mpi.config.written",
}  # fmt: skip
CHECKS = {"pydantic", "yaml", "importlib.metadata"}
NEVER = {"rich", "h5py", "matplotlib", "subprocess", "multiprocessing", "asyncio"}  # before there is a use for it
# Parts of the package that a training on CPU cores has no use for, unless it is asked for gossip or may lose ranks.
OTHERS = {
    "nettorrent_mpi.device.gpu", "nettorrent_mpi.engine.device_pipeline",
    "nettorrent_mpi.engine.device_batches", "nettorrent_mpi.plan.launches", "nettorrent_mpi.exchange.gossip",
    "nettorrent_mpi.engine.safeguard", "nettorrent_mpi.tune", "nettorrent_mpi.doctor", "nettorrent_mpi.speedup",
    "nettorrent_mpi.torch", "nettorrent_mpi.cli.chaos", "nettorrent_mpi.cli.export", "nettorrent_mpi.config.schema",
}  # fmt: skip
MOST_MODULES = 200  # of the package, on a rank other than the first one: there were 212
MOST_MADE = 45  # dataclasses whose methods a rank has made by the end of its first step: fewer than it has not made

# The training, with each rank telling at the end of its first step what it has loaded and made.
PROGRAM = """
import gc
import json
import sys
from nettorrent_mpi import __main__ as entry
from nettorrent_mpi.plan.records import _Fact
def told():
    ours = [module for name, module in sys.modules.items() if name.startswith("nettorrent_mpi")]
    frozen = {each for module in ours for each in vars(module).values() if isinstance(each, type)
              and each.__module__.startswith("nettorrent_mpi") and "__dataclass_fields__" in vars(each)}
    later = [each for each in frozen if isinstance(vars(each)["__dataclass_fields__"], _Fact)]
    return {"modules": list(sys.modules), "ours": len(ours), "made": len(frozen) - len(later), "later": len(later),
            "collecting": gc.isenabled(), "kept": gc.get_freeze_count()}
class Spy:
    def find_spec(self, name, *others):
        if name == "nettorrent_mpi.cli.run":
            self.collecting = gc.isenabled()
spy = Spy()
sys.meta_path.insert(0, spy)
def patched(engine):
    prepare = engine.prepare
    def telling(self, n, *others):
        if n == 1:
            about = told() | {"loading": spy.collecting}
            with open(f"{sys.argv[1]}.{self.world.rank}", "w") as file:
                json.dump(about, file)
        return prepare(self, n, *others)
    engine.prepare = telling
class Patch:  # the training is loaded after the search for garbage was put off
    def find_spec(self, name, *others):
        if name == "nettorrent_mpi.engine.trainer":
            sys.meta_path.remove(self)
            from nettorrent_mpi.engine.engine import Engine
            patched(Engine)
sys.meta_path.insert(0, Patch())
sys.exit(entry.main(["train", "--output", sys.argv[1], "--set", "train.steps=2"]))
"""


@pytest.fixture(scope="module")
def starts(mpirun: Callable[..., subprocess.CompletedProcess[str]], tmp_path_factory: Any) -> list[dict[str, Any]]:
    """Return what each of four ranks has loaded and made when its first step is done."""
    folder = tmp_path_factory.mktemp("start")
    done = mpirun(4, ["-c", PROGRAM, str(folder / "run")])
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"run.{rank}").read_text(encoding="utf-8")) for rank in range(4)]


def test_ranks_load_what_they_need(starts: list[dict[str, Any]]) -> None:
    loaded = [set(each["modules"]) for each in starts]
    assert loaded[0] >= READS
    assert [modules & READS for modules in loaded[1:]] == [set(), set(), set()]
    assert [modules & (NEVER | OTHERS) for modules in loaded] == [set(), set(), set(), set()]
    assert max(each["ours"] for each in starts[1:]) <= MOST_MODULES


def test_ranks_make_the_dataclasses_that_they_use(starts: list[dict[str, Any]]) -> None:
    assert all(0 < each["made"] <= MOST_MADE < each["later"] for each in starts[1:])


def test_modules_load_without_a_search_for_garbage(starts: list[dict[str, Any]]) -> None:
    assert all(not each["loading"] and each["collecting"] for each in starts)
    assert all(each["kept"] > 10_000 for each in starts)  # objects that no later search looks at


def test_a_command_loads_nothing_before_it_is_known() -> None:
    assert not loaded("import nettorrent_mpi.train, nettorrent_mpi.cli.commands") & (
        CHECKS | NEVER | {"numpy", "mpi4py"}
    )


@pytest.mark.parametrize("module", ["config.sections", "engine.setup", "cli.run", "engine.checkpoint", "data.dataset"])
def test_what_a_training_is_made_of_loads_no_checker(module: str) -> None:
    assert not loaded(f"import nettorrent_mpi.{module}") & (CHECKS | NEVER)


@pytest.mark.parametrize(
    "module", ["planning", "cli.dry_run", "engine.memory_estimate", "speedup.command", "cli.run", "cli.evaluate", "api"]
)
def test_mpi_loads_when_there_are_ranks(module: str) -> None:
    assert not loaded(f"import nettorrent_mpi.{module}") & {"mpi4py.MPI"}


def loaded(code: str) -> set[str]:
    """The modules that are there after `code`."""
    command = [sys.executable, "-c", f"{code}; import sys; print(*sys.modules)"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


SLACK = Path("/proc/self/timerslack_ns")
STARTS_MPI = """
import sys
from pathlib import Path
from typing import Any
class Spy:
    def find_spec(self, name, *others):
        if name == "mpi4py.MPI":
            print(Path("/proc/self/timerslack_ns").read_text())
sys.meta_path.insert(0, Spy())
from nettorrent_mpi.comm.library import MPI
MPI.COMM_WORLD
print(Path("/proc/self/timerslack_ns").read_text())
"""


@pytest.mark.skipif(not SLACK.exists(), reason="Linux tells of it")
@pytest.mark.parametrize(("yields", "late"), [("1", True), ("0", False)])
def test_ranks_that_outnumber_cores_sleep_while_mpi_starts(yields: str, late: bool) -> None:
    usual = int(SLACK.read_text())
    environment = {**os.environ, "OMPI_MCA_mpi_yield_when_idle": yields, "OMPI_MCA_btl": "^ofi"}
    command = [sys.executable, "-c", STARTS_MPI]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert [int(word) for word in done.stdout.split()] == [int(LATE * 1e9) if late else usual, usual]
