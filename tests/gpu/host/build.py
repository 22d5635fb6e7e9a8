"""The GPU's kernels on a CPU: kernels.cu compiled by g++ with host_cuda.h, and kept in a cache.

`load("float32", seed=3).call("relu", (2, 1), 256, [x.ctypes.data, y.ctypes.data, x.size])` runs a kernel on raw
addresses. A seed other than 0 shuffles the order of blocks and threads, in each call anew.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nettorrent_mpi.device.gpu import source as kernels

HEADER = Path(__file__).with_name("host_cuda.h")
# Contraction would fuse products and sums, as NumPy does not.
FLAGS = ("-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-shared", "-Wall", "-Wextra", "-Wno-sign-compare")
IGNORED = ("-Wno-unused-function", "-Wno-unknown-pragmas", "-Wno-parentheses", "-Wno-missing-field-initializers")
SCALARS: dict[str, Any] = {
    "double": ctypes.c_double,
    "int": ctypes.c_int,
    "i64": ctypes.c_int64,
    "u32": ctypes.c_uint32,
    "u64": ctypes.c_uint64,
    "bool": ctypes.c_bool,
}
WAITS = re.compile(r"__sync\w+|__shfl\w+|__ballot_sync|__any_sync|__all_sync|__shared__")
_FUNCTION = re.compile(r"^[^\n#/{};]*?\b(\w+)\([^;{}]*?\)\s*\{", re.MULTILINE)


class HostError(RuntimeError):
    """A kernel did what no GPU allows."""


def waiting(text: str) -> set[str]:
    """The names of the functions of a source that use barriers, shuffles or memory shared by a block, themselves or
    through others."""
    bodies: dict[str, str] = {}  # of all functions of a name
    text = re.sub(r"//.*", "", text)
    for found in _FUNCTION.finditer(text):
        depth, end = 1, found.end()
        while depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        bodies[found[1]] = bodies.get(found[1], "") + text[found.end() : end]
    found_names = {name for name, body in bodies.items() if WAITS.search(body)}
    while True:
        more = {
            name
            for name, body in bodies.items()
            if name not in found_names and found_names & set(re.findall(r"\w+", body))
        }
        if not more:
            return found_names
        found_names |= more


def wrappers(text: str) -> str:
    """The C++ functions that run each kernel for a whole grid."""
    waits, code = waiting(text), []
    for name, signature in kernels.signatures(text).items():
        declared = ", ".join(f"{p.type}{'*' if p.pointer else ''} {p.name}" for p in signature.parameters)
        names = ", ".join(p.name for p in signature.parameters)
        how = "run" if name in waits else "loop"
        code.append(
            f'extern "C" __attribute__((visibility("default"))) const char* host_{name}(unsigned grid_x_, '
            f"unsigned grid_y_, unsigned block_, unsigned long long seed_, {declared}) {{\n"
            f"    return emulated::{how}(grid_x_, grid_y_, block_, seed_, [=] {{ {name}({names}); }});\n}}\n"
        )
    return "".join(code)


def cache_folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"nettorrent-host-kernels-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to somebody else")
    return folder


def compiler() -> str | None:
    return shutil.which("g++")


def compiled(text: str, real: str, flags: Sequence[str] = ()) -> Path:
    """The shared library of a source for a type of REAL, compiled if it is not there yet."""
    gxx = compiler()
    if gxx is None:
        raise FileNotFoundError("g++ is not installed")
    code = f'#include "{HEADER}"\n#define REAL {kernels.REALS[real]}\n#line 1 "kernels.cu"\n{text}\n{wrappers(text)}'
    command = [gxx, *FLAGS, *IGNORED, *flags]
    version = subprocess.run([gxx, "--version"], capture_output=True, text=True, check=True).stdout
    parts = (HEADER.read_text(), code, " ".join(command), version)
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    folder = cache_folder()
    library = folder / f"{real}-{key}.so"
    if library.exists():
        return library
    with (folder / f"{real}-{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several ranks may ask at the same time
        if not library.exists():
            (folder / f"{real}-{key}.cpp").write_text(code)
            partial = folder / f"{real}-{key}.part"
            arguments = [*command, str(folder / f"{real}-{key}.cpp"), "-o", str(partial)]
            done = subprocess.run(arguments, capture_output=True, text=True)
            if done.returncode or done.stderr:
                raise RuntimeError(f"g++ says of kernels.cu with REAL = {kernels.REALS[real]}:\n{done.stderr}")
            partial.replace(library)
    return library


class Library:
    """All kernels for one type of REAL."""

    def __init__(self, path: Path, text: str, seed: int = 0):
        self.signatures = kernels.signatures(text)
        self.seed, self.calls = seed, 0
        library = ctypes.PyDLL(str(path))  # holds the interpreter's lock: a library runs one kernel at a time
        self._functions = {}
        for name, signature in self.signatures.items():
            function = getattr(library, f"host_{name}")
            function.restype = ctypes.c_char_p
            values = [ctypes.c_void_p if p.pointer else SCALARS[p.type] for p in signature.parameters]
            function.argtypes = [*[ctypes.c_uint] * 3, ctypes.c_uint64, *values]
            self._functions[name] = function

    def call(self, name: str, grid: int | tuple[int, int], block: int, values: Sequence[Any]) -> None:
        """Run a kernel. Addresses and scalars are plain ints, floats and bools (see `source.Signature.values`)."""
        across, down = (grid, 1) if isinstance(grid, int) else grid
        self.calls += 1
        order = self.seed * 0x9E3779B97F4A7C15 + self.calls if self.seed else 0
        told = self._functions[name](across, down, block, order % 2**64, *values)
        if told:
            raise HostError(f"{name}: {told.decode()}")


def load(real: str = "float32", seed: int = 0, text: str | None = None, flags: Sequence[str] = ()) -> Library:
    """Load the kernels for REAL = float32, float64 or bfloat16: those of the package, or another source."""
    text = kernels.text() if text is None else text
    return Library(compiled(text, real, flags), text, seed)
