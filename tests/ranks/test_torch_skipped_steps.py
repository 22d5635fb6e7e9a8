"""Ranks that do fewer optimizer steps than others, as where a gradient scaler skips one, stay in the same rounds."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mpi4py import MPI  # noqa: E402

import nettorrent_mpi.torch as nt  # noqa: E402
from nettorrent_mpi.plan.errors import UserError  # noqa: E402

pytestmark = pytest.mark.usefixtures("double_precision")
size, rank = MPI.COMM_WORLD.size, MPI.COMM_WORLD.rank
BATCHES, EPOCHS = 11, 2  # more than the rounds after which gossip chooses its parts
GOSSIP: dict[str, dict[str, Any]] = {
    "usual": {},
    "patient": {"deadline": "none", "part": 0.5},
    "push-sum": {"deadline": "none", "mix": "push_sum", "pairing": "exponential"},
    "exact": {"exact_every": 3},
    "with state": {"average": ["parameters", "optimizer"], "deadline": "none"},
    "seldom": {"every": 4, "deadline": "none", "part": 1},
    "near": {"consensus": {"max": 1e-6}},
}


def network() -> Any:
    return torch.nn.Sequential(torch.nn.Linear(4, 7), torch.nn.Tanh(), torch.nn.Linear(7, 2))


def weights(model: Any) -> np.ndarray:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).numpy().copy()


def everywhere(value: Any) -> list[Any]:
    return MPI.COMM_WORLD.allgather(value)


def rounds(run: Any) -> list[int]:
    return everywhere(0 if run._shared.replicas is None else run._shared.replicas.step)


def step(run: Any, scaler: Any, x: Any, *, overflow: bool) -> None:
    run.optimizer.zero_grad()
    loss = run.model(x).square().mean()
    scaler.scale(loss * float("inf") if overflow else loss).backward()
    scaler.step(run.optimizer)
    scaler.update()


def fails(batch: int) -> bool:
    """Whether the gradients of this rank overflow: the first ones, some alone, and three in a row at the end."""
    return rank == size - 1 and batch in (0, 3, BATCHES - 3, BATCHES - 2, BATCHES - 1)


def scaler_of() -> Any:
    return torch.amp.GradScaler("cpu", init_scale=1024.0)


def begin(exchange: Any, data: Any = None, model: Any = None, **options: Any) -> Any:
    torch.manual_seed(0)
    model = network() if model is None else model
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    return nt.parallelize(data, model, optimizer, exchange=exchange, **options)


@pytest.mark.parametrize("kind", GOSSIP)
def test_rounds_go_on_where_a_rank_skips_its_step(kind: str) -> None:
    run, scaler = begin({"gossip": GOSSIP[kind]}), scaler_of()
    for epoch in run.epochs(EPOCHS):
        for batch, x in enumerate(run.batches(list(torch.rand(BATCHES, 3, 4)))):
            step(run, scaler, x, overflow=epoch == 0 and fails(batch))
    skipped = sum(fails(batch) for batch in range(BATCHES))
    assert run.step == EPOCHS * BATCHES - skipped
    assert set(rounds(run)) <= {0, EPOCHS * BATCHES}
    run.average()
    assert all(np.array_equal(each, weights(run.model)) for each in everywhere(weights(run.model)))
    assert np.isfinite(weights(run.model)).all()
    run.close()


def test_a_rank_that_skips_averages_as_if_its_step_were_zero() -> None:
    """With all of them, after every step: all have the same weights, and those of their mean without its step."""
    gossip = {"pairing": "complete", "overlap": False, "deadline": "none", "part": 1}
    run, scaler = begin({"gossip": gossip}), scaler_of()
    for _ in run.epochs(1):
        for batch, x in enumerate(run.batches(list(torch.rand(BATCHES, 3, 4)))):
            if batch:  # the exchange of a skipped step is at its mini-batch's end
                assert np.ptp(np.array(everywhere(weights(run.model))), axis=0).max() < 1e-13
            step(run, scaler, x, overflow=fails(batch))
    assert np.ptp(np.array(everywhere(weights(run.model))), axis=0).max() < 1e-13
    run.close()


@pytest.mark.parametrize("kind", GOSSIP)
@pytest.mark.parametrize("uneven", [True, False])
def test_loops_without_batches_catch_up(kind: str, uneven: bool) -> None:
    """Where the run does not see mini-batches: loaders of other lengths, or steps that are skipped, with other calls in
    between in which all ranks meet."""
    run, scaler = begin({"gossip": GOSSIP[kind]}), scaler_of()
    done = 0
    for epoch in run.epochs(EPOCHS):
        assert not epoch or len(set(rounds(run))) == 1
        for batch in range(BATCHES - 4 + 5 * (rank % 2) if uneven else BATCHES):
            step(run, scaler, torch.rand(3, 4), overflow=not uneven and fails(batch))
            done += uneven or not fails(batch)
            if not uneven and batch % 4 == 3:
                run.mean(1.0)
    assert run.step == done
    assert run.replicas == 1 or rounds(run)[0] >= max(everywhere(done))
    run.average()
    assert all(np.array_equal(each, weights(run.model)) for each in everywhere(weights(run.model)))
    run.close()


@pytest.mark.parametrize("exchange", ["none", "elite"])
def test_replicas_without_rounds_may_do_other_numbers_of_steps(exchange: str) -> None:
    run, scaler = begin(exchange), scaler_of()
    for _ in run.epochs(1):
        for _ in range(3 + rank):
            step(run, scaler, torch.rand(3, 4), overflow=False)
    assert run.step == 3 + rank
    run.close()


def test_passes_that_add_up_quietly_have_one_exchange() -> None:
    run = begin("gossip")
    for _ in run.epochs(1):
        for batch, x in enumerate(run.batches(list(torch.rand(BATCHES + 1, 3, 4)))):
            if batch % 3 < 2:
                with run.no_sync():
                    run.model(x).square().mean().backward()
            else:
                run.model(x).square().mean().backward()
                run.optimizer.step()
                run.optimizer.zero_grad()
    assert run.step == (BATCHES + 1) // 3
    assert set(rounds(run)) <= {0, run.step}
    run.close()


def test_all_ranks_skip_with_averaged_gradients() -> None:
    """One rank's gradients overflow: all skip, as one rank with all rows does."""
    x = torch.rand(40, 4)
    x[25] = float("inf")
    found = []
    for comm in (MPI.COMM_SELF, None):
        run, scaler = begin("allreduce", x, batch_size=8, comm=comm), scaler_of()
        for _ in run.epochs(3):
            for rows in run.batches():
                run.optimizer.zero_grad()
                scaler.scale(run.model(rows).square().mean()).backward()
                scaler.unscale_(run.optimizer)
                torch.nn.utils.clip_grad_norm_(run.model.parameters(), 0.2)
                scaler.step(run.optimizer)
                scaler.update()
        assert run.step == 3 * 4
        found.append((weights(run.model), scaler.get_scale()))
        run.close()
    (alone, scale), (ours, ours_scale) = found
    assert scale == ours_scale == 1024 / 8
    assert np.linalg.norm(ours - alone) <= 1e-10 * np.linalg.norm(alone)


