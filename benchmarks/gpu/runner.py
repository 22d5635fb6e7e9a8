"""Runs the parts one after the other and writes what they found after each."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.gpu.child import SKIPPED
from benchmarks.gpu.parts import Part
from nettorrent_mpi.speedup.machine import describe_host

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PATIENCE = 5.0  # seconds that a part has to end once its time is over
LAST_LINES = 60  # of a failed part's output that are kept


class Runner:
    """A Runner runs parts. The JSON file lies in the folder `output`; its name is the GPU's once a part has told it."""

    def __init__(self, parts: Sequence[Part], output: Path, host: bool = False, scale: float = 1.0):
        self._parts, self._output, self._host, self._scale = parts, output, host, scale
        self.report: dict[str, Any] = {"command": " ".join(["python -m benchmarks.gpu", *sys.argv[1:]]), "parts": {}}
        self._written: Path | None = None

    def run(self) -> int:
        """Run all parts; return the exit code."""
        self._output.mkdir(parents=True, exist_ok=True)
        began, given = time.monotonic(), 0.0
        with suppress(Exception):  # what cannot be described is not worth the rest
            self.report["host"] = describe_host()
        for part in self._parts:
            given += part.limit * self._scale
            limit = max(given - (time.monotonic() - began), 1.0)
            sys.stdout.write(f"{part.name}: {part.shows} (at most {limit:.0f} s)\n")
            sys.stdout.flush()
            told = self._run(part, limit)
            self.report["parts"][part.name] = told
            self.report["seconds"] = round(time.monotonic() - began, 1)
            self._write()
            sys.stdout.write(_in_words(told))
            sys.stdout.flush()
        sys.stdout.write(f"{self.report['seconds']} s in all; written to {self._written}\n")
        return int(any(told["status"] in ("failed", "timed out") for told in self.report["parts"].values()))

    def _run(self, part: Part, limit: float) -> dict[str, Any]:
        """Run a part in processes of its own, for `limit` seconds at most."""
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="nettorrent-") as folder:
            lines, printed = Path(folder, "lines"), Path(folder, "printed")
            command = [sys.executable, "-m", "benchmarks.gpu.child", part.module, part.function, "--lines", str(lines)]
            command += ["--seconds", str(limit), *(["--host"] if self._host else [])]
            paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
            env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
            with printed.open("wb") as out:
                child = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # so that everything it starts can be ended with it
                )
                try:
                    code: int | None = child.wait(limit)
                except subprocess.TimeoutExpired:
                    code = None
                finally:
                    end(child)
            text = printed.read_text(encoding="utf-8", errors="replace").splitlines()
            cases = read(lines)
        status = {0: "passed", SKIPPED: "skipped", None: "timed out"}.get(code, "failed")
        told: dict[str, Any] = {
            "status": status,
            "seconds": round(time.monotonic() - began, 1),
            "limit": round(limit, 1),
        }
        if code not in (0, SKIPPED):
            told |= {"exit_code": code, "printed": text[-LAST_LINES:]}
        return told | {"cases": cases}

    def _write(self) -> None:
        """Write the report whole or not at all, under the GPU's name."""
        path = self._output / f"gpu_{name_of(self.report)}.json"
        new = path.with_suffix(".new")
        new.write_text(json.dumps(self.report, indent=1) + "\n", encoding="utf-8")
        new.replace(path)
        if self._written not in (None, path):  # the GPU's name was not known before
            self._written.unlink()
        self._written = path


def name_of(report: dict[str, Any]) -> str:
    """Return the GPU's name, if a case has told it, for a file's name."""
    cases = [case for part in report["parts"].values() for case in part["cases"]]
    name = next((case["gpu"] for case in cases if case.get("gpu")), "unknown")
    return re.sub(r"[^a-z0-9]+", "_", str(name).lower()).strip("_")


def read(path: Path) -> list[dict[str, Any]]:
    """Read the cases of a part that may have been stopped within a line."""
    cases = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):
                cases.append(json.loads(line))
    return cases


def end(child: subprocess.Popen[Any]) -> None:
    """End a child with everything that it started: a launcher ends its ranks when it is asked to."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        child.wait(PATIENCE)
    for pid in _of_session(child.pid):
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    child.wait()


def _of_session(session: int) -> list[int]:
    """Return the processes of a session, from /proc."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):
            after_name = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            if int(after_name[3]) == session:
                found.append(int(stat.parent.name))
    return found


def _in_words(told: dict[str, Any]) -> str:
    lines = [f"  {told['status']} in {told['seconds']} s"]
    for case in told["cases"]:
        figures = {
            name: value for name, value in case.items() if name not in ("case", "status", "seconds", "traceback")
        }
        text = ", ".join(f"{name} {_short(value)}" for name, value in figures.items())
        if case["status"] == "passed":
            lines.append(f"  {case['case']}: {text}" if text else f"  {case['case']}")
        else:
            last = str(case.get("traceback", "")).strip().splitlines()[-1:]
            lines.append(f"  {case['case']}: {case['status']}: {case.get('reason') or ''.join(last)}")
    lines += [f"  | {line}" for line in told.get("printed", [])[-12:]]
    return "\n".join(lines) + "\n"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value) if not isinstance(value, list | dict) else json.dumps(value)[:100]
