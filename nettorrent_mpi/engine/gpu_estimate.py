"""This module estimates what each rank of a run holds in its GPU's memory. No GPU is needed."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from math import prod
from typing import cast

from nettorrent_mpi.device.arrays import as_dtype
from nettorrent_mpi.device.device import Device, StreamDevice, planned_gpu
from nettorrent_mpi.device.visible import VisibleGpu
from nettorrent_mpi.engine.memory_estimate import exchange_bytes
from nettorrent_mpi.engine.run_plan import Plan
from nettorrent_mpi.engine.setup import Setup
from nettorrent_mpi.engine.stage_schedule import StageSchedule
from nettorrent_mpi.nn.footprint import Footprint, footprint_on
from nettorrent_mpi.nn.losses import make_loss
from nettorrent_mpi.nn.optimizers import make_optimizer
from nettorrent_mpi.plan.actions import Buffers
from nettorrent_mpi.plan.memory import Memory
from nettorrent_mpi.plan.schedule import STREAMS
from nettorrent_mpi.plan.sizes import most_rows, parameters_of, part_of, sharers_of
from nettorrent_mpi.plan.stream import versions

NUMBER = 8  # bytes of a row's number, of a label, and of what the optimizer and metrics read
# Bytes that CUDA, the kernels and the libraries take of a GPU besides arrays, and NCCL's buffers, if ranks exchange by
# it. Both are assumed: what they are on a GPU has not been measured.
CONTEXT, NCCL = 600_000_000, 200_000_000


def arrays(plan: Plan, labels: bool = True) -> list[Memory]:
    """Return the bytes of the arrays that an engine allocates on the GPU of each stage's largest rank: parameters,
    optimizer, layers and links. With `labels` targets are labels. Runs the layers of every stage on a GPU that only
    counts."""
    topology, options, facts = plan.topology, plan.options, plan.network.facts
    rows, size = most_rows(options.batch_size, options.micro_batches, topology.replicas), options.itemsize
    wide = max(size, 4)  # bytes of a weight that is updated
    rounded = wide != size  # layers compute in copies of the weights
    states = len(make_optimizer(options.optimizer).states)

    short = size == 2 and find_spec("ml_dtypes") is None  # NumPy has no bfloat16: half of what float32 would take

    @cache  # teams of a wide layout are often alike
    def layers(first: int, stop: int, cols: int, here: int) -> Footprint:
        found = footprint_on(
            planned_gpu(options.tf32),
            plan.network.stage(first, stop, cols, 0),
            here,
            "float32" if short else as_dtype(options.dtype),
            cols=cols,
            accumulate=options.micro_batches > 1,
            loss=make_loss(options.loss) if stop == plan.network.weight_layers else None,
            labels=labels,
            split=plan.split,
        )
        return Footprint(found.kept // 2, found.shared) if short else found

    found = []
    for s, stage in enumerate(topology.stages):
        held, here, have = facts[stage.first : stage.stop], -(-rows // stage.rows), StageSchedule(plan, s).buffers
        parameters, sharers = parameters_of(held, stage.cols), sharers_of(topology, stage, plan.exact)
        kinds = versions(len(topology.stages), options.micro_batches, s) if options.pipeline.kind in STREAMS else 1
        # All versions and the gradients; of the sum over those that hold the same, the own part, and of the weights
        # that are updated, where they are of a longer type.
        each = (kinds + 1 + (1 / sharers if sharers > 1 else 0)) * size + (wide / sharers if rounded else 0)
        own, shared = layers(stage.first, stage.stop, stage.cols, here)
        loss = options.loss if s == len(topology.stages) - 1 else None
        weights = wide * plan.network.output_shape[-1] if getattr(loss, "class_weights", None) is not None else 0
        links = _links(plan, s, have) * here * size
        found.append(
            Memory(
                parameters=round(each * parameters),
                optimizer=round(states * parameters / sharers * wide),
                layers=have.slots * own + shared + weights,
                links=round(links),
                exchange=sum(exchange_bytes(plan, round(parameters / stage.rows), states)),
            )
        )
    return found


def reserve(device: Device, plan: Plan, stage: int) -> None:
    """Allocate what an engine needs on the GPU of a rank of this stage in one piece, before it makes any array. Raises
    DeviceMemoryError."""
    cast("StreamDevice", device).reserve(arrays(plan)[stage].total)


def gpu_estimate(setup: Setup, gpu: VisibleGpu) -> list[Memory]:
    """Return the most bytes of its GPU's memory that a rank of each stage will hold."""
    plan, dataset = setup.plan, setup.dataset
    topology, batch = plan.topology, plan.options.batch_size
    rows, last = most_rows(batch, plan.options.micro_batches, topology.replicas), len(topology.stages) - 1
    row = prod(dataset.shape) * dataset.train.dtype.itemsize
    splits = [split.rows for split in (dataset.train, dataset.test) if split is not None]
    result = []
    for s, (stage, part) in enumerate(zip(topology.stages, arrays(plan, dataset.classes is not None), strict=True)):
        held, here = 0, -(-rows // stage.rows)
        if s == 0:
            room = gpu.memory - CONTEXT - part.total
            for count in splits:
                staged = (StageSchedule(plan, 0).ahead + 2) * plan.options.micro_batches * here
                resident = 2 * count * row <= room - held
                held += row * (count if resident else min(staged, count))
        if s in (0, last):  # the order of two epochs, and a mini-batch's numbers
            held += NUMBER * (2 * len(setup.sampler.training_rows) + batch + max(splits))
        if s == last:
            target = NUMBER if dataset.classes is not None else prod(setup.network.output_shape) * plan.options.itemsize
            held += target * (sum(splits) + here)
        libraries = CONTEXT + (NCCL if topology.size > 1 else 0)
        result.append(replace(part, rows=held, libraries=libraries))
    return result


def _links(plan: Plan, s: int, counts: Buffers) -> float:
    """Return the elements of a stage's link buffers for one row; parts that are not contiguous, or that are added up,
    go through staging arrays."""
    topology, facts = plan.topology, plan.network.facts
    stage, last = topology.stages[s], len(topology.stages) - 1
    held = facts[stage.first : stage.stop]
    before = topology.stages[s - 1].cols if s > 0 else 1
    after = topology.stages[s + 1].cols if s < last else 1
    inputs, outputs = held[0].inputs, held[-1].outputs * part_of(held[-1].units, stage.cols)
    elements: float = (counts.inputs + (s == 0)) * inputs * (2 if before > 1 else 1)
    elements += counts.dx * inputs * (2 if before > 1 else 1) * (s > 0)
    return elements + counts.dy * outputs * after * (s < last)
