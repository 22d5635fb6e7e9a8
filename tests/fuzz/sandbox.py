"""A sandbox runs readers of damaged files in a process of its own, which may crash, hang or ask for too much memory.

    python -m tests.fuzz.sandbox TARGET

reads the path of a case's folder from each line of standard input, runs `tests.fuzz.targets.TARGET` on it, and answers
by one line of JSON. `Sandbox` starts it, and starts it anew after a crash, a hang and many cases.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import resource
import select
import subprocess
import sys
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

ROOT = Path(__file__).resolve().parents[2]
MEMORY = 1 << 30  # bytes that a case may ask for
SECONDS = 30.0  # a case that takes longer hangs
CASES = 300  # of one process: libraries leak memory where files are damaged
FAULTS = ("escaped", "crashed", "hung", "memory", "wrong", "ran", "riddle")


class Outcome(NamedTuple):
    """An Outcome is "done", "refused" (by a UserError), or one of FAULTS; `text` says more."""

    kind: str
    text: str

    @property
    def fault(self) -> bool:
        return self.kind in FAULTS


class Sandbox:
    """A Sandbox runs one target on many cases."""

    def __init__(self, target: str, memory: int = MEMORY, seconds: float = SECONDS):
        self._target, self._memory, self._seconds = target, memory, seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._done = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def run(self, case: Path) -> Outcome:
        """Run the target on the case in this folder."""
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{case}\n".encode())
        process.stdin.flush()
        line = b""
        if select.select([process.stdout], [], [], self._seconds)[0]:
            line = process.stdout.readline()
        else:
            process.kill()
        if line:
            self._done += 1
            if self._done % CASES == 0:
                self.close()
            return Outcome(*json.loads(line))
        process.kill()
        errors = process.communicate()[1].decode(errors="replace")[-2000:]
        code, self._process = process.returncode, None
        return Outcome("hung" if code == -9 and not errors else "crashed", f"exit code {code}: {errors}")

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            command = [sys.executable, "-m", "tests.fuzz.sandbox", self._target, str(self._memory)]
            pipe = subprocess.PIPE
            environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0
            )
            assert self._process.stdout is not None
            assert self._process.stdout.readline() == b"ready\n", self._process.communicate()[1].decode()
        return self._process


class RanError(BaseException):
    """A file made its reader do what no reader does."""


_FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "socket.connect",
              "pickle.find_class", "webbrowser.open", "shutil.rmtree")  # fmt: skip
_LINKER = re.compile(r"(\S*/)?(ldconfig|cc|gcc|ld|objdump)$")
_watching = False


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching and event in _FORBIDDEN and not _LINKER.match(str(arguments[0])):  # by which libraries are found
        raise RanError(f"{event}{arguments}"[:300])


def _attempt(target: Any, case: Path) -> Outcome:
    global _watching
    from nettorrent_mpi.plan.errors import UserError

    try:
        _watching = True
        return Outcome("done", str(target(case)))
    except RanError as error:
        return Outcome("ran", str(error))
    except AssertionError:
        return Outcome("wrong", traceback.format_exc()[-3000:])
    except BaseException as error:
        chain, cause = [], error
        while cause is not None and len(chain) < 30:
            chain.append(cause)
            cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
        if any(isinstance(each, MemoryError) for each in chain):
            return Outcome("memory", traceback.format_exc()[-3000:])
        if not isinstance(error, UserError):
            return Outcome("escaped", traceback.format_exc()[-3000:])
        text = str(error)
        if len(text) > 20_000 or not all(line.isprintable() for line in text.split("\n")):
            return Outcome("riddle", repr(text[:1000]))
        return Outcome("refused", text)
    finally:
        _watching = False


def _peak() -> int:
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def main(name: str, memory: int) -> None:
    target = getattr(importlib.import_module("tests.fuzz.targets"), name)
    sys.addaudithook(_watch)
    with open("/proc/self/statm", encoding="utf-8") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + memory, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (256 << 20, resource.RLIM_INFINITY))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="utf-8") as file:
            file.write("5")  # the peak begins anew
        before = _peak()
        outcome = _attempt(target, Path(line.rstrip("\n")))
        if (used := _peak() - before) > memory // 4 and not outcome.fault:
            outcome = Outcome("memory", f"{used / 1e6:.0f} MB: {outcome.text}")
        print(json.dumps(outcome), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
