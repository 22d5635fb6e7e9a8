"""Every name of CuPy, NCCL, cuDNN and nvmath that the package uses exists in their released versions of CUDA 12 and 13,
and the extras install all that is imported."""

from __future__ import annotations

import pytest

from tests.gpu.cuda_packages import ROOT, each_version, run
from tests.gpu.names import missing, names_of

PACKAGE = ROOT / "nettorrent_mpi"
FILES = [*sorted((PACKAGE / "device" / "gpu").glob("*.py")), PACKAGE / "comm" / "nccl.py"]


@pytest.mark.long
@each_version
def test_every_name_exists(version: int) -> None:
    found = run(version, "names.py", *FILES).splitlines()
    assert [line for line in found if line.startswith("missing")] == []
    # One of each package, of a class's instance, and behind an assignment.
    assert {
        "cupy.cuda.Stream().begin_capture",
        "cupy.cuda.runtime.deviceGetPCIBusId",
        "cupy.cuda.nccl.NcclCommunicator().allReduce",
        "cupy.cuda.nccl.NCCL_BFLOAT16",
        "cudnn.pygraph().conv_wgrad",
        "cudnn.numerical_note.NONDETERMINISTIC",
        "nvmath.bindings.cublasLt.Epilogue.RELU_BIAS",
    } <= set(found)


@pytest.mark.long
@each_version
def test_the_extras_install_all_that_is_imported(version: int) -> None:
    """Libraries that nvmath, cuDNN's frontend and CuPy load by name come from the extra's own packages, too."""
    used = {name.split(".")[0] for name in run(version, "names.py", *FILES).splitlines()}
    assert used >= {"cupy", "cudnn", "nvmath"}
    modules = ",".join(sorted(used | {"cuda", "ml_dtypes"}))  # nvmath imports cuda, NumPy's bfloat16 is of ml_dtypes
    numbered = {12: "libcublasLt.so.12,libnvrtc.so.12", 13: "libcublasLt.so.13,libnvrtc.so.13"}[version]
    assert run(version, "extras.py", f"cuda{version}", modules, f"{numbered},libcudnn.so.9,libnccl.so.2") == ""


SOURCE = """
import json
import pathlib as paths
from collections import abc, OrderedDict as Ordered

decoder: object = json.decoder

class Holder:
    def __init__(self):
        self.held, other = Ordered(), decoder.JSONDecoder
        self.held.move_to_end(1)
        with paths.Path("x") as opened:
            opened.read_text().anything

def late(holder, later, given):
    given.total()
    hidden = paths
    later.anything
    return holder.held.popitem, json.dumps(1).anything, hidden.PurePath, os.path

later = paths.Path
later.cwd
given.total
hidden.anything
"""
FOUND = {
    "json", "json.decoder", "json.decoder.JSONDecoder", "json.dumps", "json.dumps().anything", "pathlib",
    "pathlib.Path", "pathlib.PurePath", "pathlib.Path().read_text", "pathlib.Path().read_text().anything",
    "pathlib.Path.cwd", "collections.Counter().total",
    "collections.abc", "collections.OrderedDict", "collections.OrderedDict().move_to_end",
    "collections.OrderedDict().popitem", "collections.OrderedDict()",
}  # fmt: skip


def test_names_are_found_behind_assignments_and_calls() -> None:
    given = {"given": "collections.Counter()"}
    packages = ["json", "pathlib", "collections"]
    assert names_of(SOURCE, packages, given) == FOUND
    assert {missing(name) for name in FOUND} == {None}
    wrong = SOURCE.replace("popitem", "popitems").replace("JSONDecoder", "Decoder").replace("read_text", "read_texts")
    assert {missing(name) for name in names_of(wrong, packages, given)} == {
        None,
        "collections.OrderedDict().popitems",
        "json.decoder.Decoder",
        "pathlib.Path().read_texts",
    }
    assert missing("json.nothing.more") == "json.nothing"
