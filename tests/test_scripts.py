"""Scripts that use the Python interface: what their failures mean for other ranks, and what planning loads."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product

import pytest

Run = subprocess.CompletedProcess[str]

START = """
import os, sys, time
import nettorrent_mpi as nt
import numpy as np
x, y = np.random.default_rng(0).normal(size=(64, 5)), np.arange(64) % 3
def fail(rank, error):
    if trainer.rank == rank:
        os.write(2, f"FAILED AT {time.time()}\\n".encode())
        raise error
trainer = nt.Trainer([nt.Linear(7, activation="relu"), nt.Linear(3)], (x, y), batch_size=8, report_every=2, epochs=50)
"""
WITH = "with trainer:\n    for record in trainer.train():\n        "
WITHOUT = "for record in trainer.train():\n    "
SCRIPTS = {
    "with": (START + WITH + "fail(1, RuntimeError('made to fail'))", 1),
    "without": (START + WITHOUT + "fail(1, RuntimeError('made to fail'))", 1),
    "a mistake of one rank": (START + WITH + "fail(1, nt.DataError('made to fail'))", 2),
    "at the end": (START + WITH + "pass\n    fail(1, RuntimeError('made to fail'))", 1),
    "exit": (START + WITH + "fail(1, SystemExit(3))", 3),
}


QUICK = [("with", "openmpi"), ("exit", "mpich")]
ONCE = [("without", "mpich"), ("a mistake of one rank", "openmpi"), ("at the end", "mpich")]


@pytest.mark.parametrize(
    ("case", "mpi"),
    [
        pytest.param(*each, marks=() if each in QUICK else pytest.mark.slow if each in ONCE else pytest.mark.long)
        for each in product(SCRIPTS, ["openmpi", "mpich"])
    ],
)
def test_an_error_of_one_rank_ends_all(mpirun: Callable[..., Run], case: str, mpi: str) -> None:
    script, code = SCRIPTS[case]
    done = mpirun(4, ["-c", script], mpi=mpi)
    ended, text = time.time(), f"\n{done.stdout}\n{done.stderr}"
    failed = re.search(r"FAILED AT ([\d.]+)", done.stderr)
    assert failed, text
    assert done.returncode == code, text
    assert ended - float(failed[1]) < 2.5, text
    if case != "exit":
        assert done.stderr.count("made to fail") == 1, text
        assert done.stderr.count("Traceback") == (code == 1), text
    if code == 2:
        assert "nettorrent: error: <string>:9: made to fail (on rank 1)\n" in done.stderr, text


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_errors_that_all_ranks_raise_end_a_trainer_and_not_the_script(mpirun: Callable[..., Run], ranks: int) -> None:
    script = START + (
        "with trainer:\n"
        "    try:\n"
        "        nt.Trainer([nt.Linear(3)], (x, y[1:]))\n"
        "    except nt.UserError as error:\n"
        "        print('told:', error, flush=True)\n"
        "    print('steps:', sum(1 for record in trainer.train(steps=4)), flush=True)\n"
        "with nt.Trainer([nt.Linear(3)], (x, y)) as other:\n"
        "    other.predict(x[:, :1])\n"
    )
    done = mpirun(ranks, ["-c", script])
    text = f"\n{done.stdout}\n{done.stderr}"
    assert done.returncode == 2, text
    assert done.stdout.count("told: x has 64 rows but y has 63") == ranks, text
    assert done.stdout.count("steps: 2") == ranks, text
    (told,) = (line for line in done.stderr.splitlines() if line.startswith("nettorrent: error: "))
    assert told.startswith("nettorrent: error: <string>:18: x has shape"), text
    assert "Traceback" not in done.stderr, text


ALONE = """
import nettorrent_mpi as nt
CODE
"""


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("nt.plan([nt.Linear(3)])", "nettorrent: error: <string>:3: a network needs data"),
        ("raise nt.NonFiniteError(step=1, layer='a', rank=0)", "NonFiniteError: step 1"),
        ("def mine():\n    nt.load('nowhere')\nmine()", "nettorrent: error: <string>:4: nowhere"),
        ("import sys; sys.ps1 = '>'\nnt.plan([nt.Linear(3)])", "UserError: a network needs data"),
    ],
)
def test_a_mistake_in_a_script_is_told_in_one_line(code: str, told: str) -> None:
    """Any other error, and every one where a session is interactive, is Python's own affair."""
    done = subprocess.run([sys.executable, "-c", ALONE.replace("CODE", code)], capture_output=True, text=True)
    mistake = told.startswith("nettorrent")
    assert told in done.stderr
    assert done.returncode == (2 if mistake else 1), done.stderr
    assert done.stderr.count("Traceback") == (not mistake)
    assert not mistake or done.stderr.count("\n") == 1


def test_a_script_that_forgets_to_close_ends_well(mpirun: Callable[..., Run]) -> None:
    done = mpirun(3, ["-c", START + "list(trainer.train(steps=3))\nsome = trainer.train(steps=9)\nnext(some)"])
    assert done.returncode == 0, done.stderr
    assert not done.stderr.strip("\n\0"), done.stderr


PLANNING = """
import sys
import nettorrent_mpi as nt
assert not {'numpy', 'mpi4py', 'pydantic', 'yaml'} & set(sys.modules)
layers = [nt.Linear(7, activation="relu"), nt.Linear(3)]
planned = nt.plan(layers, {"name": "synthetic", "shape": [5], "classes": 3}, ranks=6, exchange=EXCHANGE, layout=LAYOUT)
text = str(planned)
assert "SCHEDULE" in text and "MEMORY" in text and planned.layout in text
assert planned.topology.size == 6 and planned.seconds_per_step > 0
assert len(planned.memory) == len(planned.topology.stages)
assert "F0" in planned.schedule
print(*(name for name in sys.modules if name.partition(".")[0] in ("mpi4py", "h5py", "rich")))
"""


@pytest.mark.parametrize(("exchange", "layout"), [("'allreduce'", "'layers'"), ("'gossip'", "{'replicas': 3}")])
def test_planning_loads_no_mpi(exchange: str, layout: str) -> None:
    code = PLANNING.replace("EXCHANGE", exchange).replace("LAYOUT", layout)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
