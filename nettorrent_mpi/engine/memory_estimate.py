"""The memory that a run takes is estimated: a dry run tells it, and a run's summary compares it with the measured
peak."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import numpy as np

from nettorrent_mpi.comm import library
from nettorrent_mpi.device.device import make_device
from nettorrent_mpi.engine.copy_interval import keeps_copies, members_with_copies, owned_bytes
from nettorrent_mpi.engine.run_plan import Options, Plan
from nettorrent_mpi.engine.setup import Setup
from nettorrent_mpi.engine.stage_schedule import StageSchedule
from nettorrent_mpi.nn.footprint import Footprint, footprint, update_footprint
from nettorrent_mpi.nn.losses import make_loss
from nettorrent_mpi.nn.optimizers import make_optimizer
from nettorrent_mpi.plan.blocks import span
from nettorrent_mpi.plan.compression import MessageFormat
from nettorrent_mpi.plan.exchange_specs import Gossip, PushSumMix, Whole
from nettorrent_mpi.plan.gossip_rules import LARGEST, SPARE, receives, withholding
from nettorrent_mpi.plan.memory import Memory, memory
from nettorrent_mpi.plan.pairing import Pairing, make_pairing
from nettorrent_mpi.plan.recovery import PLACES, buddies
from nettorrent_mpi.plan.sizes import in_parts, most_rows, parameters_of, rows_shared, sharers_of
from nettorrent_mpi.plan.topology import Topology

FILES = 15_000_000  # bytes that h5py takes when it is loaded (12 MB) and HDF5 when it writes (3 MB): measured with 3.16
MPI = 14_000_000  # bytes that it takes when it is loaded: 13 MB of Open MPI 5.0.11, 15 MB of MPICH 5.0.2
# Bytes of the host that CuPy 14.2, nvmath 1.0 and cuDNN 9.28 take when they are loaded, measured without a GPU (so its
# driver's are not in them), and of the memory that copies go through.
CUDA = 354_000_000 + (16 << 20)
NUMBA, ONEDNN = 117_000_000, 21_000_000  # bytes that they take when they are loaded: versions 0.68 and 3.2
_TRIAL = 1 << 17  # elements that are exchanged in a trial: beyond that scratch memory stays, or grows with them
_INDEX = 8  # bytes of a row's number, and of a label


class Libraries(NamedTuple):
    """Libraries are the bytes that a process uses before it holds anything of the run: rank 0's, which has read and
    checked the configuration, and the other ranks'."""

    first: int
    others: int


