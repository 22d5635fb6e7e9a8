"""What only a real GPU can show: `make test-gpu`. Elsewhere these tests are skipped, and say why."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from nettorrent_mpi.device import visible

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # benchmarks/ is no part of the package
    sys.path.append(str(ROOT))

PARTS = {part.name: part for part in import_module("benchmarks.gpu.parts").PARTS}
FOUND = visible.look(dict(os.environ), None)
pytestmark = pytest.mark.skipif(not FOUND.gpus, reason=f"no GPU: {FOUND.missing}")
LIMIT = 300.0  # seconds: the first test compiles the kernels


@pytest.mark.parametrize("name", ["machine", "kernels", "products", "convolution", "nccl", "parity", "launches"])
def test_on_the_gpu(name: str, tmp_path: Path) -> None:
    """Each case of a part of `make bench-gpu` passes, or is skipped with a reason."""
    part, lines = PARTS[name], tmp_path / "lines"
    words = [sys.executable, "-m", "benchmarks.gpu.child", part.module, part.function]
    done = subprocess.run(
        [*words, "--lines", str(lines), "--seconds", str(LIMIT)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))},
        capture_output=True,
        text=True,
        timeout=LIMIT + 60,
        check=False,
    )
    cases = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    failed = [f"{case['case']}:\n{case['traceback']}" for case in cases if case["status"] == "failed"]
    assert not failed, "\n".join(failed)
    assert cases, done.stdout + done.stderr
    assert any(case["status"] == "passed" for case in cases), cases
