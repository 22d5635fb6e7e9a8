"""Replicas of a PyTorch model agree around each step of their optimizer, by the exchanges of nettorrent_mpi.

The parameters of each type lie in one flat array, of which they become views: an exchange works on a rank's shard of
it, and the model and its optimizer on the same memory. Nothing is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import torch

from nettorrent_mpi.comm.activity import NOW
from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.device import make_device
from nettorrent_mpi.exchange import Exchange, Shards, make_exchange
from nettorrent_mpi.exchange.elite import EliteExchange
from nettorrent_mpi.exchange.gossip import GossipExchange
from nettorrent_mpi.plan.exchange_specs import Gossip
from nettorrent_mpi.plan.scores import Scores
from nettorrent_mpi.plan.specs import Adam, Sgd, Spec
from nettorrent_mpi.torch.slots import length, slots

EXCHANGING = "the exchange between replicas"


class _Vector:
    """The parameters of one type: their flat array, and the shard of it that this rank exchanges with its peers.

    The optimizer's state joins where it is exchanged, once the optimizer has made it (`take_state`): arrays of the same
    order.
    """

    def __init__(self, kind: str, tensors: Sequence[torch.nn.Parameter], statistics: Sequence[Array], holders: Group):
        self._kind, self._tensors, self._holders = kind, tensors, holders
        self._size = length(tensors, holders.size)
        self.array: Array = np.zeros(self._size, kind)
        for tensor, slot in zip(tensors, slots(self.array, tensors), strict=True):
            slot.copy_(tensor.detach())
            tensor.data = slot
        self._counts = [self._size // holders.size] * holders.size
        self._own = slice(self._counts[0] * holders.index, self._counts[0] * (holders.index + 1))
        self._state: dict[str, Array] = {}
        self._slots: dict[str, list[torch.Tensor]] = {}  # of the state
        self.shards = Shards([self.array[self._own]], {}, statistics, self.gather)

    def gather(self) -> None:
        """Give all holders everyone's shards, of the parameters and of the state that has joined."""
        for array in (self.array, *self._state.values()):
            self._holders.all_gather(array[self._own], array, self._counts)

    def take_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the optimizer's arrays that are like parameters lie in flat arrays, too."""
        names = dict.fromkeys(
            name
            for tensor in self._tensors
            for name, value in optimizer.state.get(tensor, {}).items()
            if isinstance(value, torch.Tensor)
            and value.shape == tensor.shape
            and value.dtype == tensor.dtype
            and value.dim()
        )
        for name in names:
            if name not in self._state:
                self._state[name] = np.zeros(self._size, self._kind)
                self._slots[name] = slots(self._state[name], self._tensors)
                self.shards.optimizer[name] = [self._state[name][self._own]]  # type: ignore[index]
            for tensor, slot in zip(self._tensors, self._slots[name], strict=True):
                value = optimizer.state.get(tensor, {}).get(name)
                if value is not None and value is not slot:
                    slot.copy_(value)
                    optimizer.state[tensor][name] = slot


class StepExchange:
    """A StepExchange lets this rank's replica agree with those of its `peers` around each optimizer step, as `spec`
    says. The ranks of `holders` have the same replica, and each exchanges a part of it.

    `parameters` have the types float32 and float64; `statistics` are other arrays that belong to the weights. `step`
    counts the optimizer's steps; `done` is the completed part of the run, from 0 to 1, for rules that depend on it.
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
    ):
        self.spec, self.step, self.done = spec, 0, 0.0
        self._optimizer, self._peers, self._holders = optimizer, peers, holders
        self._rates = [float(group["lr"]) for group in optimizer.param_groups]
        by_type: dict[str, list[torch.nn.Parameter]] = {}
        for parameter in parameters.values():
            by_type.setdefault(str(parameter.dtype).removeprefix("torch."), []).append(parameter)
        first = next(iter(by_type))  # with it travel the statistics
        self.vectors = [
            _Vector(kind, tensors, statistics if kind == first else (), holders) for kind, tensors in by_type.items()
        ]
        self._groups: list[Group] = []
        self.exchanges: list[Exchange] = []
        self._seed, self._judged = seed, 0
        # Whether steps exchange the optimizer's state, which there is after the first one.
        self._with_state = isinstance(spec, Gossip) and "optimizer" in spec.average
        if not self._with_state:
            self._make()

    def _make(self) -> None:
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
            if self._with_state:
                self._take_state()
            if not self.exchanges:
                self._make()
                return
            for exchange in self.exchanges:
                exchange.after_update(rate, self.step)
            if self._holders.size > 1:
                self._gather()
            if any(exchange.next_rest(self.step - 1) == self.step for exchange in self.exchanges):
                self._rest()

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

    def _take_state(self) -> None:
        for vector in self.vectors:
            vector.take_state(self._optimizer)

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
            for exchange in self.exchanges:
                stack.enter_context(exchange.shown())
            yield

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
        if self._with_state:
            self._take_state()
        if not self.exchanges:
            self._make()
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
        """Let losers take over winners' weights, as the elite exchange does after `found`, each replica's scores."""
        self._judged += 1
        self._take_state()
        for exchange in self.exchanges:
            if isinstance(exchange, EliteExchange):
                exchange.judge(found, self._judged)

    def close(self) -> None:
        """Free what the exchanges hold. All peers call."""
        for exchange in self.exchanges:
            exchange.settle()
            exchange.close()
        for group in self._groups:
            group.free()
        self.exchanges.clear()
        self._groups.clear()
