"""The elite exchange: now and then the best replica's weights are taken over.

`best`: all take the winner's weights and optimizer state, as NetTorrent did. `tournament`: replicas meet in random
pairs, and the loser takes the winner's, as LBANN does (Jacobs et al. 2017, "Towards scalable parallel training of deep
neural networks"). Validation rows judge, never the test set.
"""

from __future__ import annotations

from collections.abc import Sequence

from nettorrent_mpi.engine.engine import Engine
from nettorrent_mpi.plan import exchange_specs as choices
from nettorrent_mpi.plan.pairing import make_pairing
from nettorrent_mpi.plan.scores import Scores, best_of


def steps_between(choice: choices.Elite, batch_size: int) -> int:
    """Steps from one comparison to the next: so many that at least `every_samples` rows are trained on."""
    return -(-choice.every_samples // batch_size)


def takes(choice: choices.Elite, found: Sequence[Scores], number: int, seed: int) -> list[int]:
    """Whose weights each replica takes after comparison `number`: its own or a winner's."""
    count = len(found)
    if choice.mode == "best":
        return [best_of(found, choice.metric)] * count
    result = list(range(count))
    for a, b, _ in make_pairing("shuffle", count, seed).edges(number):
        if a < b:
            winner = (a, b)[best_of((found[a], found[b]), choice.metric)]
            result[a] = result[b] = winner
    return result


def compare(engine: Engine, choice: choices.Elite, number: int) -> Scores:
    """Judge all replicas and let the losers take the winners' weights; gives the best one's scores. All ranks call."""
    found = engine.compare_replicas()
    assert found is not None, "elite needs validation rows"
    whose = takes(choice, found, number, engine.options.seed)
    if len(set(whose)) == 1:
        engine.replicas.become(whose[0])
    else:
        engine.replicas.adopt(whose)
    return found[best_of(found, choice.metric)]
