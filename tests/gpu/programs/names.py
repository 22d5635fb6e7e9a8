"""Prints the names that these files use of the GPU's packages, one a line; those that do not exist with the word
"missing". Needs no GPU."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from tests.gpu.names import missing, names_of

PACKAGES = ["cupy", "cupyx", "cupy_backends", "cudnn", "nvmath", "nccl", "cuda", "ml_dtypes"]

GIVEN = {"nccl.py": {"library": "cupy.cuda.nccl"}}  # its functions get the module, which tests replace

names: set[str] = set()
for path in map(Path, sys.argv[1:]):
    text = path.read_text()
    names |= names_of(text, PACKAGES, GIVEN.get(path.name))
    if path.name == "nccl.py":  # the types' names are read from a table
        names |= {f"cupy.cuda.nccl.{name}" for name in re.findall(r'": "(NCCL_[A-Z]+[0-9]*)"', text)}
for name in sorted(names):
    lost = missing(name)
    print(name if lost is None else f"missing {lost}")