@pytest.mark.ranks(4)
def test_ranks_of_a_replica_have_to_do_the_same_steps() -> None:
    """Otherwise one would wait for the others' parts of the weights: an error on both, at once."""
    run = begin("gossip", replica_size=2)
    loader = list(torch.rand(3 + rank % 2, 3, 4))

    def train() -> None:
        for _ in run.epochs(1):
            for x in loader:
                step(run, scaler_of(), x, overflow=False)

    with pytest.raises(UserError, match="1 of the 2 ranks that have one replica have no more mini-batches"):
        train()
    run = begin({"gossip": {"deadline": "none"}}, replica_size=2)
    for _ in run.epochs(2):
        for batch, x in enumerate(run.batches(loader)):
            step(run, scaler := scaler_of(), x, overflow=rank == 1 and batch == 1)
            assert scaler.get_scale() == (512 if rank < 2 and batch == 1 else 1024)
    assert rounds(run) == [8] * 4
    run.close()


@pytest.mark.parametrize("kind", ["patient", "push-sum", "seldom"])
def test_a_checkpoint_among_skipped_steps(kind: str, shared_path: Any) -> None:
    """Resumed on as many ranks, the run is the one that never stopped, though one rank has done fewer steps."""
    data = torch.rand(BATCHES * 4 * size, 4, generator=torch.Generator().manual_seed(1))

    def train(run: Any, until: int, folder: Any = None) -> None:
        for _ in run.epochs(EPOCHS):
            for x in run.batches():
                seen = run.epoch * BATCHES + run.batch - 1
                step(run, scaler_of(), x, overflow=fails(seen))
                if seen == until:
                    if folder is not None:
                        run.checkpoint(folder)
                    return

    def made() -> Any:
        gossip = {"part": 1, **GOSSIP[kind]}  # else the parts depend on what is measured
        return begin({"gossip": gossip}, data, batch_size=4 * size)

    whole, stopped, resumed = made(), made(), made()
    train(whole, BATCHES + 4)
    train(stopped, BATCHES - 2, shared_path)  # one more step is skipped after it
    assert resumed.resume(shared_path)
    train(resumed, BATCHES + 4)
    assert np.array_equal(weights(resumed.model), weights(whole.model))
    for run in (whole, stopped, resumed):
        run.close()


def test_losers_get_the_winners_whole_optimizer_state() -> None:
    """Also where they have no state, for parameters or at all, or another age; and lose what the winner lacks."""
    model = torch.nn.ModuleList([torch.nn.Linear(4, 2) for _ in range(3)])
    run = begin("elite", model=model)
    for number in range(2 + rank):
        run.optimizer.zero_grad()
        chosen = model[0], model[1 if rank == size - 1 else 2]
        sum(layer(torch.rand(3, 4)).square().mean() for layer in chosen).backward()
        if rank or size == 1 or number:
            run.optimizer.step()
    best = size - 1
    own = copy.deepcopy(run.optimizer.state_dict()["state"])
    wanted = MPI.COMM_WORLD.bcast(own, root=best)
    assert run.judge(1.0 if rank == best else 2.0) == best
    found = run.optimizer.state_dict()["state"]
    assert found.keys() == wanted.keys()
    for number, state in wanted.items():
        assert found[number].keys() == state.keys()
        assert all(torch.equal(found[number][key], value) for key, value in state.items())
    before = weights(model)
    run.optimizer.zero_grad()
    model[1](torch.ones(3, 4)).square().mean().backward()
    run.optimizer.step()
    after = everywhere(weights(model))
    assert all(np.array_equal(each, after[0]) for each in after)
    assert not np.array_equal(after[0], before)
    run.close()
