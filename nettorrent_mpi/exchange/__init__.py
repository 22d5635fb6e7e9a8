"""Floor 2: replicas agree by exchanging flat arrays with a group of peers, which takes no network and no engine.

exchange = make_exchange(Gossip("ring"), Shards([array]), peers, device, seed=1)
for step in range(1, 101):
    exchange.before_update(step)
    ...                                 # change `array` by a step of the optimizer
    exchange.after_update(rate, step)
exchange.become()                       # all replicas take the average
exchange.close()
"""

from __future__ import annotations

from nettorrent_mpi.comm.channels import Channel
from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.device.device import Device
from nettorrent_mpi.exchange.base import Exchange
from nettorrent_mpi.exchange.replicas import Shards
from nettorrent_mpi.plan import exchange_specs
from nettorrent_mpi.plan.specs import Spec

__all__ = ["Exchange", "Shards", "make_exchange"]


def make_exchange(
    spec: Spec,
    shards: Shards,
    peers: Group,
    device: Device,
    channel: Channel | None = None,
    *,
    optimizer: Spec | None = None,
    seed: int = 1,
    batch_size: int = 1,
    report_every: int = 1,
) -> Exchange:
    """Make the exchange that `spec` (one of exchange_specs.EXCHANGES) describes, for one rank with its `peers`: the
    ranks that own the same elements in the other replicas. All peers call, with shards of the same sizes.

    `peers` is a communicator for this exchange alone, which the caller made and frees after `close`. A group of one has
    no exchange, whatever `spec` says. `channel` connects the same ranks for whole shards, which travel at rest; without
    one, a GPU's go through the host's memory, as gossip's messages always do. `optimizer` determines how the learning
    rate is scaled (None: not at all), `batch_size` is the number of rows that all replicas together train on in a step,
    `report_every` the number of steps between two times at which a distance may be known. For `gather` and `fence` see
    Replicas. If messages are compressed, all replicas have to be equal when the exchange is made: both ends of a pair
    start with the same estimates.

    Raises ConfigError for an impossible pairing or compression.
    """
    if peers.size > 1 and isinstance(spec, exchange_specs.Gossip):
        from nettorrent_mpi.exchange.gossip import GossipExchange

        return GossipExchange(
            spec, shards, peers, device, channel, optimizer=optimizer, seed=seed, report_every=report_every
        )
    if peers.size > 1 and isinstance(spec, exchange_specs.Elite):
        from nettorrent_mpi.exchange.elite import EliteExchange

        return EliteExchange(spec, shards, peers, device, channel, seed=seed, batch_size=batch_size)
    return Exchange(shards, peers, device, channel)
