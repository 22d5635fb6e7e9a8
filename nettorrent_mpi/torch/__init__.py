"""Floor 4: networks of PyTorch, trained over MPI by the exchanges of nettorrent_mpi. MPI starts at `parallelize`.

import nettorrent_mpi.torch as nt

run = nt.parallelize((x, y), model, optimizer, batch_size=256, exchange="gossip")
for epoch in run.epochs(10):
    for x, y in run.batches():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    run.report(loss)
run.save("model.pt")
"""

from __future__ import annotations

from nettorrent_mpi.torch.batching import RankSampler
from nettorrent_mpi.torch.dpwa import Dpwa
from nettorrent_mpi.torch.loaded_runs import load_run
from nettorrent_mpi.torch.parallel import ParallelRun, parallelize
from nettorrent_mpi.torch.split_layers import SplitConv2d as Conv2d
from nettorrent_mpi.torch.split_layers import SplitLinear as Linear
from nettorrent_mpi.torch.split_layers import split_parameters, whole
from nettorrent_mpi.torch.split_model import clip_grad_norm_, split, whole_state

__all__ = [
    "Conv2d",
    "Dpwa",
    "Linear",
    "ParallelRun",
    "RankSampler",
    "clip_grad_norm_",
    "load_run",
    "parallelize",
    "split",
    "split_parameters",
    "whole",
    "whole_state",
]
