"""A configuration has a layout on a number of ranks, and the cost model predicts a step of it."""

from __future__ import annotations

from functools import partial

from nettorrent_mpi.config.sections import Config, Layout
from nettorrent_mpi.nn.model import Network
from nettorrent_mpi.nn.optimizers import make_optimizer
from nettorrent_mpi.plan.blocks import span
from nettorrent_mpi.plan.compression import MessageFormat
from nettorrent_mpi.plan.cost import Prediction, predict
from nettorrent_mpi.plan.errors import LayoutError
from nettorrent_mpi.plan.exchange_specs import Async, Gossip, Whole, ZeroBubble
from nettorrent_mpi.plan.layouts import given_layout, layers_layout, partition
from nettorrent_mpi.plan.performance import Machine
from nettorrent_mpi.plan.search import fast_layouts, one_team, weighed
from nettorrent_mpi.plan.sizes import little_kept
from nettorrent_mpi.plan.stage_cost import Peering
from nettorrent_mpi.plan.topology import Stage, Topology

MICRO_BATCHES = 4  # of `micro_batches: auto` in a pipeline
MANY = 4096  # elements of a message whose length tells that of longer ones
MESSAGES = {"ring": 2, "grid": 4, "complete": MANY}  # that a replica sends in a round, at most; of other pairings one
AS_FAST = 1.02  # layouts whose times differ by less are predicted to be equally fast


def predicted(config: Config, network: Network, topology: Topology, machine: Machine | None = None) -> Prediction:
    """Return the predicted step of this configuration in this layout on this machine (None: the constants')."""
    return _predicted(config, network, topology, micro_batches(config, network, topology, machine), machine)


def _predicted(
    config: Config, network: Network, topology: Topology, pieces: int, machine: Machine | None, *, quick: bool = False
) -> Prediction:
    return predict(
        topology,
        network.facts,
        config.train.batch_size,
        pieces,
        config.pipeline.kind,
        machine,
        exact=config.exact,
        peering=peering_of(config, topology.replicas),
        stored=stored(config),
        meets=config.train.clip_norm is not None,
        quick=quick,
    )


def stored(config: Config) -> int | None:
    """Return the limit of micro-batches that a stage of a zero-bubble pipeline keeps; None: the number of stages."""
    return config.pipeline.stored if isinstance(config.pipeline, ZeroBubble) else None


def peering_of(config: Config, replicas: int) -> Peering | None:
    """Return what replicas send each other by gossip; None where they send nothing in most steps."""
    gossip = config.exchange
    if not isinstance(gossip, Gossip) or replicas == 1:
        return None
    sent = float(min(MESSAGES.get(gossip.pairing, 1), replicas - 1))
    if not isinstance(gossip.compress, Whole):
        sent *= MessageFormat(gossip.compress).bytes(MANY) / MANY
    else:
        states = len(make_optimizer(config.train.optimizer).states) if "optimizer" in gossip.average else 0
        sent *= (8 if config.dtype == "float64" else 4) * (1 + states)
    part = 1.0 if gossip.part == "auto" else gossip.part
    return Peering(sent * part * gossip.probability, gossip.every, gossip.overlap, gossip.part == "auto")


def one_stage(config: Config, network: Network, ranks: int, machine: Machine | None = None) -> Topology:
    """Return the layout with all layers in one stage that is predicted to be the fastest: `layout: auto` is at least as
    fast, but takes longer to find."""
    facts = network.facts
    most = min(layer.units for layer in facts)
    found = [one_team(len(facts), ranks, cols) for cols in range(1, min(ranks, most) + 1) if ranks % cols == 0]
    return min(found, key=lambda topology: predicted(config, network, topology, machine).seconds)


def on_fewer_ranks(
    config: Config, network: Network, ranks: int, machine: Machine | None = None
) -> list[tuple[int, Prediction]]:
    """Return the predicted steps on half as many ranks, a quarter, and so on to 1, where the layout is possible."""
    found = []
    while ranks > 1:
        ranks //= 2
        try:
            topology = lay_out(config, network, ranks, machine)
        except LayoutError:
            continue
        found.append((ranks, predicted(config, network, topology, machine)))
    return found


def lay_out(config: Config, network: Network, ranks: int, machine: Machine | None = None) -> Topology:
    """Return the topology of the configuration's layout on this many ranks. Raises LayoutError."""
    return layouts(config, network, ranks, machine)[0]


