"""The networks whose steps are timed against PyTorch. Mini-batches divide the rows, so that all steps are alike."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OURS, EAGER, COMPILED = "nettorrent_mpi", "PyTorch", "PyTorch, compiled"
SIDES = (OURS, EAGER, COMPILED)
IMAGES, COLORS = "shape: [28, 28, 1]", "shape: [32, 32, 3]"


@dataclass(frozen=True)
class StepCase:
    """A network, its mini-batch and its type of numbers; `work`: floating-point operations of a step, where the rate is
    to be told."""

    name: str
    config: str
    batch: int
    dtype: str = "float32"
    data: str = ""
    work: float = 0.0

    def changes(self, device: str, small: bool = False) -> list[str]:
        """Return the changes of the configuration; `small`: a mini-batch that a CPU, too, takes quickly."""
        batch = 16 if small else self.batch
        rows = 4 * batch if small else 50 * batch
        changes = [
            f"train.batch_size={batch}",
            "train.micro_batches=1",
            "train.schedule=constant",
            f"dtype={self.dtype}",
        ]
        changes += ["train.epochs=null", "train.steps=1000000", "train.evaluate_every=1000000", f"device={device}"]
        if self.data:
            augment = ", augment: [flip, crop]" if "resnet" in self.config else ""
            changes.append(f"data={{name: synthetic, rows: {rows}, test_rows: 0, {self.data}, classes: 10{augment}}}")
        return changes

    def load(self, device: str, small: bool = False) -> Any:
        """Return the configuration."""
        from nettorrent_mpi.config import reading

        return reading.load(str(ROOT / self.config), self.changes(device, small))


CASES = (
    StepCase("mnist_wide, 1024", "configs/mnist_wide.yaml", 1024, data=IMAGES),
    StepCase("CNN, 128", "configs/cifar.yaml", 128, data=COLORS),
    StepCase("CNN, 1024", "configs/cifar.yaml", 1024, data=COLORS),
    StepCase("8192 x 4", "benchmarks/gpu/wide.yaml", 8192, "bfloat16", work=2 * (3 * 4 - 1) * 8192.0**3),
    StepCase("ResNet-20, 512", "configs/cifar_resnet.yaml", 512, data=COLORS),
)
SMALL = ("mnist_wide, 1024",)  # those that the host device trains in a test
