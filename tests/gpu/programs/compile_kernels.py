"""Compile all kernels with CuPy's own call of NVRTC, which needs no GPU, into machine code for each type of REAL and
each architecture: `compile_kernels.py [REAL ...]`. Print what the assembler says of each kernel, as JSON: REAL ->
architecture -> kernel -> [bytes of stack, of spill stores, of spill loads, registers]."""

from __future__ import annotations

import io
import json
import re
import sys

from cupy.cuda import compiler

from nettorrent_mpi.device.gpu import source

ARCHITECTURES = ("75", "80", "90", "100", "120")
PROPERTIES = re.compile(
    r"Compiling entry function '(\w+)' for '\w+'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads.*?Used (\d+) registers",
    re.DOTALL,
)


def compiled(real: str, architecture: str) -> dict[str, list[int]]:
    log = io.StringIO()
    options = (*source.options(real), "--ptxas-options=-v")
    code, _ = compiler.compile_using_nvrtc(source.text(), options, architecture, "kernels.cu", log_stream=log)
    assert code[:4] == b"\x7fELF", code[:4]
    return {name: [int(number) for number in numbers] for name, *numbers in PROPERTIES.findall(log.getvalue())}


# CuPy asks the present GPU for its architecture otherwise.
compiler._get_arch_for_options_for_nvrtc = lambda arch=None: (f"-arch=sm_{arch}", "cubin")
reals = sys.argv[1:] or ["float32", "float64"]
print(json.dumps({real: {arch: compiled(real, arch) for arch in ARCHITECTURES} for real in reals}))
