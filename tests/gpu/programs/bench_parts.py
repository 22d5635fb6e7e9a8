"""Runs parts of `make bench-gpu` on CuPy's own arrays, over a driver that needs no GPU: `bench_parts.py MODULE ...`."""

from __future__ import annotations

import json
import sys
import tempfile
from importlib import import_module
from pathlib import Path

from nettorrent_mpi import env

env.prepare()

from benchmarks.gpu.record import Record  # noqa: E402
from tests.gpu.host.main import install  # noqa: E402

install(0, cupy=True)
for name in sys.argv[1:]:
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder, "lines")
        record = Record(lines, True, 600)
        import_module(f"benchmarks.gpu.{name}").run(record)
        cases = [json.loads(line) for line in lines.read_text().splitlines()]
        for case in cases:
            if case["status"] == "failed":
                print(case["case"], case["traceback"])
        print(name, record.passed, "passed", record.failed, "failed")
