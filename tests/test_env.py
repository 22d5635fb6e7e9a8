"""What `env.prepare` chooses, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from ast import literal_eval
from collections.abc import Callable

import pytest

from nettorrent_mpi import cores, env
from nettorrent_mpi.comm.reducers import PIECE, PIECES, pieces_of

PREPARE = "import sys; from nettorrent_mpi.env import prepare; sys.stdout.write(prepare() + '\\n')"
SHOW = "import os; print({k: v for k, v in os.environ.items() if 'NUM_THREADS' in k or 'yield' in k.lower()})"
YIELD = {"OMPI_MCA_mpi_yield_when_idle": "1", "MPIR_CVAR_ENABLE_HEAVY_YIELD": "1"}
THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
CORES = len({cores._siblings(cpu) for cpu in os.sched_getaffinity(0)})

LAUNCHERS = ("OMPI_", "PMI", "MPI_", "MPIR_", "SLURM", "NETTORRENT")


def python(code: str, **variables: str) -> list[str]:
    """The lines that `code` prints, with nothing but `variables` set of what matters here."""
    bare = {k: v for k, v in os.environ.items() if k not in (*THREADS, *WAITING) and not k.startswith(LAUNCHERS)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env={**bare, **variables}, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def chosen(threads: int) -> dict[str, str]:
    return dict.fromkeys(THREADS, str(threads))


def several(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def test_alone_takes_every_core() -> None:
    line, variables = python(f"{PREPARE}; {SHOW}")
    assert line == f"1 rank on {several(CORES, 'core')} of this node; {several(CORES, 'BLAS thread')} each"
    assert literal_eval(variables) == chosen(CORES)


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "SLURM_STEP_TASKS_PER_NODE"])
def test_more_ranks_than_cores_yield(name: str) -> None:
    ranks = CORES + 1
    line, variables = python(f"{PREPARE}; {SHOW}", **{name: str(ranks)})
    assert line.endswith("; 1 BLAS thread each; waiting ranks yield")
    assert literal_eval(variables) == {**chosen(1), **YIELD}


def test_as_many_ranks_as_cores_do_not_yield() -> None:
    line, variables = python(f"{PREPARE}; {SHOW}", OMPI_COMM_WORLD_LOCAL_SIZE=str(CORES))
    assert line.endswith("; 1 BLAS thread each")
    assert literal_eval(variables) == chosen(1)


def test_omp_num_threads_of_the_user_rules_every_blas() -> None:
    line, variables = python(f"{PREPARE}; {SHOW}", OMP_NUM_THREADS=str(CORES + 5))
    more = f"{CORES + 5} threads on {several(CORES, 'core')}, which slows them down"
    assert line.endswith(f"; kept from the environment: OMP_NUM_THREADS={CORES + 5}; {more}")
    assert literal_eval(variables) == {"OMP_NUM_THREADS": str(CORES + 5)}


@pytest.mark.parametrize("text", ["", "0", "-2", "many", "2.5"])
def test_what_is_no_number_of_threads_is_not_taken_for_one(text: str) -> None:
    """OpenBLAS would start a thread for every CPU of the machine."""
    line, variables = python(f"{PREPARE}; {SHOW}", OMP_NUM_THREADS=text, OMPI_COMM_WORLD_LOCAL_SIZE=str(CORES))
    assert line.endswith(f"; 1 BLAS thread each; no number of threads: OMP_NUM_THREADS={text!r}")
    assert literal_eval(variables) == chosen(1)


def test_threads_of_nested_loops_are_those_of_the_outer_one() -> None:
    line, variables = python(f"{PREPARE}; {SHOW}", OMP_NUM_THREADS="1,4")
    assert line.endswith("; kept from the environment: OMP_NUM_THREADS=1,4")
    assert literal_eval(variables) == {"OMP_NUM_THREADS": "1,4"}
    assert python(f"{PREPARE}; {SHOW_WAITING}", OMP_NUM_THREADS="1,4")[1] == "[None, None]"
    assert python(f"{PREPARE}; {SHOW_WAITING}", OMP_NUM_THREADS="4,1")[1] == "['passive', '4']"


WAITING = ("OMP_WAIT_POLICY", "OPENBLAS_THREAD_TIMEOUT")
SHOW_WAITING = f"import os; print([os.environ.get(name) for name in {WAITING}])"


def test_threads_that_have_nothing_to_do_sleep() -> None:
    assert python(f"{PREPARE}; {SHOW_WAITING}", OMP_NUM_THREADS="3")[1] == "['passive', '4']"
    assert python(f"{PREPARE}; {SHOW_WAITING}", OMP_NUM_THREADS="1")[1] == "[None, None]"
    assert python(f"{PREPARE}; {SHOW_WAITING}", OMP_NUM_THREADS="3", OMP_WAIT_POLICY="active")[1] == "['active', '4']"
    assert python(f"{PREPARE}; {SHOW_WAITING}", OMPI_COMM_WORLD_LOCAL_SIZE=str(CORES))[1] == "[None, None]"
    given = "import os; from nettorrent_mpi.env import given; before = dict(os.environ)"
    assert python(f"{given}; {PREPARE}; print(given(os.environ) == before)", OMP_NUM_THREADS="3")[1] == "True"


def test_what_the_user_set_is_kept() -> None:
    mine = {"OPENBLAS_NUM_THREADS": "7", "OMPI_MCA_mpi_yield_when_idle": "0"}
    line, variables = python(f"{PREPARE}; {SHOW}", OMPI_COMM_WORLD_LOCAL_SIZE="999", **mine)
    assert line.endswith("yield; kept from the environment: OPENBLAS_NUM_THREADS=7 OMPI_MCA_mpi_yield_when_idle=0")
    assert literal_eval(variables) == {**chosen(1), **YIELD, **mine}


def test_a_second_call_and_a_child_choose_anew() -> None:
    child = f"import os, subprocess, sys; os.environ['MPI_LOCALNRANKS'] = '999'; {PREPARE}; {SHOW}"
    code = f"{PREPARE}; {PREPARE}; import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    lines = python(f"import sys; sys.stdout.reconfigure(line_buffering=True); {code}")
    assert lines[0] == lines[1]
    assert lines[2].startswith("999 ranks")
    assert "kept" not in lines[2]
    assert literal_eval(lines[3])["OMP_NUM_THREADS"] == "1"


def test_numpy_that_is_loaded_already_is_told() -> None:
    assert "too late for NumPy" in python(f"import numpy; {PREPARE}")[0]
    assert "too late" not in python(f"{PREPARE}; import numpy")[0]


def test_a_rank_bound_to_one_core_knows_the_others() -> None:
    """Its parent, here as under mpirun, is not bound."""
    bind = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"
    line = python(f"{bind}; {PREPARE}", OMPI_COMM_WORLD_LOCAL_SIZE="2")[0]
    assert line.startswith(f"2 ranks on {several(CORES, 'core')} of this node; 1 BLAS thread each")
    assert python(f"{bind}; {PREPARE}")[0] == "1 rank on 1 core of this node; 1 BLAS thread each"


def test_threads_reach_blas() -> None:
    pools = "import numpy, threadpoolctl; print([p['num_threads'] for p in threadpoolctl.threadpool_info()])"
    assert literal_eval(python(f"{PREPARE}; {pools}", OMPI_COMM_WORLD_LOCAL_SIZE=str(CORES))[1]) == [1]


def test_loads_nothing() -> None:
    code = "import sys, nettorrent_mpi.env; print(sorted({'numpy', 'mpi4py', 'yaml', 'rich'} & set(sys.modules)))"
    assert python(code) == ["[]"]


@pytest.mark.parametrize(
    ("environ", "one"),
    [
        ({}, True),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_SIZE": "8", "SLURM_STEP_NUM_NODES": "2"}, True),
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "1", "PMIX_RANK": "3"}, True),
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "2", "PMIX_RANK": "3"}, False),
        ({"PMIX_RANK": "3"}, False),  # a launcher that tells nothing more
    ],
)
def test_who_knows_that_there_is_one_node(environ: dict[str, str], one: bool) -> None:
    assert env.on_one_node(environ) == one


def test_one_node_needs_no_network() -> None:
    show = f"{PREPARE}; import os; print(os.environ.get('OMPI_MCA_btl'))"
    alike = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    assert python(show, **alike)[1] == "^ofi"
    assert python(show, **{**alike, "OMPI_COMM_WORLD_SIZE": "4"})[1] == "None"
    assert python(show, **alike, OMPI_MCA_btl="self,tcp")[1] == "self,tcp"


def test_pieces_of_gradients_are_sent_between_nodes_without_asking_first() -> None:
    name = "OMPI_MCA_btl_tcp_eager_limit"
    show = f"{PREPARE}; import os; print(os.environ.get({name!r}))"
    alike = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    largest = max(size // pieces_of([size // 4], 4) for size in range(PIECE, PIECES * PIECE + 1, PIECE // 4))
    assert largest < 2 * PIECE < int(python(show, **alike)[1]) - 64  # MPI's header
    assert python(show, **{**alike, "OMPI_COMM_WORLD_SIZE": "2"})[1] == "None"
    assert python(show, **alike, **{name: "4096"})[1] == "4096"


@pytest.mark.parametrize("mpi", [pytest.param("openmpi", marks=pytest.mark.slow), "mpich"])
def test_under_a_launcher(mpirun: Callable[..., subprocess.CompletedProcess[str]], mpi: str) -> None:
    unset = dict.fromkeys(THREADS)
    done = mpirun(CORES + 1, ["-c", PREPARE], mpi=mpi, env=unset)
    assert done.returncode == 0, done.stderr
    expected = f"{CORES + 1} ranks on {several(CORES, 'core')} of this node; 1 BLAS thread each; waiting ranks yield"
    assert done.stdout.splitlines() == [expected] * (CORES + 1)
