"""PyTorch models on all ranks: the exact exchange is the serial training, and replicas agree as their exchange says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402, N812
from mpi4py import MPI  # noqa: E402

import nettorrent_mpi.torch as nt  # noqa: E402
from nettorrent_mpi.plan.errors import LayoutError, UserError  # noqa: E402
from tests.torch_runs import train  # noqa: E402

pytestmark = pytest.mark.usefixtures("double_precision")
ROWS, BATCH, STEPS = 103, 16, 20
size, rank = MPI.COMM_WORLD.size, MPI.COMM_WORLD.rank


def rows() -> tuple[Any, Any]:
    random = np.random.default_rng(0)
    return torch.tensor(random.normal(size=(ROWS, 3, 6, 6))), torch.tensor(random.integers(0, 5, ROWS))


def network() -> Any:
    nn = torch.nn
    convolution = nn.Conv2d(3, 7, 3).to(memory_format=torch.channels_last)
    return nn.Sequential(convolution, nn.ReLU(), nn.Flatten(), nn.Linear(112, 33), nn.Tanh(), nn.Linear(33, 5))


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "momentum": lambda model: torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-3),
    "adam": lambda model: torch.optim.Adam(model.parameters(), 0.01),
}


def serial(model: Any, optimizer: Any, data: Any, steps: int = STEPS, clip: float | None = None) -> Any:
    """Train a copy of the model on this rank alone."""
    made = nt.parallelize(data, model, optimizer, batch_size=BATCH, comm=MPI.COMM_SELF)
    train(made, steps, clip)
    made.close()
    return model


def vector(model: Any) -> Any:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def close_to(model: Any, other: Any, limit: float = 1e-10) -> None:
    ours, theirs = vector(model), vector(other)
    assert float((ours - theirs).norm() / theirs.norm()) <= limit


def equal_everywhere(model: Any, limit: float = 0.0) -> None:
    whole = vector(model).numpy()
    first = MPI.COMM_WORLD.bcast(whole)
    assert np.abs(whole - first).max() <= limit * np.abs(first).max()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_exact_is_the_serial_training(kind: str) -> None:
    model = network()
    alone = serial(copied := copy.deepcopy(model), OPTIMIZERS[kind](copied), rows())
    if rank:  # rank 0's weights count
        with torch.no_grad():
            model[3].weight.add_(rank)
    run = nt.parallelize(rows(), model, OPTIMIZERS[kind](model), batch_size=BATCH)
    train(run, STEPS)
    close_to(model, alone)
    equal_everywhere(model)
    run.close()


def test_by_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients travel in rings, in several arrays, as between nodes."""
    monkeypatch.setattr("nettorrent_mpi.torch.gradients.share", lambda world, asks: ([], "none"))
    monkeypatch.setattr("nettorrent_mpi.torch.gradients.FULL", 8000)
    monkeypatch.setattr("nettorrent_mpi.torch.gradients.LEAST_SHARD", 512)
    model = network()
    alone = serial(copied := copy.deepcopy(model), OPTIMIZERS["adam"](copied), rows(), clip=0.5)
    run = nt.parallelize(rows(), model, OPTIMIZERS["adam"](model), batch_size=BATCH)
    train(run, STEPS, clip=0.5)
    close_to(model, alone)
    equal_everywhere(model)
    run.close()


def test_fewer_rows_than_ranks() -> None:
    """Ranks without a row get some that weigh nothing."""
    data = tuple(each[: 8 + 1] for each in rows())
    model = network()
    optimizer = OPTIMIZERS["momentum"](copied := copy.deepcopy(model))
    alone = nt.parallelize(data, copied, optimizer, batch_size=8, comm=MPI.COMM_SELF)
    train(alone, 6)
    run = nt.parallelize(data, model, OPTIMIZERS["momentum"](model), batch_size=8)
    train(run, 6)
    close_to(model, copied)
    alone.close()
    run.close()


def test_clipping_sees_the_final_gradients() -> None:
    model = network()
    alone = serial(copied := copy.deepcopy(model), OPTIMIZERS["momentum"](copied), rows(), clip=0.1)
    run = nt.parallelize(rows(), model, OPTIMIZERS["momentum"](model), batch_size=BATCH)
    train(run, STEPS, clip=0.1)
    close_to(model, alone)
    run.close()


