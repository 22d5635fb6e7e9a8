"""The training loop that the tests of nettorrent_mpi.torch share."""

from __future__ import annotations

from typing import Any


def loss_of(model: Any, x: Any, y: Any) -> Any:
    """Return the loss of a model whose outputs are logits, or an object that has them."""
    import torch

    found = model(x)
    return torch.nn.functional.cross_entropy(getattr(found, "logits", found), y)


def train(run: Any, steps: int, clip: float | None = None) -> None:
    """Train until `steps` steps are done of the run's own data."""
    import torch

    for _ in run.epochs(1000):
        for x, y in run.batches():
            run.optimizer.zero_grad()
            loss_of(run.model, x, y).backward()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(run.model.parameters(), clip)
            run.optimizer.step()
            if run.step == steps:
                return
