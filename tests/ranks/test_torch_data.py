"""What people give `parallelize` as data, and what they do to models afterwards: each is the serial training, or one
clear error on all ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mpi4py import MPI  # noqa: E402
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset  # noqa: E402

import nettorrent_mpi.torch as nt  # noqa: E402
from nettorrent_mpi.plan.blocks import Span  # noqa: E402
from nettorrent_mpi.plan.errors import LaunchError, UserError  # noqa: E402
from nettorrent_mpi.torch.batching import RankPlace  # noqa: E402
from tests.torch_runs import train  # noqa: E402

pytestmark = pytest.mark.usefixtures("double_precision")
ROWS, BATCH, STEPS = 43, 8, 14  # 14 steps: two epochs and some
size, rank = MPI.COMM_WORLD.size, MPI.COMM_WORLD.rank


def rows(count: int = ROWS) -> tuple[Any, Any]:
    random = np.random.default_rng(0)
    return torch.tensor(random.normal(size=(count, 6))), torch.tensor(random.integers(0, 5, count))


def network() -> Any:
    return torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 5))


def momentum(model: Any) -> Any:
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)


def vector(model: Any) -> Any:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def close_to(model: Any, other: Any, limit: float = 1e-10) -> None:
    ours, theirs = vector(model), vector(other)
    assert float((ours - theirs).norm() / theirs.norm()) <= limit


class Mapped(Dataset[Any]):
    def __init__(self) -> None:
        self.x, self.y = rows()

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.x[index], self.y[index]


class Streamed(IterableDataset[Any]):
    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        return zip(*rows(), strict=True)


def halved(found: list[tuple[Any, Any]]) -> tuple[Any, Any]:
    """A collate_fn whose effect is seen."""
    return torch.stack([x / 2 for x, _ in found]), torch.stack([y for _, y in found])


def as_arrays() -> tuple[Any, Any]:
    x, y = rows()
    return x.numpy(), y.numpy()


DATA: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "tensors": (rows, {}),
    "arrays": (as_arrays, {}),
    "map-style": (Mapped, {}),
    "map-style, in order": (Mapped, {"shuffle": False}),
    "map-style, collated": (Mapped, {"collate_fn": halved, "pin_memory": False}),
    "a list of rows": (lambda: list(zip(*rows(), strict=True)), {}),
    "streamed": (Streamed, {}),
    "streamed, collated": (Streamed, {"collate_fn": halved}),
    "streamed with options": (Streamed, {"timeout": 0, "collate_fn": halved}),
}


def by_hand(model: Any, kind: str) -> None:
    """Train a model as a script without this package does, in the order of `run.batches()`."""
    x, y = rows()
    if DATA[kind][1].get("collate_fn"):
        x = x / 2
    optimizer = momentum(model)
    order = nt.RankSampler(ROWS, BATCH, RankPlace(0, 1, Span(0, 1)), shuffle=DATA[kind][1].get("shuffle", True))
    step = 0
    while True:
        order.set_epoch(step // len(order))
        for chosen in order if "streamed" not in kind else torch.arange(ROWS).split(BATCH):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
            step += 1
            if step == STEPS:
                return


@pytest.mark.parametrize("kind", DATA)
def test_data_of_every_kind_is_the_serial_training(kind: str) -> None:
    model = network()
    by_hand(alone := copy.deepcopy(model), kind)
    make, options = DATA[kind]
    run = nt.parallelize(make(), model, momentum(model), batch_size=BATCH, **options)
    train(run, STEPS)
    close_to(model, alone)
    run.close()


def test_a_single_tensor_and_rows_in_order() -> None:
    """One tensor or array yields tensors, and with shuffle=False all ranks together have the rows in their order."""
    for data in (torch.arange(ROWS), np.arange(ROWS), [int(i) for i in range(ROWS)]):
        model = torch.nn.Linear(1, 1)
        run = nt.parallelize(data, model, momentum(model), batch_size=BATCH, shuffle=False)
        found = MPI.COMM_WORLD.allgather([x.tolist() for x in run.batches()])
        whole = range(ROWS)
        for number, parts in enumerate(zip(*found, strict=True)):
            wanted = list(whole[number * BATCH : (number + 1) * BATCH])
            joined = [row for part in parts for row in part]
            assert joined[: len(wanted)] == wanted  # then rows that weigh nothing
        run.close()


def test_own_loader_with_a_rank_sampler() -> None:
    """The rows of each mini-batch are divided and weighed by the sampler."""
    model, data = network(), TensorDataset(*rows())
    by_hand(alone := copy.deepcopy(model), "tensors")
    optimizer = momentum(model)
    run = nt.parallelize(None, model, optimizer)
    sampler = nt.RankSampler(len(data), BATCH, run.place)
    loader = DataLoader(data, batch_sampler=sampler)
    shares, weights = [], []
    for _ in run.epochs(3):
        for number, (x, y) in enumerate(run.batches(loader)):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            shares.append(len(x) if sampler.weight(number) else 0)
            weights.append(sampler.weight(number))
            if run.step == STEPS:
                break
        if run.step == STEPS:
            break
    every = np.array(MPI.COMM_WORLD.allgather(shares), float)
    np.testing.assert_allclose(weights, every[rank] * size / every.sum(axis=0), rtol=1e-12)
    assert every.sum(axis=0).tolist() == [8, 8, 8, 8, 8, 3] * 2 + [8, 8]
    close_to(model, alone)
    run.close()


def test_a_loop_of_somebody_else_gets_the_epochs_from_a_loader() -> None:
    """`run.loader()`: each iteration is the next epoch, however the loop ends the one before."""
    model = network()
    by_hand(alone := copy.deepcopy(model), "tensors")
    run = nt.parallelize(rows(), model, momentum(model), batch_size=BATCH)
    loader = run.loader()
    assert len(loader) == 6
    iter(loader)  # one that is not used is no epoch
    while run.step < STEPS:
        batches = iter(loader)
        for _ in range(min(6, STEPS - run.step)):  # does not ask for a seventh one
            x, y = next(batches)
            run.optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            run.optimizer.step()
    assert (run.epoch, run.batch) == (2, 2)
    close_to(model, alone)
    run.close()
    own = nt.parallelize(None, model, momentum(model))
    assert len(own.loader([0] * (2 + rank))) == 1 + size
    with pytest.raises(UserError, match="the number of mini-batches is unknown"):
        own.loader(iter([0]))
    own.close()


def test_means_weigh_rows_and_rank_0_reports(capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.arange(5.0)
    model = torch.nn.Linear(1, 1)
    run = nt.parallelize(x, model, momentum(model), batch_size=5, shuffle=False)
    for part in run.batches():
        assert run.mean(part.mean()) == pytest.approx(2.0, rel=1e-12)
        assert run.mean(float(rank)) == pytest.approx(np.average(range(size), weights=run_shares(5)), rel=1e-12)
        capsys.readouterr()
        assert run.report(part.mean(), square=part.square().mean()) == pytest.approx(2.0, rel=1e-12)
    told = capsys.readouterr().out
    assert told.startswith("epoch 1  step 0  loss 2.0000  square 6.0000  ") if rank == 0 else not told
    assert told.endswith(" rows/s\n") or rank
    run.close()


def run_shares(count: int) -> list[int]:
    return [count // size + (each < count % size) for each in range(size)]


def test_no_sync_keeps_gradients_to_the_rank() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    run = nt.parallelize(None, model, torch.optim.SGD(model.parameters(), 0.0))
    with run.no_sync():
        model(torch.full((1, 1), float(rank))).sum().backward()
    assert float(model.weight.grad) == rank
    model(torch.full((1, 1), 10.0)).sum().backward()
    assert float(model.weight.grad) == pytest.approx(10 + (size - 1) / 2)
    run.close()


def test_the_gradients_of_a_closure_are_averaged() -> None:
    """As Lightning gives them to optimizers; LBFGS compares losses of several evaluations, which have to agree."""
    x, y = rows(40)
    for kind in ("sgd", "lbfgs"):
        models = [network() for _ in range(2)]
        models[1].load_state_dict(models[0].state_dict())
        for model, comm in zip(models, (None, MPI.COMM_SELF), strict=True):
            optimizer = (
                momentum(model)
                if kind == "sgd"
                else torch.optim.LBFGS(model.parameters(), 0.5, max_iter=4, line_search_fn="strong_wolfe")
            )
            run = nt.parallelize((x, y), model, optimizer, batch_size=40, comm=comm)
            averages = 0
            for _ in run.epochs(3):
                for a, b in run.batches():

                    def closure(a: Any = a, b: Any = b, model: Any = model, optimizer: Any = optimizer) -> Any:
                        nonlocal averages
                        averages += 1
                        optimizer.zero_grad()
                        loss = torch.nn.functional.cross_entropy(model(a), b)
                        loss.backward()
                        return loss

                    optimizer.step(closure)
            assert run.step == 3
            assert averages == 3 or kind == "lbfgs"
            run.close()
        close_to(*models)


def raised(told: str, data: Any, error: type[Exception] = UserError, **options: Any) -> None:
    model = torch.nn.Linear(6, 5)
    with pytest.raises(error, match=told):
        nt.parallelize(data, model, momentum(model), **{"batch_size": 4, **options})


def test_data_that_are_none_are_refused_on_all_ranks() -> None:
    x, y = rows()
    data = TensorDataset(x, y)
    raised("the data have no rows", (x[:0], y[:0]))
    raised("the data have no rows", TensorDataset(x[:0]))
    raised("the data have no rows", [])
    raised("the tensors have 43 and 42 rows: give as many of each", (x, y[:-1]))
    raised("the data are a list of 2 tensors: give a tuple", [x, y])
    raised("the data are a str", "digits")
    raised("the data are a dict", {"x": x, "y": y})
    raised("the data are a DataLoader: .* or None with a loader", DataLoader(data))
    raised("the data are no tensors .*: give a tuple", (["a", "b"], y))
    raised("no tensors with rows", torch.tensor(1.0))
    raised("num_worker is an option neither .* did you mean num_workers?", data, num_worker=2)
    raised("exchang is an option neither .* did you mean exchange?", (x, y), exchang="gossip")
    raised("whatever is an option neither .*; DataLoader's are .*num_workers", None, whatever=2)
    raised("num_workers is for a Dataset, and the data are tensors", (x, y), num_workers=2)
    raised("num_workers is for data that parallelize divides", None, num_workers=2)
    raised("sampler is not for data that parallelize divides", data, sampler=range(3))
    raised("drop_last is not for data that parallelize divides", Streamed(), drop_last=True)
    raised("DataLoader does not take num_workers as they are: .*non-negative", data, num_workers=-1)
    raised("DataLoader does not take timeout as they are: .*non-negative", Streamed(), timeout=-1)
    raised(r"batch_size is 2\.5, but has to be a whole number", data, batch_size=2.5)
    raised("batch_size is 0, but", data, batch_size=0)
    model = torch.nn.Linear(6, 5)
    with pytest.raises(UserError, match="the optimizer is a list: give one"):
        nt.parallelize(None, model, [momentum(model)])
    if size > 1:
        raised(r"rank 1 has another number of rows in its data \(11\)", torch.ones(10 + rank, 6), LaunchError)


class Once(IterableDataset[Any]):
    """The mistake of one iterator for all epochs."""

    def __init__(self) -> None:
        self.found = iter([torch.ones(6)] * 4)

    def __iter__(self) -> Iterator[Any]:
        return self.found


def test_a_stream_that_is_used_up_is_told() -> None:
    model = torch.nn.Linear(6, 5)
    run = nt.parallelize(Once(), model, momentum(model), batch_size=4)
    epochs = iter(run.epochs(2))
    next(epochs)
    assert len(list(run.batches())) == 1
    next(epochs)
    with pytest.raises(UserError, match="no rows in epoch 2: __iter__ has to return a new iterator"):
        list(run.batches())
    run.close()


@pytest.mark.ranks(2, 3, 4, 5, 8)
def test_parameters_that_cannot_be_exchanged_are_named() -> None:
    for exchange, kind, told in (
        ("gossip", torch.float16, "0.weight is torch.float16: replicas exchange float32 and float64; use autocast"),
        ("gossip", torch.bfloat16, "0.weight is torch.bfloat16: replicas exchange"),
        ("gossip", torch.complex128, "0.weight is torch.complex128, which has no average"),
        ("allreduce", torch.complex128, "0.weight is torch.complex128, which has no average"),
    ):
        model = torch.nn.Sequential(torch.nn.Linear(6, 5, dtype=kind))
        with pytest.raises(UserError, match=told):
            nt.parallelize(None, model, momentum(model), exchange=exchange)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5, device="meta"))
    with pytest.raises(UserError, match=r"0\.weight is on meta: .* keep the model on the CPU"):
        nt.parallelize(None, model, momentum(model))


def replaced(model: Any) -> None:
    model[0].weight.data = torch.zeros(5, 6)


CHANGES: dict[str, tuple[Callable[[Any], Any], dict[str, str | None]]] = {
    "converted": (
        lambda model: model.float(),
        dict.fromkeys(["gossip", "allreduce"], "0.weight was torch.float64 at parallelize and is torch.float32: conv"),
    ),
    "in other memory": (
        replaced, {"gossip": "0.weight has got other memory since parallelize", "allreduce": None}
    ),
    "moved": (
        lambda model: model.to("meta"),
        dict.fromkeys(["gossip", "allreduce"], "0.weight is new in the model .* complete and on its device"),
    ),
}  # fmt: skip


@pytest.mark.ranks(2, 3, 4, 5, 8)
@pytest.mark.parametrize("exchange", ["gossip", "allreduce"])
@pytest.mark.parametrize("change", CHANGES)
def test_parameters_that_change_after_parallelize_are_named(change: str, exchange: str) -> None:
    act, told = CHANGES[change]
    model = torch.nn.Sequential(torch.nn.Linear(6, 5))
    optimizer = momentum(model)
    run = nt.parallelize(None, model, optimizer, exchange=exchange)

    def step() -> None:
        optimizer.zero_grad()
        parameter = model[0].weight
        model(torch.ones(2, 6, dtype=parameter.dtype, device=parameter.device)).sum().backward()
        optimizer.step()

    step()
    act(model)
    if told[exchange] is None:
        step()  # gradients are averaged, wherever the parameters lie
    else:
        with pytest.raises(UserError, match=told[exchange]):
            step()
    run.close()