@pytest.mark.parametrize("quiet", [False, True])
def test_several_backwards_before_a_step_are_summed(quiet: bool) -> None:
    """Whether each is averaged by itself, or only their sum (`no_sync`)."""
    x, y = rows()
    model, alone = network(), None
    alone = copy.deepcopy(model)
    optimizers = [OPTIMIZERS["momentum"](each) for each in (model, alone)]
    run = nt.parallelize((x, y), model, optimizers[0], batch_size=BATCH)
    passes = 0
    for _ in run.epochs(2):
        for a, b in run.batches():
            passes += 1
            if quiet and passes % 2:
                with run.no_sync():
                    F.cross_entropy(model(a), b).backward()
            else:
                F.cross_entropy(model(a), b).backward()
            if passes % 2 == 0:
                optimizers[0].step()
                optimizers[0].zero_grad()
    single = nt.parallelize((x, y), alone, optimizers[1], batch_size=BATCH, comm=MPI.COMM_SELF)
    passes = 0
    for _ in single.epochs(2):
        for a, b in single.batches():
            passes += 1
            F.cross_entropy(alone(a), b).backward()
            if passes % 2 == 0:
                optimizers[1].step()
                optimizers[1].zero_grad()
    close_to(model, alone)
    single.close()
    run.close()


