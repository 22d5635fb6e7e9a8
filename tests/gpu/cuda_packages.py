"""Pythons that have the packages of the extras cuda12 and cuda13, for tests that need them and no GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PROGRAMS = Path(__file__).resolve().parent / "programs"

LIBCUDA = "NETTORRENT_LIBCUDA"
"""The environment variable that names a folder with libcuda.so.1, for machines without a driver: Debian's libcuda1
(non-free), unpacked and not installed, is enough."""

each_version = pytest.mark.parametrize("version", [12, 13])


def python_of(version: int) -> str:
    """Return a Python that has the packages of this version of CUDA: that which NETTORRENT_CUDA12 or
    NETTORRENT_CUDA13 names, else this one. Skips the test without one."""
    name = f"NETTORRENT_CUDA{version}"
    if name in os.environ:
        return os.environ[name]
    if importlib.util.find_spec("cupy") is not None:
        import cupy

        if cupy.cuda.runtime.runtimeGetVersion() // 1000 == version:
            return sys.executable
    pytest.skip(f"no packages of CUDA {version} here; {name} may name a Python that has them")


def run(version: int, program: str, *arguments: str | Path, libcuda: bool = False, timeout: float = 600) -> str:
    """Run a program of tests/gpu/programs with this version's packages; return its output. `libcuda`: it needs the
    driver's library, though no GPU."""
    python = python_of(version)
    env = dict(os.environ, PYTHONPATH=str(ROOT), CUDNN_LOGLEVEL_DBG="0")
    if LIBCUDA in os.environ:
        env["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, [os.environ[LIBCUDA], env.get("LD_LIBRARY_PATH")]))
    if libcuda and not has_libcuda(env):
        pytest.skip(f"no libcuda.so.1 here; {LIBCUDA} may name a folder that has it (Debian's libcuda1, unpacked)")
    done = subprocess.run(
        [python, PROGRAMS / program, *arguments], env=env, cwd=ROOT, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"{program} with CUDA {version}:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def has_libcuda(env: dict[str, str]) -> bool:
    """Whether the dynamic linker finds libcuda.so.1 in this environment."""
    code = "import ctypes; ctypes.CDLL('libcuda.so.1')"
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True).returncode == 0
