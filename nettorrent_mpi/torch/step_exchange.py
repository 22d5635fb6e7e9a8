"""Replicas of a PyTorch model agree around each step of their optimizer, by the exchanges of nettorrent_mpi.

A replica may do fewer steps than others, as where a gradient scaler skips one. So that rounds of gossip have the same
number everywhere, it takes part in the round of a step that it skips, too (`skip_step`), and whenever all ranks do
something together, those that lack rounds make up for them first (`catch_up`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import torch

from nettorrent_mpi.comm.activity import NOW
from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.comm.mail import Pending
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.device import make_device
from nettorrent_mpi.exchange import Exchange, make_exchange
from nettorrent_mpi.exchange.elite import EliteExchange
from nettorrent_mpi.exchange.gossip import GossipExchange
from nettorrent_mpi.exchange.rounds import Rounds, await_peers
from nettorrent_mpi.plan.exchange_specs import Gossip
from nettorrent_mpi.plan.scores import Scores
from nettorrent_mpi.plan.specs import Adam, Sgd, Spec
from nettorrent_mpi.torch.flat_parameters import FlatParameters, outline

EXCHANGING = "the exchange between replicas"


class StepExchange:
    """A StepExchange lets this rank's replica agree with those of its `peers` around each optimizer step, as `spec`
    says. The ranks of `holders` have the same replica, and each exchanges a part of it.

    `parameters` have the types float32 and float64; `statistics` are other arrays that belong to the weights. `step`
    counts the steps of the optimizer, and those that it has skipped; `done` is the completed part of the run, from 0 to
    1, for rules that depend on it. `by_hand`: rounds are opened apart from steps, by each rank as it likes.
    """

    def __init__(
        self,
        spec: Spec,
        parameters: Mapping[str, torch.nn.Parameter],
        statistics: Sequence[Array],
        optimizer: torch.optim.Optimizer,
        peers: Group,
        holders: Group,
        *,
        seed: int,
        by_hand: bool = False,
    ):
        self.spec, self.step, self.done = spec, 0, 0.0
        self._optimizer, self._peers, self._holders = optimizer, peers, holders
        self._rates = [float(group["lr"]) for group in optimizer.param_groups]
        by_type: dict[str, list[torch.nn.Parameter]] = {}
        for parameter in parameters.values():
            by_type.setdefault(str(parameter.dtype).removeprefix("torch."), []).append(parameter)
        first = next(iter(by_type))  # with it travel the statistics
        self.vectors = [
            FlatParameters(kind, tensors, statistics if kind == first else (), holders)
            for kind, tensors in by_type.items()
        ]
        self._groups: list[Group] = []
        self.exchanges: list[Exchange] = []
        self._seed, self._judged = seed, 0
        self._by_hand = by_hand
        # Whether steps exchange the optimizer's state, which there is after the first one.
        self._with_state = isinstance(spec, Gossip) and "optimizer" in spec.average
        if not self._with_state:
            self._make()

    def _make(self) -> None:
        if self._with_state:
            self._join_state()
        device = make_device("cpu", "numpy")
        rule: Spec = Sgd() if isinstance(self._optimizer, torch.optim.SGD) else Adam()
        for vector in self.vectors:
            self._groups.append(self._peers.duplicate())
            self.exchanges.append(
                make_exchange(self.spec, vector.shards, self._groups[-1], device, optimizer=rule, seed=self._seed)
            )

    def progress(self) -> None:
        """Let messages progress. Does not wait."""
        for exchange in self.exchanges:
            if exchange.progress is not None:
                exchange.progress()

    def tell_loss(self, loss: float) -> None:
        """Take note of this replica's latest training loss."""
        for exchange in self.exchanges:
            exchange.tell_loss(loss)

    @property
    def wants_loss(self) -> bool:
        return any(exchange.wants_loss for exchange in self.exchanges)

    def before_step(self) -> float:
        """Merge what peers have sent, before the optimizer's step; return the factor on its learning rate."""
        if self._is_collective(self.step + 1):
            self.catch_up(collective=True)
        with NOW.during(EXCHANGING):
            for exchange in self.exchanges:
                exchange.before_update(self.step + 1)
            if self._holders.size > 1:
                self._gather()
        rates = (float(group["lr"]) for group in self._optimizer.param_groups)
        decay = max((now / then for now, then in zip(rates, self._rates, strict=False) if then > 0), default=1.0)
        return self.exchanges[0].rate_scale(self.done, min(decay, 1.0)) if self.exchanges else 1.0

    def after_step(self) -> None:
        """Send what the optimizer's step has made."""
        self.step += 1
        rate = float(self._optimizer.param_groups[0]["lr"])
        with NOW.during(EXCHANGING):
            if not self.exchanges:
                self._make()
                return
            if self._with_state:
                for vector in self.vectors:
                    vector.take_state(self._optimizer)
            for exchange in self.exchanges:
                exchange.after_update(rate, self.step)
            if self._holders.size > 1:
                self._gather()
            if any(exchange.next_rest(self.step - 1) == self.step for exchange in self.exchanges):
                self._rest()

    # -- steps that this replica skips ------------------------------------------------------------------------------

    def skip_step(self) -> None:
        """Take part in the exchange of a step that others do, without one of this replica's optimizer."""
        self.before_step()
        self.after_step()

    def catch_up(self, *, collective: bool = False) -> None:
        """Wait until all replicas have done or skipped as many steps; one that lacks some skips them. `collective`: the
        next step is one at whose end peers do something all together. Ranks that have no such step skip it, too.

        All ranks call, or are about to do such a step. While a rank waits, it follows peers whose messages show that
        they are ahead: they could wait for it.
        """
        if not isinstance(self.spec, Gossip) or self._by_hand:
            return
        with NOW.during(EXCHANGING):
            while True:
                steps, acting = self._gather_steps(collective)
                if min(steps) < max(steps):
                    while self.step < max(steps):
                        self.skip_step()
                elif all(acting) or not any(acting):
                    break
                elif not collective:
                    self.skip_step()
            # Nobody goes on before all know that they are together, and no longer follow those who do.
            await_peers(Pending(self._peers, [0.0]), self._rounds)

    def _gather_steps(self, collective: bool) -> tuple[list[float], list[float]]:
        """Return the steps of all replicas, and which of them wait before a collective step."""
        assert isinstance(self.spec, Gossip)
        told = np.zeros((2, self._peers.size))
        told[:, self._peers.index] = self.step, collective
        pending = Pending(self._peers, told.reshape(-1))
        while not await_peers(pending, self._rounds, self.step // self.spec.every):
            self.skip_step()
        steps, acting = pending.sums().reshape(2, -1).tolist()
        return steps, acting

    @property
    def _rounds(self) -> list[Rounds]:
        return [exchange.rounds for exchange in self.exchanges if isinstance(exchange, GossipExchange)]

    def _is_collective(self, step: int) -> bool:
        return not self.exchanges or any(
            exchange.is_collective(step) or exchange.next_rest(step - 1) == step for exchange in self.exchanges
        )

    # -- rounds apart from steps ------------------------------------------------------------------------------------

    def open_round(self, loss: float) -> None:
        """Send what the next round exchanges, apart from the optimizer's step."""
        self.step += 1
        for exchange in self.exchanges:
            if isinstance(exchange, GossipExchange):
                exchange.open_round(self.step, loss)

    def close_round(self, loss: float) -> None:
        """Merge what peers have sent in the open round."""
        with NOW.during(EXCHANGING):
            for exchange in self.exchanges:
                if isinstance(exchange, GossipExchange):
                    exchange.close_round(loss)

    # -- at rest ----------------------------------------------------------------------------------------------------

    def _join_state(self) -> None:
        """Let the optimizer's arrays be exchanged, too, the same on all peers: also those that a peer's optimizer has
        not made yet. All peers call."""
        told = self._peers.gather_objects([vector.state_names(self._optimizer) for vector in self.vectors])
        for number, vector in enumerate(self.vectors):
            vector.join_state(self._optimizer, dict.fromkeys(name for names in told for name in names[number]))

    def _gather(self) -> None:
        for vector in self.vectors:
            vector.gather()

    def _rest(self) -> None:
        """Average exactly where replicas are too far from each other (gossip's `consensus`)."""
        if isinstance(self.spec, Gossip):
            distance = self.distance()
            for exchange in self.exchanges:
                exchange.at_rest(self.step, lambda: None, distance)

    def distance(self) -> float:
        """Return the replicas' root mean square distance from their mean, relative to it. All ranks call."""
        sums = np.zeros(2)
        for exchange, vector in zip(self.exchanges, self.vectors, strict=True):
            with exchange.paused():
                own = vector.shards.parameters[0]
                mean = own.copy()
                self._peers.mean(mean)
                sums += np.sum(np.square(own - mean, dtype=np.float64)), np.sum(np.square(mean, dtype=np.float64))
        self._peers.all_reduce(sums)
        self._holders.all_reduce(sums)
        return float(np.sqrt(sums[0] / sums[1])) if sums[1] > 0 else 0.0

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Give every replica the average of all inside the `with` block, and its own weights again afterwards. All
        ranks call."""
        with ExitStack() as stack:
            with NOW.during(EXCHANGING):
                for exchange in self.exchanges:
                    stack.enter_context(exchange.shown())
            yield
            with NOW.during(EXCHANGING):
                stack.close()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Keep messages from being in flight inside the `with` block. All peers call."""
        with ExitStack() as stack:
            for exchange in self.exchanges:
                stack.enter_context(exchange.paused())
            yield

    def memories(self) -> dict[str, Array]:
        """Return what a checkpoint holds of this rank's part in the exchange, by name. At rest."""
        found: dict[str, Array] = {}
        for number, exchange in enumerate(self.exchanges):
            for name, arrays in exchange.memories().items():
                found |= {f"exchange/{number}/{name}/{i}": array for i, array in enumerate(arrays)}
            if exchange.numbers().size:
                found[f"exchange/{number}/numbers"] = exchange.numbers()
        return found

    def restore(self, step: int, read: Callable[[Mapping[str, Array]], None] | None) -> None:
        """Go on after `step`: the replica's parameters and the optimizer's state were restored. `read` fills this
        rank's `memories`; None: they are of another layout, and all replicas are equal. All ranks call."""
        self.step = step
        if not self.exchanges:
            self._make()
        elif self._with_state:
            for vector in self.vectors:
                vector.take_state(self._optimizer)
        for number, exchange in enumerate(self.exchanges):
            if read is None:
                exchange.averaged()
            else:
                numbers = {f"exchange/{number}/numbers": exchange.numbers()}
                if numbers[f"exchange/{number}/numbers"].size:
                    read(numbers)
                    exchange.take_numbers(numbers[f"exchange/{number}/numbers"])
                read({
                    f"exchange/{number}/{name}/{i}": array
                    for name, arrays in exchange.memories().items()
                    for i, array in enumerate(arrays)
                })  # fmt: skip
            exchange.recall(step)

    def become(self, best: int | None = None) -> None:
        """Give every replica the average of all, or replica `best`'s weights and optimizer state, for good."""
        for exchange in self.exchanges:
            exchange.become(best)

    def judge(self, found: Sequence[Scores]) -> None:
        """Let losers take over winners' weights and optimizer state, as the elite exchange does after `found`, each
        replica's scores. All ranks call."""
        self._judged += 1
        self._join_state()
        told = self._peers.gather_objects([outline(self._optimizer, vector.tensors) for vector in self.vectors])
        for number, exchange in enumerate(self.exchanges):
            if isinstance(exchange, EliteExchange):
                winner = exchange.judge(found, self._judged)[self._peers.index]
                if winner != self._peers.index:
                    self.vectors[number].set_state(self._optimizer, told[winner][number])

    def close(self) -> None:
        """Free what the exchanges hold. All peers call."""
        for exchange in self.exchanges:
            exchange.settle()
            exchange.close()
        for group in self._groups:
            group.free()
        self.exchanges.clear()
        self._groups.clear()
