"""Models as people have them, unmodified: the exact exchange against PyTorch's DistributedDataParallel and the serial
training."""

from __future__ import annotations

import copy
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from mpi4py import MPI  # noqa: E402

import nettorrent_mpi.torch as nt  # noqa: E402
from tests.torch_runs import loss_of, train  # noqa: E402

pytestmark = [pytest.mark.usefixtures("double_precision"), pytest.mark.slow]  # transformers takes seconds to load
STEPS = 20
size, rank = MPI.COMM_WORLD.size, MPI.COMM_WORLD.rank
OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "momentum": lambda model: torch.optim.SGD(model.parameters(), 0.05, momentum=0.9),
    "adam": lambda model: torch.optim.Adam(model.parameters(), 0.001),
}


def perceptron() -> Any:
    return torch.nn.Sequential(torch.nn.Linear(24, 33), torch.nn.ReLU(), torch.nn.Linear(33, 5))


def bert() -> Any:
    """Tiny, and with layers that this use of it leaves without gradients (position_ids, the pooler's are used)."""
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=5,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def resnet() -> Any:
    config = transformers.ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=5
    )
    return transformers.ResNetForImageClassification(config)


def inputs_of(kind: str, rows: int) -> Any:
    generator = torch.Generator().manual_seed(1)
    if kind == "bert":
        return torch.randint(0, 50, (rows, 9), generator=generator)
    shape = (rows, 24) if kind == "perceptron" else (rows, 3, 16, 16)
    return torch.randn(*shape, generator=generator)


MODELS: dict[str, Callable[[], Any]] = {"perceptron": perceptron, "bert": bert, "resnet": resnet}


@pytest.fixture(scope="module")
def gloo() -> Iterator[None]:
    """PyTorch's own processes, for DistributedDataParallel."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = MPI.COMM_WORLD.bcast(free.getsockname()[1])
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=size)
    yield
    torch.distributed.destroy_process_group()


def distance(model: Any, other: Any) -> float:
    ours, theirs = (torch.cat([p.detach().reshape(-1) for p in each.parameters()]) for each in (model, other))
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", MODELS)
def test_equal_to_ddp(kind: str, optimizer: str, gloo: None) -> None:
    """The training is DDP's where each rank has as many rows."""
    rows, batch = 6 * size, 2 * size
    x, y = inputs_of(kind, rows), torch.arange(rows) % 5
    ours = MODELS[kind]()
    theirs = torch.nn.parallel.DistributedDataParallel(
        copy.deepcopy(ours), broadcast_buffers=False, find_unused_parameters=True
    )
    optimizers = [OPTIMIZERS[optimizer](each) for each in (ours, theirs)]
    run = nt.parallelize((x, y), ours, optimizers[0], batch_size=batch, shuffle=False)
    train(run, STEPS)
    for step in range(STEPS):
        first = step % 3 * batch + 2 * rank
        optimizers[1].zero_grad()
        loss_of(theirs, x[first : first + 2], y[first : first + 2]).backward()
        optimizers[1].step()
    assert distance(ours, theirs.module) <= 1e-10
    run.close()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["perceptron", "bert"])
def test_equal_to_serial(kind: str, optimizer: str) -> None:
    """The training is the serial one where rows do not divide, for models without batch norm."""
    x, y = inputs_of(kind, 41), torch.arange(41) % 5
    model = MODELS[kind]()
    alone = copy.deepcopy(model)
    runs = [
        nt.parallelize((x, y), each, OPTIMIZERS[optimizer](each), batch_size=12, comm=comm)
        for each, comm in ((model, None), (alone, MPI.COMM_SELF))
    ]
    for run in runs:
        train(run, STEPS)
    assert distance(model, alone) <= 1e-10
    for run in runs:
        run.close()
