"""Compares CuPy's binding of NCCL with its double, and runs of comm/nccl.py what needs no GPU."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path

import pytest

from nettorrent_mpi.comm import nccl
from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.plan.errors import LaunchError

DOUBLE = Path(__file__).resolve().parent.parent / "host" / "nccl.py"


def main() -> None:
    os.environ.pop(nccl.IN_HOST_ORDER, None)
    library = nccl.load(shared_gpus=True)
    assert os.environ[nccl.IN_HOST_ORDER] == os.environ[nccl.SHARED_GPUS] == "1"
    assert library.get_version() >= 23000
    library_of_nccl = Path(find_library("libnccl")).read_bytes()
    for name in (nccl.IN_HOST_ORDER, nccl.SHARED_GPUS):
        assert name.encode() in library_of_nccl, f"NCCL does not know {name}"
    classes = {node.name: node for node in ast.parse(DOUBLE.read_text()).body if isinstance(node, ast.ClassDef)}
    constants(library, classes["HostNccl"])
    signatures(library, classes["HostCommunicator"])
    identity = nccl._identity(library)
    assert len(identity) == 128
    with pytest.raises(LaunchError, match=r"NCCL cannot connect 1 GPUs \(NCCL_ERROR_UNHANDLED_CUDA_ERROR"):
        nccl.Communicator(library, Group(None), identity, lambda array: 0)
    with nccl.one_launch(library):
        pass
    print("complete")


def find_library(name: str) -> str:
    """The file of a library that this process has loaded."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return next(line.split()[-1] for line in lines if name in line)


def constants(library: object, double: ast.ClassDef) -> None:
    found = {}
    for node in double.body:
        if isinstance(node, ast.Assign):
            names = [target.id for each in node.targets for target in getattr(each, "elts", [each])]
            values = list(getattr(node.value, "elts", [node.value]))
            found |= {n: ast.literal_eval(v) for n, v in zip(names, values, strict=True) if n.startswith("NCCL_")}
    assert set(nccl.TYPES.values()) | {"NCCL_SUM"} == set(found)
    assert found == {name: getattr(library, name) for name in found}


def signatures(library: object, double: ast.ClassDef) -> None:
    """The parameters have the same names in the same order, as CuPy's docstrings give them."""
    compared = 0
    for node in double.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            told = getattr(library.NcclCommunicator, node.name).__doc__  # type: ignore[attr-defined]
            parameters = re.search(rf"{node.name}\((.*?)\)", told).group(1)  # type: ignore[union-attr]
            assert [each.split()[-1] for each in parameters.split(",")] == [a.arg for a in node.args.args], node.name
            compared += 1
    assert compared == 9


if __name__ == "__main__":
    main()
