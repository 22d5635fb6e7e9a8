"""The cores of a run's ranks are counted from affinity, control groups and Slurm."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nettorrent_mpi import cores

CPUS = sorted(os.sched_getaffinity(0))
CORES = cores.count_cores(set(CPUS))


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("4", [4]),
        ("4(x2),3", [4, 4, 3]),
        ("1,2(x1),3(x3)", [1, 2, 3, 3, 3]),
        ("", []),
        ("4(x2", []),
        ("four", []),
    ],
)
def test_tasks_per_node(text: str, counts: list[int]) -> None:
    assert cores.tasks_per_node(text) == counts


@pytest.mark.parametrize(
    ("environ", "ranks"),
    [
        ({}, 1),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "3", "SLURM_STEP_TASKS_PER_NODE": "8"}, 3),
        ({"MPI_LOCALNRANKS": "5"}, 5),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_NODEID": "1"}, 4),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_NODEID": "2"}, 3),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_NODEID": "9"}, 1),
        ({"SLURM_TASKS_PER_NODE": "64", "SLURM_NODEID": "0"}, 1),  # in the batch shell, not under srun
    ],
)
def test_ranks_on_node(environ: dict[str, str], ranks: int) -> None:
    assert cores.ranks_on_node(environ) == ranks


def test_a_slurm_job_counts_its_own_cpus() -> None:
    assert cores.cores_of_node({"SLURM_CPUS_ON_NODE": "1"}) == 1
    assert cores.cores_of_node({"SLURM_CPUS_ON_NODE": "100000"}) == CORES


# -- control groups ----------------------------------------------------------------------------------------------------

V1 = "33 29 0:28 {root} {place} rw,relatime shared:12 - cgroup cgroup rw,cpu,cpuacct"
V2 = "35 24 0:30 {root} {place} rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate"
OTHER = "36 29 0:31 / {place}/memory rw - cgroup cgroup rw,memory"
QUOTA, PERIOD, MAX = "cpu.cfs_quota_us", "cpu.cfs_period_us", "cpu.max"

# Which control groups this process is in, which are mounted from which root, what their files hold; what is allowed.
GROUPS = {
    "version 1": ("4:cpu,cpuacct:/job/step", V1, "/", {f"job/{QUOTA}": 250000, f"job/{PERIOD}": 100000}, 2.5),
    "version 1, no limit": ("4:cpu,cpuacct:/job", V1, "/", {f"job/{QUOTA}": -1, f"job/{PERIOD}": 100000}, math.inf),
    "version 1, a container": (
        "5:memory:/docker/ab\n4:cpu,cpuacct:/docker/ab", V1, "/docker/ab", {QUOTA: 50000, PERIOD: 100000}, 0.5,
    ),
    "version 2": ("0::/job/step", V2, "/", {f"job/step/{MAX}": "max 100000", f"job/{MAX}": "400000 100000"}, 4.0),
    "version 2, no limit": ("0::/job", V2, "/", {f"job/{MAX}": "max 100000"}, math.inf),
    "version 2, a container": ("0::/", V2, "/", {MAX: "300000 200000"}, 1.5),
    "version 2, seen from inside": ("0::/../../other", V2, "/", {MAX: "100000 100000"}, 1.0),
    "both, the limit is version 1's": (
        "2:cpu:/job\n0::/", f"{V2}/unified\n{V1}", "/", {f"job/{QUOTA}": 100000, f"job/{PERIOD}": 100000}, 1.0,
    ),
    "damaged": ("4:cpu", V1, "/", {QUOTA: "", PERIOD: 0}, math.inf),
    "none": ("", "22 1 8:1 / / rw - ext4 /dev/sda1 rw", "/", {}, math.inf),
}  # fmt: skip


@pytest.mark.parametrize("case", GROUPS)
def test_time_that_control_groups_allow(tmp_path: Path, case: str) -> None:
    group, mounts, root, files, allowed = GROUPS[case]
    place, proc = tmp_path / "cgroup", tmp_path / "proc"
    for name, text in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(f"{text}\n")
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text(f"{group}\n")
    (proc / "self" / "mountinfo").write_text(f"{OTHER}\n{mounts}\n".format(root=root, place=place))
    assert cores.time_allowed(proc) == allowed


def test_a_machine_without_control_groups(tmp_path: Path) -> None:
    assert cores.time_allowed(tmp_path) == math.inf


@pytest.fixture
def half_a_core_more() -> Iterator[Path]:
    """A control group with time for one and a half cores."""
    for folder, limits in (
        ("/sys/fs/cgroup/cpu", {QUOTA: "150000", PERIOD: "100000"}),
        ("/sys/fs/cgroup", {MAX: "150000 100000"}),
    ):
        group = Path(folder, f"nettorrent-test-{os.getpid()}")
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            for name, text in limits.items():
                (group / name).write_text(text)
            yield group
            return
        except OSError:
            continue
        finally:
            group.rmdir()
    pytest.skip("no control group can be made here: this needs root and the cpu controller")


def test_a_run_in_a_control_group(half_a_core_more: Path) -> None:
    join = f'echo $$ > {half_a_core_more}/cgroup.procs && exec {sys.executable} -c "$0"'
    code = "from nettorrent_mpi.env import prepare; print(prepare())"
    bare = {name: value for name, value in os.environ.items() if "THREADS" not in name and "NETTORRENT" not in name}
    done = subprocess.run(["sh", "-c", join, code], env=bare, capture_output=True, text=True)
    assert done.stdout == "1 rank on 1 core of this node; 1 BLAS thread each\n", done.stderr


# -- affinity ----------------------------------------------------------------------------------------------------------

# A launcher's daemon starts ranks, each below a wrapper; all of them run before the first one counts.
DAEMON = """
import os, sys
from subprocess import PIPE, Popen
environ = {**os.environ, "MPI_LOCALNRANKS": "2"}
code = '''from nettorrent_mpi.env import prepare
print('ready', flush=True); input(); print(prepare(), flush=True); input()'''
wrapped = [["sh", "-c", wrapper, sys.executable, code] for wrapper in sys.argv[1:]]
ranks = [Popen(command, env=environ, stdin=PIPE, stdout=PIPE, text=True, bufsize=1) for command in wrapped]
ready = [rank.stdout.readline() for rank in ranks]
for rank in ranks:
    rank.stdin.write("\\n")
    print(rank.stdout.readline().strip())
