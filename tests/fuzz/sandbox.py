"""A sandbox makes damaged files and runs their readers in a process of its own, which may crash, hang or ask for too
much memory.

    python -m tests.fuzz.sandbox FOLDER

reads a target and the number of a case from each line of standard input, makes it in FOLDER/case, runs the function of
`tests.fuzz.targets` on it, and answers by one line of JSON. `Sandbox` starts it, and starts it anew after a crash, a
hang and many cases.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import resource
import select
import shutil
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Any, NamedTuple, Self

ROOT = Path(__file__).resolve().parents[2]
MEMORY = 1 << 30  # bytes that a case may ask for
SECONDS = 60.0  # a case that takes longer hangs; the machine may be busy
CASES = 300  # of one process: libraries leak memory where files are damaged
AHEAD = 50  # cases that are asked for at a time
FAULTS = ("escaped", "crashed", "hung", "memory", "wrong", "ran", "riddle")


class Case(NamedTuple):
    """A Case is made for its target by a generator whose seed is its number."""

    target: str
    number: int

    @property
    def name(self) -> str:
        return f"{self.target}-{self.number}"


class Outcome(NamedTuple):
    """An Outcome is "done", "refused" (by a UserError), or one of FAULTS; `text` says more."""

    kind: str
    text: str

    @property
    def fault(self) -> bool:
        return self.kind in FAULTS


class Sandbox:
    """A Sandbox runs targets on many cases; those that show a fault are kept in `folder`/kept."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()

    def run(self, cases: Iterable[Case]) -> Iterator[tuple[Case, Outcome]]:
        """Make and run the cases; yield the outcome of each."""
        left, asked, answers = iter(cases), deque[Case](), b""
        while True:
            process = self._started(asked)
            for case in islice(left, AHEAD - len(asked)):
                asked.append(case)
                self._ask(process, case)
            if not asked:
                return
            assert process.stdout is not None
            piece, late = b"", False
            if select.select([process.stdout], [], [], SECONDS)[0]:
                piece = os.read(process.stdout.fileno(), 1 << 16)
            else:
                late = True
                process.kill()
            *lines, answers = (answers + piece).split(b"\n")
            for line in lines:
                yield asked.popleft(), Outcome(*json.loads(line))
            if not piece:
                process.communicate()
                self._process, answers = None, b""
                errors = self._errors()
                if process.returncode:
                    shutil.copytree(self._folder / "case", self._folder / "kept" / asked[0].name, ignore=_PIPE)
                    yield asked.popleft(), Outcome("hung" if late else "crashed", f"{process.returncode}: {errors}")

    def _ask(self, process: subprocess.Popen[bytes], case: Case) -> None:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, and will be started again
            process.stdin.write(f"{case.target} {case.number}\n".encode())

    def _started(self, asked: Iterable[Case]) -> subprocess.Popen[bytes]:
        if self._process is None:
            command = [sys.executable, "-m", "tests.fuzz.sandbox", str(self._folder)]
            pipe = subprocess.PIPE
            environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            with (self._folder / "errors").open("wb") as errors:  # a pipe would fill: nobody reads it meanwhile
                self._process = subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, stderr=errors, bufsize=0
                )
            assert self._process.stdout is not None
            assert self._process.stdout.readline() == b"ready\n", self._errors()
            for case in asked:
                self._ask(self._process, case)
        return self._process

    def _errors(self) -> str:
        return (self._folder / "errors").read_bytes()[-2000:].decode(errors="replace")


_PIPE = shutil.ignore_patterns("fifo")


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


def main(folder: Path) -> None:
    targets, cases = (importlib.import_module(f"tests.fuzz.{module}") for module in ("targets", "cases"))
    sys.addaudithook(_watch)
    with open("/proc/self/statm", encoding="utf-8") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (256 << 20, resource.RLIM_INFINITY))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print("ready", file=answers, flush=True)
    seeds: dict[str, Any] = {}
    for _, line in zip(range(CASES), sys.stdin, strict=False):
        case = Case(line.split()[0], int(line.split()[1]))
        if case.target not in seeds:
            (folder / "seeds" / case.target).mkdir(parents=True, exist_ok=True)
            seeds[case.target] = cases.SEEDS[case.target](folder / "seeds" / case.target)
        cases.write(cases.CASES[case.target](Random(case.number), seeds[case.target]), folder / "case")
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="utf-8") as file:
            file.write("5")  # the peak begins anew
        before = _peak()
        outcome = _attempt(getattr(targets, case.target), folder / "case")
        if (used := _peak() - before) > MEMORY // 4 and not outcome.fault and case.target != "config":
            outcome = Outcome("memory", f"{used / 1e6:.0f} MB: {outcome.text}")
        if outcome.fault:
            shutil.copytree(folder / "case", folder / "kept" / case.name, ignore=_PIPE)
        print(json.dumps(outcome), file=answers, flush=True)
    os._exit(0)  # without what libraries do at the end


if __name__ == "__main__":
    main(Path(sys.argv[1]))
