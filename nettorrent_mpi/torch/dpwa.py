"""A stand-in for dpwa's PyTorch adapter: pair-wise averaging, with its configuration file, over MPI.

dpwa: github.com/loudinthecloud/dpwa, after Jin et al. 2016, "How to scale distributed deep learning?" (arXiv
1611.04581). Unlike there, a merge moves the parameters by a fraction of the difference at the time of sending, so that
no part of the step in between is lost; and buffers are averaged with `average`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nettorrent_mpi.config.dpwa_file import DpwaFile, read_dpwa
from nettorrent_mpi.plan.errors import warn
from nettorrent_mpi.torch.models import world_of
from nettorrent_mpi.torch.parallel import ParallelRun


class Dpwa:
    """A Dpwa averages a model with those of other ranks, one at a time.

    for x, y in loader:
        dpwa.update_send(loss)      # what others get of this rank: parameters, its age and its latest loss
        ...                         # forward, backward, optimizer.step()
        dpwa.update_wait(loss)      # merges what has come from another rank

    All ranks make one, after rank 0's parameters were given to all, and call `close` or end together.
    """

    def __init__(self, model: torch.nn.Module, config: str | Path, *, seed: int = 1, comm: Any = None):
        """config: dpwa's file (config/dpwa_file.py). Raises ConfigError, on all ranks alike."""
        world = world_of(comm)
        found: DpwaFile = world.once(lambda: read_dpwa(str(config)))
        if world.rank == 0 and found.nodes not in (None, world.size):
            warn(f"{config} names {found.nodes} nodes, and MPI has started {world.size} ranks: the ranks count")
        optimizer = torch.optim.SGD(model.parameters(), 0.0)  # the script's own is not needed
        self._run = ParallelRun(
            world, None, model, optimizer, batch_size=None, exchange=found.gossip, replica_size=None, shuffle=False,
            seed=seed, loading={},
        )  # fmt: skip

    @property
    def rank(self) -> int:
        """This rank's number."""
        return self._run.rank

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self._run.size

    def update_send(self, loss: Any) -> None:
        """Send this rank's parameters, age and loss to a peer, with the configured probability. Does not wait."""
        self._run.open_round(float(loss))

    def update_wait(self, loss: Any) -> None:
        """Merge the parameters of a peer that has sent its own, after at most `timeout_ms`."""
        self._run.close_round(float(loss))

    def average(self) -> None:
        """Give all ranks the average of their parameters and buffers."""
        self._run.average()

    def close(self) -> None:
        """Let the model go. All ranks call."""
        self._run.close()