for rank in ranks:
    rank.communicate("\\n")
"""
BOUND = 'exec taskset -c {} $0 -c "$1"'
IN_A_SHELL = 'exec taskset -c {} sh -c \'$0 -c "$1"; true\' $0 "$1"'


@pytest.mark.skipif(CORES < 2, reason="needs two cores")
@pytest.mark.parametrize(
    ("wrapper", "cpus", "told"),
    [
        (BOUND, (0, 0), "2 ranks on 1 core of this node; 1 BLAS thread each; waiting ranks yield"),
        (BOUND, (0, 1), "2 ranks on 2 cores of this node; 1 BLAS thread each"),
        (IN_A_SHELL, (0, 1), "2 ranks on 2 cores of this node; 1 BLAS thread each"),
    ],
)
def test_what_wrappers_bind_ranks_to(wrapper: str, cpus: tuple[int, int], told: str) -> None:
    bare = {name: value for name, value in os.environ.items() if "THREADS" not in name and "NETTORRENT" not in name}
    apart = list({cores._siblings(cpu): cpu for cpu in CPUS}.values())
    command = [sys.executable, "-c", DAEMON, *(wrapper.format(apart[cpu]) for cpu in cpus)]
    done = subprocess.run(command, env=bare, capture_output=True, text=True)
    assert done.stdout.splitlines() == [told, told], done.stderr
