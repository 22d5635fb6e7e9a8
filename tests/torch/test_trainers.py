"""Loops of somebody else around `parallelize`: Lightning's Trainer and Accelerate. Each rank's is alone for itself,
whatever the launcher's variables say, and the training is the plain loop's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="PyTorch is not installed")

COMMON = """
import copy, os, sys, torch
from torch.nn.functional import cross_entropy
torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)
torch.manual_seed(3)
x, y = torch.randn(43, 6), torch.arange(43) % 5
EPOCHS, BATCH = 3, 8

def network():
    return torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 5))

def adam(model):
    return torch.optim.Adam(model.parameters(), 0.01)

def plain(model, rows, every=1, clip=None):
    optimizer, passes = adam(model), 0
    for epoch in range(EPOCHS):
        rows.set_epoch(epoch)
        for chosen in rows:
            passes += 1
            (cross_entropy(model(x[chosen]), y[chosen]) / every).backward()
            if passes % every == 0:
                if clip:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
    return model

def close_to(ours, theirs):
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)

def counted(run):
    \"\"\"The number of averages, one for each backward pass, and of steps.\"\"\"
    numbers = {"averages": 0, "steps": 0}
    inside = run._shared.gradients.average
    def average():
        numbers["averages"] += 1
        inside()
    run._shared.gradients.average = average
    run.optimizer.register_step_post_hook(lambda *_: numbers.update(steps=numbers["steps"] + 1))
    return numbers
"""

LIGHTNING = """
import pytorch_lightning as L
from pytorch_lightning.plugins.environments import LightningEnvironment
import nettorrent_mpi.torch as nt
from nettorrent_mpi.plan.blocks import Span
from nettorrent_mpi.torch.batching import RankPlace

class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.network, self.run = network(), None

    def training_step(self, batch, index):
        return cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self):
        return adam(self)

class InHook(Module):
    \"\"\"Has a loader of its own, and calls parallelize where Lightning asks for the optimizer.\"\"\"

    def configure_optimizers(self):
        optimizer = adam(self)
        self.run = nt.parallelize(None, self, optimizer)
        self.numbers = counted(self.run)
        return optimizer

os.environ.update(SLURM_NTASKS="7", SLURM_JOB_NAME="batch", SLURM_JOB_ID="1", SLURM_NTASKS_PER_NODE="7")  # as in sbatch
folder = sys.argv[1]

def trainer(first, **options):
    return L.Trainer(
        accelerator="cpu", devices=1, plugins=[LightningEnvironment()], max_epochs=EPOCHS, default_root_dir=folder,
        enable_model_summary=False, **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), first),
        **options,
    )

alone = RankPlace(0, 1, Span(0, 1))
for options, every, clip in ({}, 1, None), ({"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}, 2, 0.1):
    module = Module()
    wanted = plain(copy.deepcopy(module.network), nt.RankSampler(43, BATCH, alone), every, clip)
    optimizer = module.configure_optimizers()
    module.configure_optimizers = lambda: optimizer
    run = nt.parallelize((x, y), module, optimizer, batch_size=BATCH)
    numbers = counted(run)
    fitted = trainer(run.rank == 0 and every == 1, **options)
    fitted.fit(module, run.loader())
    assert (fitted.world_size, fitted.global_rank, fitted.global_step) == (1, 0, 18 // every)
    close_to(module.network, wanted)
    assert numbers == {"averages": 18, "steps": 18 // every}, numbers
    run.close()

module = InHook()
data = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 40, 8)]  # the same mini-batches on every rank
class Whole:
    set_epoch = staticmethod(lambda epoch: None)
    __iter__ = lambda self: iter(torch.arange(40).split(8))
wanted = plain(copy.deepcopy(module.network), Whole())
trainer(False).fit(module, torch.utils.data.DataLoader(data, batch_size=None))
assert module.numbers == {"averages": 15, "steps": 15}, module.numbers
close_to(module.network, wanted)
"""

ACCELERATE = """
import nettorrent_mpi.torch as nt
from accelerate import Accelerator
from nettorrent_mpi.plan.blocks import Span
from nettorrent_mpi.torch.batching import RankPlace

alone = RankPlace(0, 1, Span(0, 1))
for every in 1, 2:
    for prepared in "before", "after":
        model = network()
        wanted = plain(copy.deepcopy(model), nt.RankSampler(43, BATCH, alone), every)
        accelerator = Accelerator(gradient_accumulation_steps=every)
        assert (accelerator.num_processes, accelerator.device.type) == (1, "cpu")
        optimizer = adam(model)
        if prepared == "before":
            model, optimizer = accelerator.prepare(model, optimizer)
        run = nt.parallelize((x, y), model, optimizer, batch_size=BATCH)
        numbers = counted(run)
        if prepared == "after":
            model, optimizer = accelerator.prepare(model, optimizer)
        for epoch in run.epochs(EPOCHS):
            for a, b in run.batches():
                with accelerator.accumulate(model):
                    accelerator.backward(cross_entropy(model(a), b))
                    optimizer.step()
                    optimizer.zero_grad()
        close_to(model, wanted)
        assert next(iter(model.state_dict())) == "0.weight"
        assert numbers == {"averages": 18, "steps": 18 // every}, numbers
        run.close()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("mpi", "ranks"), [("openmpi", 3), ("mpich", 2)])
def test_lightning(mpirun: Callable[..., Any], tmp_path: Path, mpi: str, ranks: int) -> None:
    pytest.importorskip("pytorch_lightning")
    done = mpirun(ranks, ["-c", COMMON + LIGHTNING, tmp_path], mpi=mpi, timeout=300)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert len(list(tmp_path.rglob("*.ckpt"))) == 1  # rank 0's, of the run that logged


@pytest.mark.slow
@pytest.mark.parametrize(("mpi", "ranks"), [("openmpi", 3), ("mpich", 2)])
def test_accelerate(mpirun: Callable[..., Any], mpi: str, ranks: int) -> None:
    pytest.importorskip("accelerate")
    env = {"ACCELERATE_TORCH_DEVICE": "cpu"}
    done = mpirun(ranks, ["-c", COMMON + ACCELERATE], mpi=mpi, env=env, timeout=300)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
