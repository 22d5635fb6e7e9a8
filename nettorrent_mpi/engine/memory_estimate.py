"""The memory estimate of a run: a dry run predicts it, and a run's summary compares it with the measured peak."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from nettorrent_mpi.comm import library
from nettorrent_mpi.device.device import make_device
from nettorrent_mpi.engine.run_plan import Options
from nettorrent_mpi.engine.setup import Setup
from nettorrent_mpi.nn.footprint import Footprint, footprint, update_footprint
from nettorrent_mpi.nn.losses import make_loss
from nettorrent_mpi.nn.optimizers import make_optimizer
from nettorrent_mpi.plan.blocks import span
from nettorrent_mpi.plan.compression import MessageFormat
from nettorrent_mpi.plan.cost import in_parts, most_rows, parameters_of, rows_shared, sharers_of
from nettorrent_mpi.plan.exchange_specs import Gossip, PushSumMix, Whole
from nettorrent_mpi.plan.gossip_rules import LARGEST, SPARE, receives, withholding
from nettorrent_mpi.plan.memory import Memory, memory
from nettorrent_mpi.plan.pairing import Pairing, make_pairing

FILES = 15_000_000  # bytes that h5py takes when it is loaded (12 MB) and HDF5 when it writes (3 MB): measured with 3.16
MPI = 14_000_000  # bytes that it takes when it is loaded: 13 MB of Open MPI 5.0.11, 15 MB of MPICH 5.0.2
NUMBA, ONEDNN = 117_000_000, 21_000_000  # bytes that they take when they are loaded: versions 0.68 and 3.2
_TRIAL = 1 << 17  # elements that are exchanged in a trial: beyond that scratch memory stays, or grows with them
_INDEX = 8  # bytes of a row's number, and of a label


class Libraries(NamedTuple):
    """Bytes that a process uses before it holds anything of the run: rank 0's, which has read and checked the
    configuration, and the other ranks'."""

    first: int
    others: int


def estimate(setup: Setup, libraries: Libraries) -> list[Memory]:
    """Return the most memory that a rank of each stage will hold. Stage 0 has rank 0, which writes the files.

    Runs the layers of every stage on a few rows (nn/footprint.py), so it belongs in a dry run or at the end of a run.
    """
    config, topology, facts, options = setup.config, setup.topology, setup.network.facts, setup.options
    itemsize, optimizer = options.itemsize, make_optimizer(options.optimizer)
    states = len(optimizer.states)
    rows = most_rows(options.batch_size, options.micro_batches, topology.replicas)
    found = memory(
        topology,
        facts,
        options.batch_size,
        options.micro_batches,
        config.pipeline.kind,
        _layers(setup, rows),
        states=states,
        itemsize=itemsize,
        exact=config.exact,
    )
    kernels = _kernels(options)
    mpi = MPI if topology.size > 1 and not library.loaded() else 0
    result = []
    for s, (stage, part) in enumerate(zip(topology.stages, found, strict=True)):
        own = round(parameters_of(facts[stage.first : stage.stop], stage.cols)) * itemsize
        sharers = sharers_of(topology, stage, config.exact)
        # For a checkpoint each rank holds the replicas' average besides its own weights, where replicas differ.
        average = 0 if config.exact or topology.replicas == 1 else own + states * own // sharers
        result.append(
            replace(
                part,
                layers=part.layers
                + update_footprint(optimizer, own // itemsize // sharers, _measured(options))
                + _mixing(setup, -(-own // itemsize // stage.rows)),
                rows=_rows(setup, s, -(-rows // stage.rows)),
                exchange=_exchange(setup, -(-own // itemsize // stage.rows), states),
                files=average + (FILES + _gathered(setup, states) if s == 0 else 0),
                libraries=kernels + mpi + (libraries.first if s == 0 else libraries.others),
            )
        )
    return result


def _kernels(options: Options) -> int:
    """Return the bytes of the optional kernel libraries, which are loaded with the first step."""
    names = make_device("cpu", options.kernels).names
    return NUMBA * ("numba" in names) + ONEDNN * ("onednn" in names and str(options.dtype) == "float32")


def _measured(options: Options) -> Any:
    """Return the type of the arrays in trials. NumPy has another one of 2 bytes."""
    return "float16" if options.itemsize == 2 else options.dtype


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
            _measured(options),
            cols=cols,
            accumulate=options.micro_batches > 1,
            loss=loss,
            labels=setup.dataset.classes is not None,
            elsewhere=elsewhere,
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


def _gathered(setup: Setup, states: int) -> int:
    """Return the bytes that rank 0 gathers for a checkpoint: parameters and all that is remembered of each; where
    replicas differ, every replica's and their average."""
    config, replicas = setup.config, setup.topology.replicas
    arrays = 1 + states
    if isinstance(config.exchange, Gossip):
        arrays += 2 * (config.exchange.slow_momentum > 0) + isinstance(config.exchange.mix, PushSumMix)
        arrays += (
            config.exchange.deadline == "none" and withholding(config.exchange, replicas, _parts(config.exchange)) > 0
        )
    networks = 1 if config.exact or replicas == 1 else replicas + 1
    parameters = sum(layer.parameters for layer in setup.network.facts)
    return networks * arrays * parameters * setup.options.itemsize


def _exchange(setup: Setup, elements: int, states: int) -> int:
    """Return the bytes that the exchange needs on a rank that owns `elements` of a replica's parameters."""
    config, replicas = setup.config, setup.topology.replicas
    if config.exact or replicas == 1:
        return 0
    array = elements * _weight(setup)
    if not isinstance(config.exchange, Gossip):
        return array  # a copy of its own parameters, while another replica's or the average is evaluated
    gossip = config.exchange
    pairing = make_pairing(gossip.pairing, replicas, config.seed)
    parts = _parts(gossip)
    withheld = withholding(gossip, replicas, parts) > 0  # and the snapshot before each update
    arrays = 1 + 2 * withheld + 2 * (gossip.slow_momentum > 0)
    if not isinstance(gossip.compress, Whole):
        arrays += 2 + 2 * len(_partners(pairing, 0))
    letters = SPARE + max(receives(pairing, me) for me in range(replicas))
    return array * arrays + letters * _letter(setup, gossip, elements, parts, states)


def _weight(setup: Setup) -> int:
    """Return the bytes of a weight that is updated and exchanged: of float32 where layers compute in bfloat16."""
    return max(setup.options.itemsize, 4)


def _parts(gossip: Gossip) -> int:
    """Return in how many parts the elements are exchanged; `auto`: one, as where the links can bear it."""
    return 1 if gossip.part == "auto" else round(1 / gossip.part)


def _letter(setup: Setup, gossip: Gossip, elements: int, parts: int, states: int) -> int:
    """Return the bytes of one message."""

    def length(count: int) -> int:
        if isinstance(gossip.compress, Whole):
            return count * _weight(setup) * (1 + (states if "optimizer" in gossip.average else 0))
        return MessageFormat(gossip.compress).bytes(count)

    parts = min(max(parts, -(-length(elements) // LARGEST)), max(elements, 1))
    return length(span(elements, parts, 0).size)


def _mixing(setup: Setup, elements: int) -> int:
    """Return the bytes of the device's scratch memory that gossip uses on a rank that owns `elements` of a replica's
    parameters: measured with a part of them, as the update's."""
    gossip, dtype = setup.config.exchange, _measured(setup.options)
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
