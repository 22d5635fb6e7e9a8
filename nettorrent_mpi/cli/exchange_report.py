"""The report of `--dry-run` on the exchange between replicas, and on a pipeline that does not flush."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nettorrent_mpi.cli.tables import MOST_LINES, aligned, wrapped
from nettorrent_mpi.nn.optimizers import make_optimizer
from nettorrent_mpi.plan.blocks import span
from nettorrent_mpi.plan.compression import MessageFormat
from nettorrent_mpi.plan.exchange_specs import Async, ConstantMix, Elite, Gossip, Nothing, PushSumMix, Whole
from nettorrent_mpi.plan.gossip_rules import withholding
from nettorrent_mpi.plan.mixing import MOST_ROUNDS, rounds_to_consensus, spectral_gap
from nettorrent_mpi.plan.pairing import Pairing, make_pairing
from nettorrent_mpi.plan.sizes import parameters_of
from nettorrent_mpi.plan.specs import Spec
from nettorrent_mpi.plan.stream import mean_staleness, staleness_bound, stream, versions
from nettorrent_mpi.plan.timeline import simulate, steady_bubble

if TYPE_CHECKING:  # the report needs neither engine nor MPI
    from nettorrent_mpi.engine.setup import Setup

AGREED = 1e-3  # the distance at which replicas count as agreed, relative to the initial one


def exchange_block(setup: Setup) -> str | None:
    """Describe who exchanges what with whom, and how fast the replicas agree; None if there is no exchange."""
    config, replicas = setup.config, setup.topology.replicas
    exchange = config.exchange
    if replicas == 1 and config.exact:
        return None
    if isinstance(exchange, Gossip):
        lines = _gossip(setup, exchange)
    elif isinstance(exchange, Elite):
        lines = _elite(setup, exchange)
    elif isinstance(exchange, Nothing):
        apart = f"the {replicas} replicas train apart" if replicas > 1 else "1 replica"
        lines = wrapped("none      ", f"{apart}: nothing is sent between replicas, which are never averaged")
    else:
        lines = _allreduce(setup)
    whose = (
        "each replica trains on its own part" if config.data.partition == "disjoint" else "all replicas train on all"
    )
    return "\n".join(["EXCHANGE", *lines, f"rows      {whose} of the training rows"])


def stream_block(setup: Setup) -> str | None:
    """Describe how stale each stage's gradients are and how many weight versions it keeps; None if it flushes."""
    pipeline, topology, facts = setup.config.pipeline, setup.topology, setup.network.facts
    stages, pieces = len(topology.stages), setup.options.micro_batches
    if not isinstance(pipeline, Async):
        return None
    rows = []
    for s in range(min(stages, MOST_LINES)):
        stage = topology.stages[s]
        parameters = sum(layer.parameters for layer in facts[stage.first : stage.stop])
        rows.append([
            str(s),
            f"{parameters:,}",
            str(staleness_bound(stages, pieces, s)),
            f"{mean_staleness(stages, pieces, s):.2f}",
            str(versions(stages, pieces, s)),
        ])  # fmt: skip
    lines = [
        "STALENESS (updates between the weights that a gradient was computed with and those that it changes)",
        aligned(["stage", "parameters", "at most", "on average", "versions of the weights"], rows),
    ]
    if stages > MOST_LINES:
        lines.append(f"... and {stages - MOST_LINES} more stages")
    # long enough that the pipeline is full for some mini-batches
    steps = 2 * staleness_bound(stages, pieces, 0) + 4
    line = simulate(stream(stages, pieces, steps, transfers=False), 1.0, 2.0, 0.0)
    bubble = f"{100 * steady_bubble(line):.0f} %"
    lines.append(f"once the pipeline is full, {bubble} of the time is a bubble (simulated with stages of equal cost)")
    if pipeline.staleness_aware:
        lines.append("the learning rate of a stage is divided by 1 + its staleness on average")
    return "\n".join(lines)


