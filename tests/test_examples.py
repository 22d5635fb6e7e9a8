"""The examples run as they stand, on one rank and on four, and are short."""

from __future__ import annotations

import ast
import difflib
import io
import re
import subprocess
import tokenize
from collections.abc import Callable
from itertools import groupby, product
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))
MOST = 25  # lines of code
Run = subprocess.CompletedProcess[str]
ARGUMENTS = {"train_config.py": [EXAMPLES.parent / "configs" / "digits.yaml", "train.epochs=2"]}
# Percent right that each comes to.
GOOD = {"train_config.py": 90.0, "own_network.py": 98.0, "own_layer.py": 90.0}
GOOD |= {"torch_plain.py": 95.0, "torch_gossip.py": 95.0}


def lines_of_code(text: str) -> int:
    """Lines that are neither blank nor comments nor docstrings."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            docstrings |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    other = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return len({line for t in tokens if t.type not in other for line in range(t.start[0], t.end[0] + 1)} - docstrings)


def test_there_are_examples() -> None:
    assert set(SCRIPTS) == set(GOOD)


@pytest.mark.parametrize("script", SCRIPTS)
def test_examples_are_short(script: str) -> None:
    assert lines_of_code((EXAMPLES / script).read_text()) <= MOST


@pytest.mark.parametrize(
    ("script", "ranks"),
    [
        pytest.param(*each, marks=() if each in (("train_config.py", 1), ("own_network.py", 4)) else pytest.mark.slow)
        for each in product(SCRIPTS, [1, 4])
    ],
)
def test_examples_run(mpirun: Callable[..., Run], tmp_path: Path, script: str, ranks: int) -> None:
    if script.startswith("torch"):
        pytest.importorskip("torch")
    done = mpirun(ranks, [EXAMPLES / script, *ARGUMENTS.get(script, [])], cwd=tmp_path, timeout=100)
    text = f"\n{done.stdout}\n{done.stderr}"
    assert done.returncode == 0, text
    assert "Traceback" not in done.stderr, text
    found = [float(each) for each in re.findall(r"test accuracy ([\d.]+)%", done.stdout)]
    assert found, text
    assert found[-1] >= GOOD[script], text


def test_four_lines_make_a_script_parallel() -> None:
    plain, parallel = (
        (EXAMPLES / f"torch_{kind}.py").read_text().split('"""')[2].splitlines() for kind in ("plain", "gossip")
    )
    changed = [line[2:] for line in difflib.ndiff(plain, parallel) if line.startswith("+ ")]
    assert len([line for line in changed if line.strip()]) <= 4


def test_the_notebook_is_executed_and_runs(tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    kept: Any = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)
    code = [cell for cell in kept.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "it is not kept executed"
    assert sum(lines_of_code(cell.source) for cell in code) <= MOST
    again: Any = nbformat.from_dict(kept)
    nbclient.NotebookClient(again, timeout=100, resources={"metadata": {"path": str(tmp_path)}}).execute()
    for before, after in zip(code, (cell for cell in again.cells if cell.cell_type == "code"), strict=True):
        # In how many pieces a text arrives depends on time.
        kinds = ([kind for kind, _ in groupby(each.output_type for each in cell.outputs)] for cell in (before, after))
        assert next(kinds) == next(kinds)
