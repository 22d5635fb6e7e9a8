"""The elite exchange lets replicas take over the weights of better ones at intervals.

`best`: all take the winner's weights and optimizer state, as in NetTorrent. `tournament`: replicas compete in random
pairs, and the loser takes the winner's, as in LBANN (Jacobs et al. 2017, "Towards scalable parallel training of deep
neural networks"). Validation rows decide, never the test set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nettorrent_mpi.comm.channels import Channel
from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.device.device import Device
from nettorrent_mpi.exchange.base import Exchange, next_multiple
from nettorrent_mpi.exchange.replicas import Shards
from nettorrent_mpi.plan.exchange_specs import Elite
from nettorrent_mpi.plan.pairing import make_pairing
from nettorrent_mpi.plan.scores import Scores, best_of


def steps_between(spec: Elite, batch_size: int) -> int:
    """Return the number of steps between comparisons, enough to train on at least `every_samples` rows."""
    return -(-spec.every_samples // batch_size)


def takes(spec: Elite, found: Sequence[Scores], number: int, seed: int) -> list[int]:
    """Return, for each replica, whose weights it takes after comparison `number`: its own or a winner's."""
    count = len(found)
    if spec.mode == "best":
        return [best_of(found, spec.metric)] * count
    result = list(range(count))
    for a, b, _ in make_pairing("shuffle", count, seed).edges(number):
        if a < b:
            winner = (a, b)[best_of((found[a], found[b]), spec.metric)]
            result[a] = result[b] = winner
    return result


class EliteExchange(Exchange):
    """Compares the replicas at intervals and gives the losers the winners' weights."""

    def __init__(
        self,
        spec: Elite,
        shards: Shards,
        peers: Group,
        device: Device,
        channel: Channel | None,
        *,
        seed: int,
        batch_size: int,
    ):
        super().__init__(shards, peers, device, channel)
        self._spec, self._seed = spec, seed
        self._every = steps_between(spec, batch_size)
        self.metric = spec.metric

    def next_rest(self, step: int) -> int | None:
        return next_multiple(step, self._every)

    def at_rest(
        self, step: int, compare: Callable[[], list[Scores] | None], distance: float | None = None
    ) -> Scores | None:
        number, rest = divmod(step, self._every)
        if rest:
            return None
        found = compare()
        assert found is not None, "elite needs validation rows"
        self.judge(found, number)
        return found[best_of(found, self._spec.metric)]

    def judge(self, found: Sequence[Scores], number: int) -> list[int]:
        """Give the losers of comparison `number` the winners' weights; `found` are the scores of all replicas, the same
        on all ranks, and all of them call. Returns for each replica whose weights it has now."""
        whose = takes(self._spec, found, number, self._seed)
        if len(set(whose)) == 1:
            self.become(whose[0])
        else:
            self.adopt(whose)
        return whose
