"""What the tests of the comparison share: results as they would be measured, made by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest

HOST = {
    "cpu": "A processor",
    "cores": 2,
    "gpus": [],
    "python": "3.11",
    "packages": {"numpy": "2.0", "torch": None},
    "blas": [{"internal_api": "openblas", "version": "0.3", "architecture": "Zen"}],
    "commit": "abc",
    "date": "2030-01-01",
}


def side(
    mode: str,
    cpus: int,
    figures: list[float],
    *,
    kind: str = "ours",
    also: tuple[str, ...] = (),
    why: str | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    return {
        "name": f"{mode}-{cpus}",
        "mode": mode,
        "kind": kind,
        "cpus": cpus,
        "layout": "1 replica x [a 1x1 | b 1x1]" if kind == "ours" and not why else None,
        "micro_batches": 4 if kind == "ours" and not why else None,
        "also": list(also),
        "impossible": why,
        "device": device,
        "samples_per_second": figures,
    }


def shares(**parts: float) -> dict[str, float]:
    told = {"compute": 0.0, "communication": 0.0, "waiting": 0.0, "bubble": 0.0, "other": 0.0, **parts}
    assert sum(told.values()) == pytest.approx(1)
    return told


RESULTS: dict[str, Any] = {
    "format": 3,
    "complete": True,
    "failure": None,
    "command": "nettorrent speedup some.yaml",
    "config": "some",
    "settings": {},
    "network": {"weight_layers": 2, "parameters": 1234, "operations": 5e6, "batch_norm": False},
    "batch_size": 32,
    "dtype": "float32",
    "optimizer": "adam",
    "baseline": "cpu",
    "ranks": [1, 2, 4],
    "modes": ["rows", "1f1b", "gossip", "auto"],
    "repeats": 3,
    "steps": 100,
    "warm_up": {"ours": 5, "torch": 11},
    "host": HOST,
    "mpi": "Open MPI v5",
    "kernels": ["numpy", "numba"],
    "notes": ["a note"],
    "sides": [
        side("serial", 1, [100.0, 90.0, 110.0]),
        side("rows", 2, [180.0, 170.0, 190.0], also=("auto",)),
        side("1f1b", 2, [150.0, 149.0, 152.0]),
        side("gossip", 2, [175.0, 165.0, 176.0]),
        side("rows", 4, [120.0, 121.0, 119.0]),
        side("1f1b", 4, [], why="4 stages for 2 weight layers: a stage needs one at least"),
        side("gossip", 4, [130.0, 131.0, 129.0]),
        side("auto", 4, [125.0, 126.0, 124.0]),
        side("torch", 1, [50.0, 49.0, 51.0], kind="torch"),
        side("torch", 2, [60.0, 59.0, 61.0], kind="torch"),
        side("ddp", 2, [80.0, 79.0, 81.0], kind="torch"),
        side("torch_compile", 1, [], kind="torch", why="torch.compile does not work here: no compiler"),
    ],
    "traces": [
        {"side": "serial-1", "steps": 100, "shares": [shares(compute=0.98, other=0.02)]},
        {
            "side": "rows-2",
            "steps": 100,
            "shares": [
                shares(compute=0.9, communication=0.08, other=0.02),
                shares(compute=0.88, waiting=0.1, other=0.02),
            ],
        },
        {
            "side": "1f1b-2",
            "steps": 100,
            "shares": [shares(compute=0.73, bubble=0.25, other=0.02), shares(compute=0.76, bubble=0.22, other=0.02)],
        },
    ],
    "accuracy": {
        "wanted": 0.9,
        "of": "validation",
        "runs": [
            {"side": "serial-1", "seconds": 4.0, "curve": [[2.0, 1.0, 0.8], [4.0, 2.0, 0.91]]},
            {"side": "rows-2", "seconds": 2.0, "curve": [[1.0, 1.0, 0.8], [2.0, 2.0, 0.91]]},
            {"side": "torch-2", "seconds": None, "curve": [[3.0, 1.0, 0.5]]},
        ],
    },
}  # fmt: skip


@pytest.fixture
def results() -> dict[str, Any]:
    """A comparison on two cores, complete."""
    return copy.deepcopy(RESULTS)


@pytest.fixture
def results_on_gpus() -> dict[str, Any]:
    """A comparison of ranks on two GPUs, complete."""
    made = copy.deepcopy(RESULTS)
    made |= {"baseline": "gpu", "traces": [], "host": HOST | {"gpus": ["A GPU", "A GPU"]}}
    made["sides"] = [
        side("serial", 1, [100.0, 90.0, 110.0], device="gpu"),
        side("rows", 2, [180.0, 170.0, 190.0], device="gpu", also=("auto",)),
        side("rows", 4, [120.0, 121.0, 119.0], device="gpu"),
        side("torch", 1, [50.0, 49.0, 51.0], kind="torch", device="gpu"),
        side("torch_compile", 1, [80.0, 79.0, 81.0], kind="torch", device="gpu"),
    ]
    made["accuracy"]["runs"] = [
        {"side": "serial-1", "seconds": 4.0, "curve": [[2.0, 1.0, 0.8], [4.0, 2.0, 0.91]]},
        {"side": "rows-2", "seconds": 2.0, "curve": [[1.0, 1.0, 0.8], [2.0, 2.0, 0.91]]},
        {"side": "torch-1", "seconds": None, "curve": [[3.0, 1.0, 0.5]]},
    ]
    return made


@pytest.fixture
def results_beside_a_gpu() -> dict[str, Any]:
    """A comparison of ranks on two cores with one GPU, complete."""
    made = copy.deepcopy(RESULTS)
    made |= {"baseline": "gpu", "host": HOST | {"gpus": ["A GPU"]}}
    ours = [each for each in made["sides"] if each["kind"] == "ours"]
    theirs = [side("torch", 1, [500.0, 490.0, 510.0], kind="torch", device="gpu")]
    made["sides"] = [ours[0], side("gpu", 1, [1000.0, 990.0, 1010.0], device="gpu"), *ours[1:], *theirs]
    made["accuracy"]["runs"][2:] = [{"side": "gpu-1", "seconds": 1.0, "curve": [[1.0, 2.0, 0.92]]}]
    return made