def _allreduce(setup: Setup) -> list[str]:
    replicas, options = setup.topology.replicas, setup.options
    each = options.itemsize + (options.itemsize if options.device == "gpu" else options.wide)  # a weight, a gradient
    most = 0.0
    for index, stage in enumerate(setup.topology.stages):
        sharers = stage.rows * replicas
        most = max(most, (sharers - 1) / sharers * _parameters(setup, index) * each)
    return [
        f"allreduce gradients are reduced over the {replicas} replicas, which stay equal",
        f"sends     a rank sends at most {_bytes(most)} a step",
    ]


def _elite(setup: Setup, elite: Elite) -> list[str]:
    rows = len(setup.sampler.validation_rows)
    steps = -(-elite.every_samples // setup.config.train.batch_size)
    what = elite.metric.replace("_", " ")
    who = "all take the best one's weights" if elite.mode == "best" else "the worse of each pair takes the better one's"
    moved = _bytes(_vector(setup, states=True) * setup.options.wide)
    often = f"about every {steps:,} steps" if steps > 1 else "every step"
    return [
        *wrapped("elite     ", f"{setup.topology.replicas} replicas are compared by {what}: {who} ({elite.mode})"),
        f"round     every {elite.every_samples:,} rows of all replicas together, {often}; on {rows:,} validation rows",
        f"sends     a rank receives at most {moved} at a comparison: parameters and optimizer states",
    ]


def _gossip(setup: Setup, gossip: Gossip) -> list[str]:
    pairing = make_pairing(gossip.pairing, setup.topology.replicas, setup.config.seed)
    period = "drawn anew each round" if pairing.period is None else f"repeats after {_count(pairing.period, 'round')}"
    rounds = rounds_to_consensus(pairing, AGREED)
    parts = _parts(setup, gossip)
    until = f"more than {MOST_ROUNDS:,} rounds" if rounds is None else _count(rounds, "round")
    if gossip.part == "auto" or parts > 1:
        until += " of each part" if gossip.part == "auto" else f" of each of {parts} parts"
    steps = (rounds or 0) * parts * gossip.every
    in_steps = f" ({steps:,} steps)" if rounds and gossip.part != "auto" and steps > rounds else ""
    own = (
        "" if isinstance(gossip.mix, PushSumMix) or gossip.mix == ConstantMix() else ", with the pairing's own weights"
    )
    agreement = (
        f"spectral gap {spectral_gap(pairing):.3g}; {until}{in_steps} until the replicas' distance is {AGREED:g} "
        f"of what it was{own}{_fewer(gossip)}"
    )
    when = [f"every {gossip.every:,} steps" if gossip.every > 1 else "every step"]
    if gossip.probability < 1:
        when.append(f"each pair with probability {gossip.probability:g}")
    when.append(
        "messages travel while the next step computes" if gossip.overlap else "each step waits for its messages"
    )
    kept = withholding(gossip, pairing.replicas, parts)
    if kept:
        most = "up to " if gossip.part == "auto" and gossip.withhold == "auto" else ""
        when.append(f"{most}{kept:.0%} of a replica's own step is withheld until peers know it")
    when.append(f"deadline {gossip.deadline if isinstance(gossip.deadline, str) else f'{gossip.deadline:g} ms'}")
    lines = [
        *wrapped(
            "gossip    ", f"{gossip.pairing} over {pairing.replicas} replicas, {period}; {_average(pairing, gossip)}"
        ),
        *wrapped("agreement ", agreement),
        *wrapped("mix       ", _asked(gossip.mix)),
        *wrapped("round     ", "; ".join(when)),
        *wrapped("sends     ", _sends(setup, gossip, pairing)),
    ]
    exact = []
    if gossip.exact_every is not None:
        momentum = f", with slow momentum {gossip.slow_momentum:g}" if gossip.slow_momentum else ""
        exact.append(f"every {_count(gossip.exact_every, 'round')}{momentum}")
    if gossip.consensus is not None:
        exact.append(f"whenever the replicas' relative distance is above {gossip.consensus.max:g}")
    if exact:
        lines += wrapped("exact     ", f"all replicas are averaged exactly {'; and '.join(exact)}")
    return lines


def _average(pairing: Pairing, gossip: Gossip) -> str:
    """Say whether the exchange preserves the average of the replicas."""
    if isinstance(gossip.mix, PushSumMix):
        return "preserves the average: every message carries a part of its sender's mass"
    if gossip.mix != ConstantMix() or gossip.divergence_threshold > 0:
        return "may not preserve the average: each replica weights what arrives"
    if not pairing.doubly_stochastic:
        return (
            "does not preserve the average: a replica may receive several messages or none (mix: push_sum preserves it)"
        )
    if gossip.probability < 1 and not pairing.symmetric:
        return (
            "does not preserve the average: a replica sends to one and receives from another, and either may be skipped"
        )
    return "preserves the average"


def _fewer(gossip: Gossip) -> str:
    """Name what makes a round achieve less than the pairing's figures."""
    less = [
        *(["this probability"] if gossip.probability < 1 else []),
        *(["compression"] if not isinstance(gossip.compress, Whole) else []),
    ]
    return f"; with {' and '.join(less)} more" if less else ""


def _sends(setup: Setup, gossip: Gossip, pairing: Pairing) -> str:
    """Describe what the rank with the most parameters sends in a round."""
    parts = _parts(setup, gossip)
    elements = span(_vector(setup, states="optimizer" in gossip.average), parts, 0).size
    whole, compress = elements * setup.options.wide, gossip.compress
    size, smaller = whole, ""
    if not isinstance(compress, Whole):
        size = MessageFormat(compress).bytes(elements)
        smaller = f", {compress.kind} makes it {whole / max(size, 1):.1f} times smaller"
    rounds, everybody = range(pairing.period or 1), range(pairing.replicas)
    most = max(len(pairing.sends(number, replica)) for number in rounds for replica in everybody)
    what = " and ".join(name if name == "parameters" else "optimizer states" for name in gossip.average)
    if gossip.part == "auto":
        what += ", or as many as travel within a step (part: auto)"
    elif parts > 1:
        what += f", one of {parts} parts that take turns"
    messages = f"{_count(most, 'message')} of {_bytes(size)}"
    return f"a rank sends at most {messages} a round: {elements:,} elements of its {what}{smaller}"


def _vector(setup: Setup, *, states: bool) -> int:
    """Return the largest number of elements that a rank exchanges: its part of its col's parameters, in the largest
    stage, and with `states` the optimizer's."""
    stages = setup.topology.stages
    arrays = 1 + states * len(make_optimizer(setup.config.train.optimizer).states)
    return max(-(-_parameters(setup, index) // stage.rows) for index, stage in enumerate(stages)) * arrays


def _parts(setup: Setup, gossip: Gossip) -> int:
    """Return the number of parts of the vector, which take turns; 1 if it is measured later."""
    if gossip.part == "auto":
        return 1
    return max(min(round(1 / gossip.part), _vector(setup, states="optimizer" in gossip.average)), 1)


def _parameters(setup: Setup, stage: int) -> int:
    """Return the most parameters that one col of a stage holds."""
    it = setup.topology.stages[stage]
    return round(parameters_of(setup.network.facts[it.first : it.stop], it.cols))


def _asked(spec: Spec) -> str:
    """Write a spec's options: `linear, start 0.5, end 0.1, target 1000`."""
    if spec == ConstantMix():
        return "the pairing's own weights"
    return ", ".join([spec.kind, *(f"{name} {value}" for name, value in spec.options().items())])


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' if number != 1 else ''}"


def _bytes(number: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} bytes"