def layouts(config: Config, network: Network, ranks: int, machine: Machine | None = None) -> list[Topology]:
    """Return the topologies that the configuration's layout may have on this many ranks, the one that is to be taken
    first: of `auto` several, of others one. Raises LayoutError."""
    train, layout, facts = config.train, config.layout, network.facts
    if isinstance(layout, Layout) and layout.swarms is not None:
        swarms = [(swarm.layers, swarm.rows, swarm.cols) for swarm in layout.swarms]
        return [given_layout(layout.replicas, swarms, facts, ranks)]
    pieces = _pieces(config, MICRO_BATCHES)
    if layout == "auto":
        counts = partial(micro_batches_of, config, network, machine=machine)
        peering = peering_of(config, ranks)
        return fast_layouts(
            facts, ranks, train.batch_size, counts, config.pipeline.kind, machine, exact=config.exact, peering=peering
        )
    replicas = layout.replicas if isinstance(layout, Layout) else 1
    if ranks % replicas:
        fewer, more = ranks // replicas * replicas, (ranks // replicas + 1) * replicas
        divisors = [n for n in range(1, ranks + 1) if ranks % n == 0]
        near = min(divisors, key=lambda n: (abs(n - replicas), n))
        raise LayoutError(
            f"layout.replicas: {replicas} replicas of equal size cannot be made of {ranks} ranks: start "
            f"{f'{fewer} or {more}' if fewer else more} ranks, or write layout: {{replicas: {near}}}"
        )
    rows = span(span(train.batch_size, pieces, 0).size, replicas, 0).size  # of a micro-batch, in one replica
    each = ranks // replicas
    weights = weighed(facts, (machine or Machine()).of(ranks), -(-rows // max(each // len(facts), 1)))
    return [Topology(replicas, layers_layout(weights, each, rows).stages)]


def micro_batches(config: Config, network: Network, topology: Topology, machine: Machine | None = None) -> int:
    """Return the number of micro-batches of a mini-batch.

    With batch norm it never depends on the layout: statistics are taken over one micro-batch, and parallel has to equal
    serial. An asynchronous pipeline wants as many as it has stages, so that two versions of the weights suffice, as
    long as every replica has a row of each. A zero-bubble pipeline has as many as are predicted to be fastest: see
    `_fastest_pieces`. Without a pipeline micro-batches only save memory: there is one where there is little to save
    (`_at_once`).
    """
    if _chooses(config, network, len(topology.stages)):
        return _fastest_pieces(config, network, topology, machine)
    return micro_batches_of(config, network, len(topology.stages), topology.replicas)


def micro_batches_of(
    config: Config, network: Network, stages: int, replicas: int = 1, machine: Machine | None = None
) -> int:
    """Return what `micro_batches` does for a layout with these numbers of stages and replicas, of one rank each."""
    if _chooses(config, network, stages):
        parts = partition([facts.operations for facts in network.facts], stages)
        topology = Topology(replicas, tuple(Stage(*part, 1, 1) for part in parts))
        return _fastest_pieces(config, network, topology, machine)
    automatic = MICRO_BATCHES
    if not network.has_batch_norm:
        if stages == 1:
            automatic = 1
        elif isinstance(config.pipeline, Async):
            automatic = max(automatic, min(stages, config.train.batch_size // replicas))
    return 1 if stages == 1 and _at_once(config, network, replicas) else _pieces(config, automatic)


def _at_once(config: Config, network: Network, replicas: int) -> bool:
    """Whether a stage without neighbours computes a mini-batch as one micro-batch, however many it is to be cut into:
    longer products, and fewer calls, give the same result up to rounding. Not where that depends on the micro-batch:
    batch norm's statistics, what layers from outside the package may do, the rows of replicas that differ."""
    alike = config.exact or replicas == 1
    free = alike and not network.has_batch_norm and not network.whole.foreign
    return free and little_kept(network.facts, config.train.batch_size)


def _chooses(config: Config, network: Network, stages: int) -> bool:
    """Whether the number of micro-batches is the one that is predicted to be fastest."""
    free = config.train.micro_batches == "auto" and not network.has_batch_norm
    return free and stages > 1 and isinstance(config.pipeline, ZeroBubble)


def _fastest_pieces(config: Config, network: Network, topology: Topology, machine: Machine | None) -> int:
    """Return one to four times as many micro-batches as there are stages: the fewest with which the predicted step is
    nearly the fastest. More shorten the bubble, and each costs calls and messages."""
    stages, most = len(topology.stages), max(config.train.batch_size // topology.replicas, 1)
    counts = sorted({min(times * stages, most) for times in (1, 2, 3, 4)})
    seconds = [_predicted(config, network, topology, count, machine, quick=True).seconds for count in counts]
    return next(count for count, each in zip(counts, seconds, strict=True) if each <= AS_FAST * min(seconds))


def _pieces(config: Config, automatic: int) -> int:
    train = config.train
    return min(automatic, train.batch_size) if train.micro_batches == "auto" else train.micro_batches
