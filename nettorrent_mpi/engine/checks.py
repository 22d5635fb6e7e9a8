"""Checks of a whole setup: what cannot be meant is refused, what is doubtful gets a warning of one line."""

from __future__ import annotations

from nettorrent_mpi.config.sections import Config
from nettorrent_mpi.data.rows import Dataset
from nettorrent_mpi.data.sampler import Sampler
from nettorrent_mpi.engine.layout import AS_FAST, on_fewer_ranks, one_stage, predicted
from nettorrent_mpi.nn.model import Network
from nettorrent_mpi.plan.blocks import span
from nettorrent_mpi.plan.cost import Machine
from nettorrent_mpi.plan.errors import ConfigError
from nettorrent_mpi.plan.exchange_specs import Elite, Gossip
from nettorrent_mpi.plan.pairing import make_pairing
from nettorrent_mpi.plan.topology import Topology

MUCH, LONG = 1.5, 10.0  # a layout is told of if it takes so many times as long as `auto`, and so many seconds more


def doubts(config: Config, dataset: Dataset, sampler: Sampler) -> list[str]:
    """Return the warnings of a setup, one line each."""
    found = list(dataset.notes)
    rows, batch_size = len(sampler.training_rows), config.train.batch_size
    if batch_size > rows:
        found.append(
            f"train.batch_size: {batch_size}, but there are only {rows} training rows: every mini-batch has all of "
            "them, and an epoch is one step"
        )
    return found


def slow(config: Config, network: Network, topology: Topology, steps: int) -> list[str]:
    """Return a warning where the default layout makes the run much longer than need be, and one where fewer ranks would
    be faster: predictions of a few milliseconds, for runs that last longer."""
    ours, ranks = predicted(config, network, topology).seconds, topology.size
    if config.layout != "layers" or ranks == 1 or steps * ours < LONG:
        return []
    found, machine = [], f"on cores of {Machine().flops / 1e9:.0f} GFLOP/s"
    auto = predicted(config, network, one_stage(config, network, ranks)).seconds  # or less
    if ours >= MUCH * auto and steps * (ours - auto) >= LONG:
        found.append(
            f"layout: layers is predicted to take {ours / auto:.1f} times as long as auto ({steps * ours:,.0f} s, not "
            f"{steps * auto:,.0f} s, {machine}): set layout=auto, or compare them with --dry-run"
        )
    seconds, fewer = min(((each.seconds, count) for count, each in on_fewer_ranks(config, network, ranks)))
    if AS_FAST * seconds < ours:
        found.append(
            f"layout: layers is predicted to be slower on {ranks} ranks than on {fewer} ({steps * ours:,.0f} s, not "
            f"{steps * seconds:,.0f} s, {machine}): compare them with --dry-run"
        )
    return found


def check_batch_norm(config: Config, network: Network, topology: Topology, pieces: int) -> None:
    """Raise ConfigError if a batch norm would see one row at a time, which has no variance."""
    separate = 1 if config.exact else topology.replicas  # that take separate batch statistics
    rows = span(config.train.batch_size, pieces, pieces - 1).size // separate
    if network.batch_norms_of_vectors and rows <= 1:
        name, apart = network.batch_norms_of_vectors[0], f" of each of the {separate} replicas" if separate > 1 else ""
        raise ConfigError(
            f"{config.train.batch_size} rows in {pieces} micro-batch{'es' if pieces > 1 else ''} leave "
            f"{name} a single row{apart} at a time, which has no variance: take at least "
            f"{2 * pieces * separate} rows" + (", or fewer micro_batches" if pieces > 1 else ""),
            key="train.batch_size",
        )


def check_exchange(config: Config, topology: Topology, pieces: int) -> None:
    """Raise ConfigError if the configured exchange is impossible with this number of replicas, or if a replica that
    trains on its own rows would get none."""
    exchange, replicas, batch_size = config.exchange, topology.replicas, config.train.batch_size
    if replicas == 1 and isinstance(exchange, Elite | Gossip):
        nobody = "take weights from" if isinstance(exchange, Elite) else "average with"
        raise ConfigError(
            f"changes nothing with 1 replica: there is nobody to {nobody}; "
            "give layout: {replicas: N} or exchange: allreduce",
            key=f"exchange.{exchange.kind}",
        )
    if isinstance(exchange, Gossip):
        make_pairing(exchange.pairing, replicas, config.seed)
    most = span(batch_size, pieces, 0).size  # rows of the largest micro-batch, one for each replica at most
    if not config.exact and most < replicas:
        raise ConfigError(
            f"{batch_size} rows in {pieces} micro-batch{'es' if pieces > 1 else ''} leave {replicas - most} of the "
            f"{replicas} replicas nothing to train on: take at least {pieces * (replicas - 1) + 1} rows"
            + (", or fewer micro_batches" if pieces > 1 else ""),
            key="train.batch_size",
        )
