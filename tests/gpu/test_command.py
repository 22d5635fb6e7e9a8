"""Whole runs with `device: gpu` on the host device equal those with `device: cpu`."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from tests.conftest import Mpirun
from tests.gpu.cuda_packages import each_version, python_of
from tests.gpu.host.build import compiler, load

pytestmark = pytest.mark.skipif(compiler() is None, reason="g++ is not installed")

CONFIG = """\
data: {name: digits}
model:
  layers:
    - conv2d: {filters: 5, kernel: 3, padding: same, bias: false}
    - batch_norm
    - relu
    - max_pool2d: 2
    - flatten
    - dropout: 0.3
    - linear: 33
    - relu
    - linear: 10
dtype: float64
train: {steps: 5, batch_size: 45, micro_batches: 2, clip_norm: 1.0}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("config") / "run.yaml"
    file.write_text(CONFIG)
    return file


@pytest.fixture(scope="module")
def on_cpu(config: Path, mpirun: Mpirun) -> dict[str, np.ndarray]:
    for real in ("float32", "float64"):
        load(real)  # compiled here, so that no rank waits for another one's compiler
    return arrays(mpirun, 1, ["-m", "nettorrent_mpi"], config, "--set", "device=cpu")


def arrays(mpirun: Mpirun, n: int, program: list[str], config: Path, *more: str) -> dict[str, np.ndarray]:
    """The arrays of the model that a program trains."""
    folder = config.parent / f"run{n}"
    done = mpirun(n, [*program, "train", config, "--output", folder, "--overwrite", *more], timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return read(folder)


def read(folder: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    with h5py.File(folder / "model.h5") as file:
        file.visititems(lambda name, part: found.update({name: part[...]} if isinstance(part, h5py.Dataset) else {}))
    return found


def assert_equal(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-9 * np.abs(array).max(), err_msg=name)


@pytest.mark.parametrize(
    ("n", "options"),
    [
        (2, ["--seed", "3"]),
        pytest.param(1, ["--seed", "1"], marks=pytest.mark.slow),
        pytest.param(3, ["--seed", "2"], marks=pytest.mark.slow),
        pytest.param(4, ["--seed", "4"], marks=pytest.mark.slow),
        pytest.param(2, ["--seed", "5", "--shared"], marks=pytest.mark.slow),
    ],
)
def test_runs_on_the_host_device(
    n: int, options: list[str], config: Path, on_cpu: dict[str, np.ndarray], mpirun: Mpirun
) -> None:
    found = arrays(mpirun, n, ["-m", "tests.gpu.host.main", *options], config, "--set", "device=gpu")
    assert_equal(found, on_cpu)


@pytest.mark.long
@each_version
@pytest.mark.parametrize("n", [1, 2])
def test_runs_on_the_arrays_of_cupy(
    version: int, n: int, config: Path, on_cpu: dict[str, np.ndarray], mpirun: Mpirun
) -> None:
    """The whole engine uses of CuPy's arrays what they have, and nothing that needs a GPU's own kernels."""
    program = ["-m", "tests.gpu.host.main", "--seed", "3", "--cupy"]
    python = python_of(version)
    code = f"import os, sys; os.execv({python!r}, [{python!r}, *sys.argv[1:]])"
    assert_equal(arrays(mpirun, n, ["-c", code, *program], config, "--set", "device=gpu"), on_cpu)