class Branches(torch.nn.Module):
    """Uses one of two layers on each rank, and one nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.never = (torch.nn.Linear(4, 4) for _ in range(3))
        self.tied = torch.nn.Linear(4, 4)
        self.tied.weight = self.first.weight
        self.frozen = torch.nn.Linear(4, 4).requires_grad_(False)

    def forward(self, x: Any, which: int) -> Any:
        return self.frozen((self.first if which == 0 else self.second)(self.tied(x)))


def test_parameters_without_gradients() -> None:
    """Parameters without a gradient on some ranks count as zero there; without one anywhere they stay without."""
    model = Branches()
    alone = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    run = nt.parallelize(None, model, optimizer)
    inputs = [torch.ones(2, 4) * (r + 1) for r in range(size)]
    model(inputs[rank], rank % 2).square().mean().backward()
    sum(alone(inputs[r], r % 2).square().mean() / size for r in range(size)).backward()
    for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12)
    run.close()


def test_loaders_of_other_lengths_do_not_hang() -> None:
    for wrapped in (True, False):
        model = torch.nn.Linear(4, 2)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        run = nt.parallelize(None, model, optimizer)
        loader = [torch.ones(3, 4) * i for i in range(2 + rank)]
        for _ in run.epochs(2):
            for x in run.batches(loader) if wrapped else loader:
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
        assert run.step == 2 * (1 + size)
        equal_everywhere(model)
        run.close()


@pytest.mark.ranks(4)
@pytest.mark.parametrize("known", [True, False])
def test_ranks_of_a_replica_weigh_alike_while_they_have_rows(known: bool) -> None:
    """Whether or not loaders tell their lengths: the second rank of each replica has one mini-batch, the first two."""
    model = torch.nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    run = nt.parallelize(None, model, optimizer, exchange="none", replica_size=2)
    batches = [torch.full((1, 1), 10.0 * rank + i) for i in range(2 - rank % 2)]
    found = []
    for x in run.batches(batches if known else iter(batches)):
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
        found.append(float(model.weight.grad))
    first = 10.0 * (rank - rank % 2)
    assert found == [first + 5, first + 1]
    run.close()


def test_gossip_of_all_with_all_agrees() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    gossip = {"gossip": {"pairing": "complete", "overlap": False, "deadline": "none", "part": 1}}
    run = nt.parallelize(rows(), model, optimizer, batch_size=BATCH, exchange=gossip)
    train(run, STEPS)
    equal_everywhere(model, 1e-12)
    run.close()


@pytest.mark.parametrize(
    "exchange",
    ["gossip", "none", {"gossip": {"mix": "push_sum"}}, {"gossip": {"average": ["parameters", "optimizer"]}}],
)
def test_replicas_come_together(exchange: Any) -> None:
    model = network()
    run = nt.parallelize(rows(), model, OPTIMIZERS["adam"](model), batch_size=BATCH, exchange=exchange)
    train(run, 12)
    assert run.replicas == size
    with run.averaged():
        equal_everywhere(model)
        shown = vector(model)
    run.average()
    equal_everywhere(model)
    torch.testing.assert_close(vector(model), shown, rtol=1e-9, atol=1e-12)
    run.close()


@pytest.mark.ranks(4)
def test_replicas_of_two_ranks_are_exact_inside() -> None:
    model = network()
    run = nt.parallelize(
        rows(), model, OPTIMIZERS["momentum"](model), batch_size=BATCH, exchange="gossip", replica_size=2
    )
    train(run, STEPS)
    whole = MPI.COMM_WORLD.allgather(vector(model).numpy())
    assert np.array_equal(whole[0], whole[1])
    assert np.array_equal(whole[2], whole[3])
    run.average()
    equal_everywhere(model)
    run.close()


def test_elite_takes_the_best() -> None:
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    run = nt.parallelize(None, model, optimizer, exchange="elite")
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 4) * (rank + 1)).square().mean().backward()
        optimizer.step()
    best = size - 1
    wanted = MPI.COMM_WORLD.bcast(vector(model).numpy(), root=best)
    assert run.judge(1.0 if rank == best else 2.0) == best
    assert np.array_equal(vector(model).numpy(), wanted) or size == 1
    state = optimizer.state[model.weight]["momentum_buffer"].numpy()
    assert np.array_equal(state, MPI.COMM_WORLD.bcast(state, root=best))
    run.close()


def test_mistakes_are_told_to_all() -> None:
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(UserError, match="batch_size is missing"):
        nt.parallelize(rows(), model, optimizer)
    with pytest.raises(UserError, match="exchange"):
        nt.parallelize(None, model, optimizer, exchange="gossipp")
    with pytest.raises(LayoutError, match="replica_size is 7"):
        nt.parallelize(None, model, optimizer, exchange="gossip", replica_size=7)
    other = torch.optim.SGD(torch.nn.Linear(4, 2).parameters(), 0.1)
    with pytest.raises(UserError, match="not the model's"):
        nt.parallelize(None, model, other)


@pytest.mark.ranks(2, 3, 4, 5, 8)
def test_another_model_on_one_rank_is_told() -> None:
    model = torch.nn.Linear(4, 2 + (rank == 1))
    with pytest.raises(UserError, match="rank 1 has another model"):
        nt.parallelize(None, model, torch.optim.SGD(model.parameters(), 0.1))


@pytest.mark.ranks(2, 3, 4, 5, 8)
def test_sparse_gradients_are_told() -> None:
    model = torch.nn.Embedding(5, 3, sparse=True)
    run = nt.parallelize(None, model, torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(UserError, match="sparse gradient"):
        model(torch.tensor([1, 2])).sum().backward()
    run.close()


def test_a_layer_that_is_replaced_is_told() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    run = nt.parallelize(None, model, optimizer)
    model[1] = torch.nn.Linear(4, 2)
    with pytest.raises(UserError, match="weight is new in the model"):
        optimizer.step()
    run.close()


EXCHANGES: dict[str, Any] = {
    "allreduce": "allreduce",
    "gossip": {"gossip": {"deadline": "none", "part": 0.5}},
    "push-sum": {"gossip": {"deadline": "none", "mix": "push_sum", "part": 1}},
    "elite": "elite",
}


@pytest.mark.parametrize("kind", EXCHANGES)
def test_resumed_is_as_if_never_stopped(kind: str, shared_path: Any) -> None:
    """On as many ranks bit for bit, in the middle of an epoch."""

    def begin() -> Any:
        torch.manual_seed(rank)
        model = network()
        return nt.parallelize(rows(), model, OPTIMIZERS["adam"](model), batch_size=BATCH, exchange=EXCHANGES[kind])

    whole = begin()
    train(whole, 17)
    stopped = begin()
    assert not stopped.resume(shared_path)
    train(stopped, 9)
    stopped.checkpoint(shared_path)
    stopped.close()
    resumed = begin()
    with torch.no_grad():
        for p in resumed.model.parameters():
            p.zero_()
    assert resumed.resume(shared_path)
    assert (resumed.step, resumed.epoch, resumed.batch) == (9, 1, 2)
    train(resumed, 17)
    assert np.array_equal(vector(resumed.model).numpy(), vector(whole.model).numpy())
    resumed.close()
    whole.close()


@pytest.mark.parametrize("exchange", ["allreduce", "gossip"])
def test_fewer_ranks_go_on(exchange: str, shared_path: Any, world: Any) -> None:
    """The exact exchange is the serial training all the same; replicas go on from their average."""
    model = network()
    run = nt.parallelize(rows(), model, OPTIMIZERS["adam"](model), batch_size=BATCH, exchange=exchange)
    train(run, 9)
    run.checkpoint(shared_path)
    with run.averaged():
        average = vector(model)
    run.close()
    fewer = world.Split(rank < max(size - 1, 1), rank)
    if rank < max(size - 1, 1):
        torch.manual_seed(3)
        again = network()
        resumed = nt.parallelize(
            rows(), again, OPTIMIZERS["adam"](again), batch_size=BATCH, exchange=exchange, comm=fewer
        )
        resumed.resume(shared_path)
        if size > 1 and exchange == "gossip":
            torch.testing.assert_close(vector(again), average, rtol=1e-12, atol=1e-14)
        train(resumed, STEPS)
        if exchange == "allreduce":
            torch.manual_seed(3)
            alone = serial(copied := network(), OPTIMIZERS["adam"](copied), rows())
            close_to(again, alone)
        resumed.close()
    fewer.Free()


@pytest.mark.ranks(2, 3, 4, 5, 8)
def test_parts_of_layers_are_not_averaged() -> None:
    model = nt.split(torch.nn.Sequential(torch.nn.Linear(4, 2)), {"0": "out"})
    with pytest.raises(UserError, match="rank 1 has another part of the split layers"):
        nt.parallelize(None, model, torch.optim.SGD(model.parameters(), 0.1))
