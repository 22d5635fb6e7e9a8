"""A stand-in for dpwa's PyTorch adapter: pair-wise averaging, with its configuration file, over MPI.

dpwa: github.com/loudinthecloud/dpwa, after Jin et al. 2016, "How to scale distributed deep learning?" (arXiv
1611.04581). The factor f, its methods and the age of a model are dpwa's (dpwa/interpolation.py, of the linear and
loss_divergence methods before its commit 0242459; dpwa/dpwa.py, DpwaConnection). These are not, with the reason:

- All begin with rank 0's parameters; there each node has its own, and averages of networks that have nothing in common
  are worth nothing.
- A merge is x += f * (theirs - own when it was sent). dpwa/adapters/pytorch.py has x = f * theirs + (1 - f) * x, with x
  after the step, which loses the part f of every step.
- A rank sends to one that it draws, instead of asking one: nobody needs a thread that answers. With two ranks it is the
  same, except that both of a pair exchange or none, if fetch_probability is below 1. With more, a round brings one
  message on average; several share f equally.
- After `timeout_ms` from update_send, less for ranks that were late before (in proportion to dpwa's score), the loop
  goes on; dpwa asks another peer, or waits on. What comes late is merged in a later round, with f / (1 + rounds late).
  A rank that is behind gets the messages of its own rounds, not the latest.
- 0 / 0 counts as 1/2, and of a loss that is inf or nan the model takes the other's parameters (f = 1) and the other
  nothing: dpwa would divide by 0, or spread nan. Losses below 0, whose factors are no parts, are refused.
- Buffers, which dpwa leaves apart, are averaged with `average`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nettorrent_mpi.comm.activity import NOW
from nettorrent_mpi.config.dpwa_file import DpwaFile, read_dpwa
from nettorrent_mpi.plan.errors import warn
from nettorrent_mpi.torch.models import number_of
from nettorrent_mpi.torch.run_ranks import RunRanks, world_of
from nettorrent_mpi.torch.shared_model import SharedModel


class Dpwa:
    """A Dpwa averages a model with those of other ranks, one at a time.

    for x, y in loader:
        dpwa.update_send(loss)      # what others get of this rank: parameters, its age and its latest loss
        ...                         # forward, backward, optimizer.step()
        dpwa.update_wait(loss)      # merges what has come from another rank

    All ranks make one, which gives rank 0's parameters to all, and call `close` or end together. The methods raise
    UserError for a loss below 0, and for parameters that were replaced instead of changed in place.
    """

    def __init__(self, model: torch.nn.Module, config: str | Path, *, seed: int = 1, comm: Any = None):
        """config: dpwa's file (config/dpwa_file.py). Raises ConfigError, on all ranks alike."""
        world = world_of(comm)
        found: DpwaFile = world.once(lambda: read_dpwa(str(config)))
        if world.rank == 0 and found.nodes not in (None, world.size):
            warn(f"{config} names {found.nodes} nodes, and MPI has started {world.size} ranks: the ranks count")
        optimizer = torch.optim.SGD(model.parameters(), 0.0)  # the script's own is not needed
        with RunRanks.starting(world, found.exchange) as self._ranks:
            self._shared = SharedModel(self._ranks, model, optimizer, lambda step: 0.0, seed=seed, by_hand=True)

    @property
    def rank(self) -> int:
        """This rank's number."""
        return self._ranks.world.rank

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self._ranks.world.size

    def update_send(self, loss: Any) -> None:
        """Send this rank's parameters, age and loss to a peer, with the configured probability. Does not wait."""
        self._shared.open_round(number_of(loss))

    def update_wait(self, loss: Any) -> None:
        """Merge the parameters of a peer that has sent its own, after at most `timeout_ms`."""
        self._shared.close_round(number_of(loss))

    def average(self) -> None:
        """Give all ranks the average of their parameters and buffers."""
        self._shared.average()

    @NOW.during("the end")
    def close(self) -> None:
        """Let the model go. All ranks call."""
        self._shared.close()
        self._ranks.close()
