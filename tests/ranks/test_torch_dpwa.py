"""The stand-in for dpwa merges by dpwa's formulas, round after round: factors by hand."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from mpi4py import MPI  # noqa: E402

import nettorrent_mpi.torch as nt  # noqa: E402
from nettorrent_mpi.plan.errors import ConfigError, UserError  # noqa: E402

pytestmark = pytest.mark.usefixtures("double_precision")
size, rank = MPI.COMM_WORLD.size, MPI.COMM_WORLD.rank
inf, nan = float("inf"), float("nan")


class Adapter(nt.Dpwa):
    """A Dpwa with a model of two equal parameters, and what a round makes of them."""

    def __init__(self, folder: Path, text: str, *, timeout: float | str = "none", seed: int = 1):
        if rank == 0:
            (folder / "dpwa.yaml").write_text(f"- {text}\n- timeout_ms: {timeout}\n")
        MPI.COMM_WORLD.barrier()
        self.model = torch.nn.Linear(2, 1, bias=False)
        super().__init__(self.model, folder / "dpwa.yaml", seed=seed)

    @property
    def value(self) -> float:
        first, second = self.model.weight.detach().reshape(-1).tolist()
        assert first == second
        return float(first)

    @value.setter
    def value(self, value: float) -> None:
        with torch.no_grad():
            self.model.weight.fill_(value)

    def exchange(self, sent: float = 1.0, own: float | None = None) -> float:
        """Do a round; losses are those at update_send and update_wait."""
        self.update_send(sent)
        self.update_wait(sent if own is None else own)
        return self.value

    def meet(self, world: Any) -> None:
        """Wait for the other one of two ranks, and until it has received what was sent: then this rank sends again."""
        assert self._shared.replicas is not None
        (exchange,) = self._shared.replicas.exchanges
        while not exchange.rounds.mail.can_send(1 - rank):
            time.sleep(0.001)
        world.barrier()


# Losses of both ranks at update_send, at update_wait, and f of both: parameters become p + f * (peer's - p).
ROUNDS: dict[str, tuple[str, list[tuple[tuple[float, float], tuple[float, float], tuple[float, float]]]]] = {
    "constant": (
        "{interpolation: constant, constant: {value: 0.3}, divergence_threshold: 0}",
        [((1, 3), (1, 3), (0.3, 0.3)), ((5, 0), (0, 5), (0.3, 0.3))],
    ),
    "constant, threshold 2: times l / 2 below it": (
        "{interpolation: constant, constant: {value: 0.5}, divergence_threshold: 2}",
        [((1, 4), (1, 4), (0.5 * 1 / 2, 0.5)), ((9, 9), (2, 0), (0.5, 0))],
    ),
    "clock: pc / (c + pc), both of the same age": (
        "{interpolation: clock, clock: 0}",
        [((1, 3), (1, 3), (0.5, 0.5))] * 3,
    ),
    "clock, threshold 4": (
        "{interpolation: clock, divergence_threshold: 4}",
        [((1, 2), (1, 2), (0.5 * 1 / 4, 0.5 * 2 / 4)), ((8, 8), (4, 3), (0.5, 0.5 * 3 / 4))],
    ),
    "loss: l / (l + pl), its own at update_wait, the peer's at update_send": (
        "{interpolation: loss, loss: 0}",
        [
            ((1, 3), (1, 3), (1 / 4, 3 / 4)),
            ((1, 3), (2, 1), (2 / (2 + 3), 1 / (1 + 1))),
            ((0, 3), (0, 3), (0, 1)),
            ((0, 0), (0, 0), (1 / 2, 1 / 2)),
            ((inf, 1), (inf, 1), (1, 0)),  # one that diverged takes the other's
            ((3, nan), (3, nan), (0, 1)),
            ((2, 6), (2, 6), (1 / 4, 3 / 4)),
        ],
    ),
    "loss, threshold 2": (
        "{interpolation: loss, divergence_threshold: 2}",
        [((1, 3), (1, 3), (1 / 4 * 1 / 2, 3 / 4)), ((4, 4), (0.5, 1.5), (1 / 9 * 1 / 4, 1.5 / 5.5 * 3 / 4))],
    ),
    "linear: from 0.5 to 0.1 in 4 steps; the age is 1 in the first round": (
        "{interpolation: linear, linear: {start: 0.5, end: 0.1, target: 4}}",
        [((1, 3), (1, 3), (f, f)) for f in (0.4, 0.3, 0.2, 0.1, 0.1, 0.1)],
    ),
    "linear, threshold 2": (
        "{interpolation: linear, linear: {start: 0, end: 1, target: 2}, divergence_threshold: 2}",
        [((1, 3), (1, 3), (0.5 * 1 / 2, 0.5)), ((1, 3), (3, 1), (1, 1 * 1 / 2)), ((1, 3), (2, 2), (1, 1))],
    ),
    "loss_divergence: l^2 / (l^2 + pl^2) * min(l / 2, 1)": (
        "{interpolation: loss_divergence, loss_divergence: {target_divergence_loss: 2}}",
        [
            ((1, 3), (1, 3), (1 / 10 * 1 / 2, 9 / 10)),
            ((4, 2), (4, 2), (16 / 20, 4 / 20)),
            ((1, 2), (3, 1), (9 / (9 + 4), 1 / (1 + 1) * 1 / 2)),
        ],
    ),
    "loss_divergence, threshold 4": (
        "{interpolation: loss_divergence, loss_divergence: {target_divergence_loss: 2}, divergence_threshold: 4}",
        [((1, 3), (1, 3), (1 / 10 * 1 / 2 * 1 / 4, 9 / 10 * 3 / 4))],
    ),
}


@pytest.mark.ranks(2)
@pytest.mark.parametrize("method", ROUNDS)
def test_two_ranks_merge_by_the_factors_of_each_method(shared_path: Path, method: str) -> None:
    text, rounds = ROUNDS[method]
    adapter = Adapter(shared_path, text)
    for sent, own, factors in rounds:
        adapter.value = (10.0, 20.0)[rank]
        found = adapter.exchange(sent[rank], own[rank])
        assert found == pytest.approx((10 + factors[0] * 10, 20 - factors[1] * 10)[rank], abs=1e-12)
    adapter.average()
    means = {0.5 * (10 + factors[0] * 10 + 20 - factors[1] * 10)}
    assert adapter.value == pytest.approx(means.pop())
    adapter.close()


@pytest.mark.ranks(2)
def test_a_step_in_between_is_kept_whole(shared_path: Path) -> None:
    """Parameters 10 and 20 are sent, the step adds 1, and f = 1/4: 11 + (20 - 10) / 4."""
    adapter = Adapter(shared_path, "{interpolation: constant, constant: {value: 0.25}}")
    adapter.value = (10.0, 20.0)[rank]
    adapter.update_send(1)
    adapter.value += 1
    adapter.update_wait(1)
    assert adapter.value == (11 + 10 / 4, 21 - 10 / 4)[rank]
    adapter.update_wait(1)  # nothing was sent since
    assert adapter.value == (11 + 10 / 4, 21 - 10 / 4)[rank]
    adapter.update_send(1)
    adapter.update_send(1)  # a round whose update_wait was left out is closed: 13.5 + 5 / 4
    assert adapter.value == (14.75, 17.25)[rank]
    adapter.update_wait(1)
    assert adapter.value == (14.75 + 2.5 / 4, 17.25 - 2.5 / 4)[rank]
    adapter.close()


@pytest.mark.ranks(3)
def test_three_ranks_send_to_one_each(shared_path: Path) -> None:
    """With seed 1, 0 sends to 2, 1 to 0, 2 to 1; then 0 to 2, 1 and 2 to 0, who takes half of f from each."""
    expected = {
        "{interpolation: constant, constant: {value: 0.5}}": (
            [3, 9, 6],
            [3 + 0.25 * (9 - 3) + 0.25 * (6 - 3), 9, 6 + 0.5 * (3 - 6)],
        ),
        "{interpolation: loss}": (  # the losses are 1, 2, 3
            [0 + 6 / 3, 6 + 2 / 5 * 6, 12 - 3 / 4 * 12],
            [2 + (8.4 - 2) * 1 / 3 / 2 + (3 - 2) * 1 / 4 / 2, 8.4, 3 + 3 / 4 * (2 - 3)],
        ),
    }
    for text, rounds in expected.items():
        adapter = Adapter(shared_path, text)
        adapter.value = 6.0 * rank
        for values in rounds:
            assert adapter.exchange(rank + 1.0) == pytest.approx(values[rank], abs=1e-12)
        adapter.close()


@pytest.mark.ranks(2)
def test_a_rank_that_sends_nothing_is_waited_for_only_so_long(shared_path: Path, world: Any) -> None:
    """Rank 0 is a step ahead: ages differ from then on."""
    adapter = Adapter(shared_path, "{interpolation: clock}", timeout=1000)
    adapter.value = (10.0, 20.0)[rank]
    adapter.meet(world)
    began = time.perf_counter()
    if rank == 0:
        assert adapter.exchange() == 10
        assert 0.99 <= time.perf_counter() - began < 30
    adapter.meet(world)
    if rank == 1:  # a message of the same age, 1, waits for it
        assert adapter.exchange() == 15
        assert time.perf_counter() - began < 30
    for expected in (
        # The message that rank 0 had waited for, 20 at age 1, comes a round late, when it is 2 steps old:
        # f = 1 / (2 + 1) / (1 + 1), and its age becomes 2 - 1/6. The next one is in time: f = 2 / (2 + 2).
        (10 + (20 - 10) / 6 + (15 - 10) / 2, 15 + (10 - 15) / 2),  # 85/6 and 12.5
        # Ages are 17/6 and 3: f = 3 / (17/6 + 3) = 18/35 and 17/35.
        (85 / 6 + 18 / 35 * (12.5 - 85 / 6), 12.5 + 17 / 35 * (85 / 6 - 12.5)),
    ):
        adapter.meet(world)
        adapter.update_send(1)
        adapter.meet(world)
        adapter.update_wait(1)
        assert adapter.value == pytest.approx(expected[rank], abs=1e-12)
    adapter.close()


@pytest.mark.ranks(3)
def test_others_go_on_without_a_rank_that_sends_nothing(shared_path: Path, world: Any) -> None:
    adapter = Adapter(shared_path, "{interpolation: constant, constant: {value: 0.5}}", timeout=300)
    adapter.value = 6.0 * rank
    if rank < 2:  # 1 sends to 0, and 2 would send to 1
        assert adapter.exchange() == (3, 6)[rank]
    world.barrier()
    adapter.average()  # 2 merges what it has got meanwhile: 12 + (0 - 12) / 2
    assert adapter.value == (3 + 6 + 6) / 3
    adapter.close()


@pytest.mark.ranks(2, 3)
def test_with_fetch_probability_0_nobody_merges(shared_path: Path) -> None:
    adapter = Adapter(shared_path, "{interpolation: loss, fetch_probability: 0}", timeout=60_000)
    adapter.value = float(rank)
    assert [adapter.exchange() for _ in range(5)] == [rank] * 5
    adapter.average()
    assert adapter.value == (size - 1) / 2
    adapter.close()


@pytest.mark.ranks(2, 3)
def test_with_fetch_probability_a_half_rounds_are_drawn(shared_path: Path) -> None:
    """Of two ranks both merge or none. Of three each gets a message of another one with probability 1/2 * 1/2."""
    drawn: list[list[bool]] = []
    chance, rounds = {2: 0.5, 3: 1 - (3 / 4) ** 2}[size], 400
    for seed in (1, 1, 2):
        text = "{interpolation: constant, constant: {value: 0.5}, pull_probability: 0.5}"
        adapter = Adapter(shared_path, text, seed=seed)
        drawn.append([])
        for _ in range(rounds):
            adapter.value = float(rank**2)
            drawn[-1].append(adapter.exchange() != rank**2)
        adapter.close()
        assert abs(sum(drawn[-1]) - chance * rounds) < 4 * (chance * (1 - chance) * rounds) ** 0.5
    assert drawn[0] == drawn[1] != drawn[2]
    if size == 2:
        assert MPI.COMM_WORLD.bcast(drawn) == drawn


@pytest.mark.ranks(1, 2, 3)
def test_a_loss_is_a_number_or_a_tensor_and_at_least_0(shared_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    adapter = Adapter(shared_path, "{interpolation: constant, constant: {value: 0.5}}")
    loss = (adapter.model.weight * 0).sum()
    assert loss.requires_grad
    adapter.update_send(loss)
    adapter.update_wait(loss)
    assert not [each for each in recwarn if "requires_grad" in str(each.message)]
    if size > 1:
        with pytest.raises(UserError, match=r"the loss is -1\.5"):
            adapter.update_send(-1.5)
    adapter.close()


@pytest.mark.ranks(2)
def test_parameters_that_are_replaced_are_told(shared_path: Path) -> None:
    adapter = Adapter(shared_path, "{interpolation: clock}")
    adapter.model.weight.data = torch.zeros(1, 2)
    with pytest.raises(UserError, match="weight has got other memory"):
        adapter.update_send(1)
    adapter.close()


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("text", ["", "a: [", "interpolation: [1]", "fetch_probability: 3"])
def test_a_wrong_file_is_told_on_all_ranks(shared_path: Path, text: str, world: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        Adapter(shared_path, text)
    assert str(caught.value) == world.bcast(str(caught.value))


@pytest.mark.ranks(2, 3)
def test_the_number_of_nodes_is_compared(shared_path: Path) -> None:
    nodes = ", ".join(f"{{name: w{i}, host: localhost, port: {45000 + i}}}" for i in range(4))
    text = f"{{nodes: [{nodes}], interpolation: clock}}"
    if rank == 0:
        with pytest.warns(UserWarning, match=r"names 4 nodes, and MPI has started \d ranks"):
            adapter = Adapter(shared_path, text)
    else:
        adapter = Adapter(shared_path, text)
    adapter.close()