def estimate(setup: Setup, libraries: Libraries) -> list[Memory]:
    """Return the most memory of its node that a rank of each stage will hold; what lies on a GPU is not in it
    (engine/gpu_estimate.py). Stage 0 has rank 0, which writes the files.

    Runs the layers of every stage on a few rows (nn/footprint.py), so it belongs in a dry run or at the end of a run.
    """
    config, topology, facts, options = setup.config, setup.topology, setup.network.facts, setup.options
    states, on_gpu = len(make_optimizer(options.optimizer).states), options.device == "gpu"
    rows = most_rows(options.batch_size, options.micro_batches, topology.replicas)
    found = [Memory() for _ in topology.stages] if on_gpu else _computing(setup, rows, states)
    kernels, kept = CUDA if on_gpu else _kernels(options), copies_of(setup)
    mpi = MPI if topology.size > 1 and not library.loaded() else 0
    result = []
    for s, (stage, part) in enumerate(zip(topology.stages, found, strict=True)):
        parameters = round(parameters_of(facts[stage.first : stage.stop], stage.cols))
        own, sharers = parameters * options.wide, sharers_of(topology, stage, config.exact)
        arrays, letters = exchange_bytes(setup.plan, -(-parameters // stage.rows), states)
        result.append(
            replace(
                part,
                rows=_rows(setup, s, -(-rows // stage.rows)),
                copies=kept[s],
                exchange=letters if on_gpu else arrays + letters,
                files=FILES
                + _copied(setup, s, own // sharers, states)
                + (0 if on_gpu else _arrived(setup, -(-parameters // stage.rows), states))
                + (_gathered(setup) if s == 0 else 0),
                libraries=kernels + mpi + (libraries.first if s == 0 else libraries.others),
            )
        )
    return result


def of_node(topology: Topology, found: Sequence[Memory], node: int | None) -> int:
    """Return the bytes that the ranks of a node hold, of the node with most, where it has `node` of them (None: all).
    The rows of the data set lie there once."""
    each = topology.size // topology.replicas
    node = min(topology.size, node or topology.size)
    own = [memory.total - memory.rows for memory in found]
    rows = max(memory.rows for memory in found)
    if node >= each:
        sizes = [stage.size for stage in topology.stages]
        return rows + -(-node * sum(size * mine for size, mine in zip(sizes, own, strict=True)) // each)
    return rows + node * max(own)


def copies_of(setup: Setup) -> list[int]:
    """Return the bytes of the copies that a rank of each stage holds of its own state and of its ward's, where they are
    kept (engine/redundancy.py). All ranks are taken to share a node."""
    topology, members = setup.topology, members_with_copies(setup)
    if not keeps_copies(setup.config.redundancy) or members == 1:
        return [0] * len(topology.stages)
    owned = [owned_bytes(setup, s) for s in range(len(topology.stages))]
    most = [0] * len(topology.stages)
    for keeper, rank in ((keeper, rank) for rank, keeper in enumerate(buddies([0] * members))):
        own, theirs = topology.place(keeper).stage, topology.place(rank).stage
        most[own] = max(most[own], PLACES * (owned[own] + owned[theirs]))
    return most


def _computing(setup: Setup, rows: int, states: int) -> list[Memory]:
    """Return the memory of the ranks of each stage for what they compute with, on CPU cores."""
    config, topology, facts, options = setup.config, setup.topology, setup.network.facts, setup.options
    found = memory(
        topology,
        facts,
        options.batch_size,
        options.micro_batches,
        config.pipeline.kind,
        _layers(setup, rows),
        states=states,
        itemsize=options.itemsize,
        wide=options.wide,
        exact=config.exact,
        paces=setup.plan.paces,
    )
    optimizer = make_optimizer(options.optimizer)
    for s, stage in enumerate(topology.stages):
        parameters = round(parameters_of(facts[stage.first : stage.stop], stage.cols))
        sharers = sharers_of(topology, stage, config.exact)
        update = update_footprint(optimizer, parameters // sharers, setup.plan.weights_dtype)
        found[s] = replace(found[s], layers=found[s].layers + update + _mixing(setup, -(-parameters // stage.rows)))
    return found


def _kernels(options: Options) -> int:
    """Return the bytes of the optional kernel libraries, which are loaded with the first step."""
    names = make_device("cpu", options.kernels).names
    return NUMBA * ("numba" in names) + ONEDNN * ("onednn" in names and options.itemsize <= 4)


def _layers(setup: Setup, rows: int) -> list[Footprint]:
    """Return the arrays of each stage's layers for the largest number of rows that a rank has of a micro-batch."""
    network, topology, options = setup.network, setup.topology, setup.options

    batch_rows = rows_shared(topology, options.batch_size, setup.config.exact)

    @cache  # teams of a wide layout are often alike
    def of(first: int, stop: int, cols: int, here: int, sharers: int) -> Footprint:
        loss = make_loss(options.loss) if stop == network.weight_layers else None
        layers = network.stage(first, stop, cols, 0)
        elsewhere = [
            key for key, p in layers.parameters if p.product and in_parts(batch_rows, sharers, p.local[0], p.local[1])
        ]
        return footprint(
            layers,
            here,
            options.dtype,
            cols=cols,
            accumulate=options.micro_batches > 1,
            loss=loss,
            labels=setup.dataset.classes is not None,
            elsewhere=elsewhere,
            split=setup.plan.split,
        )

    return [
        of(stage.first, stage.stop, stage.cols, -(-rows // stage.rows), sharers_of(topology, stage, setup.config.exact))
        for stage in topology.stages
    ]


def _rows(setup: Setup, stage: int, here: int) -> int:
    """Return the bytes of rows and targets that a rank of a stage holds.

    The first stage holds all inputs (shared by the ranks of a node, one of which reads them), the last one all targets,
    and both the row order of two epochs, which overlap where one ends and the next begins.
    """
    dataset, sampler = setup.dataset, setup.sampler
    splits = [split for split in (dataset.train, dataset.test) if split is not None]
    first, last = stage == 0, stage == len(setup.topology.stages) - 1
    held = _INDEX * (len(sampler.training_rows) * (3 if first or last else 1) + len(sampler.validation_rows))
    row = int(np.prod(dataset.shape)) * dataset.train.dtype.itemsize
    if first:
        held += row * (sum(split.rows for split in splits) + here * (2 if setup.options.augment else 1))
    if last:
        outputs = int(np.prod(setup.network.output_shape)) * setup.options.itemsize
        held += (_INDEX if dataset.classes is not None else outputs) * sum(split.rows for split in splits)
    return held


def _gathered(setup: Setup) -> int:
    """Return the bytes that rank 0 gathers for model.h5: the network's parameters."""
    return sum(layer.parameters for layer in setup.network.facts) * setup.options.wide


def _copied(setup: Setup, stage: int, size: int, states: int) -> int:
    """Return the bytes of a rank's copy of what it owns, from which checkpoints are written: `size` bytes of parameters
    and all that is remembered of each, and earlier versions; where replicas differ, its part of the average besides."""
    replicas, common, own = setup.topology.replicas, 1 + states, 0.0
    gossip = setup.config.exchange
    if isinstance(gossip, Gossip):
        common += 2 * (gossip.slow_momentum > 0)
        own += withholding(gossip, replicas, _parts(gossip)) > 0
        if isinstance(gossip.mix, PushSumMix):  # float64, made for the copy
            own += 2 * 8 / setup.options.wide
        if not isinstance(gossip.compress, Whole):
            own += 1 + len(_partners(make_pairing(gossip.pairing, replicas, setup.options.seed), 0))
        elif gossip.overlap and gossip.every > 1:  # what was sent, made for the copy
            own += 2 * (1 + (states if "optimizer" in gossip.average else 0))
    average = 0 if setup.config.exact or replicas == 1 else 1 / replicas
    return round((common * (1 + average) + own + StageSchedule(setup.plan, stage).late) * size)


def _arrived(setup: Setup, elements: int, states: int) -> int:
    """Return the bytes of gossip's messages that are copied aside at a rest, when files are written: so many took the
    measured peak."""
    gossip = setup.config.exchange
    if setup.config.exact or not isinstance(gossip, Gossip) or not gossip.overlap:
        return 0
    return 2 * _letter(setup.options.wide, gossip, elements, _parts(gossip), states)


def exchange_bytes(plan: Plan, elements: int, states: int) -> tuple[int, int]:
    """Return the bytes that the exchange needs on a rank that owns `elements` of a replica's parameters: its arrays,
    and its messages."""
    gossip, replicas = plan.options.exchange, plan.topology.replicas
    if plan.exact:
        return 0, 0
    itemsize = plan.options.wide
    array = elements * itemsize
    if not isinstance(gossip, Gossip):
        return array, 0  # a copy of its own parameters, while another replica's or the average is evaluated
    pairing = make_pairing(gossip.pairing, replicas, plan.options.seed)
    parts = _parts(gossip)
    withheld = withholding(gossip, replicas, parts) > 0  # and the snapshot before each update
    arrays = 1 + 2 * withheld + 2 * (gossip.slow_momentum > 0)
    if not isinstance(gossip.compress, Whole):
        arrays += 2 + 2 * len(_partners(pairing, 0))
    letters = SPARE + max(receives(pairing, me) for me in range(replicas))
    return array * arrays, letters * _letter(itemsize, gossip, elements, parts, states)


def _parts(gossip: Gossip) -> int:
    """Return in how many parts the elements are exchanged; `auto`: one, as where the links can bear it."""
    return 1 if gossip.part == "auto" else round(1 / gossip.part)


def _letter(itemsize: int, gossip: Gossip, elements: int, parts: int, states: int) -> int:
    """Return the bytes of one message."""

    def length(count: int) -> int:
        if isinstance(gossip.compress, Whole):
            return count * itemsize * (1 + (states if "optimizer" in gossip.average else 0))
        return MessageFormat(gossip.compress).bytes(count)

    parts = min(max(parts, -(-length(elements) // LARGEST)), max(elements, 1))
    return length(span(elements, parts, 0).size)


def _mixing(setup: Setup, elements: int) -> int:
    """Return the bytes of the device's scratch memory that gossip uses on a rank that owns `elements` of a replica's
    parameters: measured with a part of them, as the update's."""
    gossip, dtype = setup.config.exchange, setup.plan.weights_dtype
    if setup.config.exact or setup.topology.replicas == 1 or not isinstance(gossip, Gossip):
        return 0

    def trial(size: int) -> int:
        device = make_device("cpu", "numpy")
        values = device.zeros((size,), dtype)
        device.ops.move(values, 0.5, values)
        if not isinstance(gossip.compress, Whole):
            form = MessageFormat(gossip.compress)
            message = device.zeros((form.bytes(size),), "uint8")
            device.ops.encode(form.kind, values, message)
            device.ops.decode_add(form.kind, message, values)
        return device.working_bytes

    sent = span(elements, _parts(gossip), 0).size
    more = trial(min(sent, _TRIAL))
    return more if sent <= _TRIAL else more + (more - trial(_TRIAL // 2)) * (sent - _TRIAL) // (_TRIAL // 2)


def _partners(pairing: Pairing, me: int) -> set[int]:
    """Return all partners of a replica over the rounds of a fixed pairing (not for randomly drawn partners)."""
    rounds = range(pairing.period or 1)
    pairs = [pair for number in rounds for pair in (*pairing.receives(number, me), *pairing.sends(number, me))]
    return {other for other, _ in pairs}
