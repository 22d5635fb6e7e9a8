"""stopped_torch.py FOLDER STEPS EXCHANGE: a PyTorch loop whose steps are timed (standstill.TimedSteps), and which may
be stopped. Each rank writes its weights at the end, after `run.average`, to FOLDER/weights.RANK.npy."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch

import nettorrent_mpi.torch as nt
from tests.standstill import TimedSteps

folder, count, exchange = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
torch.manual_seed(0)
x = torch.randn(64 * count, 12)
y = (x @ torch.randn(12, 4)).argmax(1)
model = torch.nn.Sequential(torch.nn.Linear(12, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
run = nt.parallelize((x, y), model, optimizer, batch_size=64, exchange=exchange)
timed = TimedSteps(folder, run.rank, 0.004)
for _ in run.epochs(1):
    for a, b in run.batches():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(a), b)
        loss.backward()
        optimizer.step()
        timed.done()
        if exchange == "elite" and run.step % 100 == 0:
            run.judge(loss)
run.report(loss)
run.average()
assert run.step == count
np.save(folder / f"weights.{run.rank}.npy", torch.cat([p.detach().reshape(-1) for p in model.parameters()]).numpy())
