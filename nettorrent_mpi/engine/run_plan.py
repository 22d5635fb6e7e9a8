"""A run's plan consists of the network, the position of every rank, and the training options. It is pure and frozen and
knows no communicator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np

from nettorrent_mpi.device.arrays import DType, as_dtype
from nettorrent_mpi.nn.model import Network
from nettorrent_mpi.plan import exchange_specs as choices
from nettorrent_mpi.plan.cost import paces
from nettorrent_mpi.plan.exchange_specs import ZeroBubble
from nettorrent_mpi.plan.performance import Machine
from nettorrent_mpi.plan.records import dataclass
from nettorrent_mpi.plan.schedule import PACED
from nettorrent_mpi.plan.specs import Spec
from nettorrent_mpi.plan.topology import Topology
from nettorrent_mpi.plan.zero_bubble import Pace

DeviceKind: TypeAlias = Literal["cpu", "gpu"]


@dataclass(frozen=True)
class Options:
    """Options are the training options that the engine needs."""

    loss: Spec
    optimizer: Spec
    batch_size: int = 128
    report_every: int = 50  # steps
    micro_batches: int = 4
    pipeline: Spec = field(default_factory=choices.OneFOneB)
    exchange: Spec = field(default_factory=choices.Allreduce)
    clip_norm: float | None = None
    dtype: Any = "float32"  # of the arrays
    tf32: bool = False  # whether products of float32 may be rounded to TF32
    device: DeviceKind = "cpu"
    seed: int = 1
    augment: Sequence[str] = ()
    trace: bool = False
    kernels: Literal["fastest", "numpy"] = "fastest"

    @property
    def bfloat16(self) -> bool:
        """Whether the arrays are bfloat16."""
        return str(self.dtype) == "bfloat16"

    @property
    def itemsize(self) -> int:
        """Return the bytes of an element of the arrays. NumPy knows bfloat16 only where ml_dtypes is loaded."""
        return 2 if self.bfloat16 else int(np.dtype(self.dtype).itemsize)

    @property
    def wide(self) -> int:
        """Return the bytes of an element of the weights that are updated."""
        return max(self.itemsize, 4)


@dataclass(frozen=True)
class Plan:
    """A Plan is what all ranks of a run agree on before any of them communicates."""

    network: Network
    topology: Topology
    options: Options
    machine: Machine = field(default_factory=Machine)  # by whose predicted times some schedules are written

    @property
    def split(self) -> bool:
        """Whether backward passes are split."""
        return self.options.pipeline.kind in PACED and len(self.topology.stages) > 1

    @cached_property
    def paces(self) -> tuple[Pace, ...]:
        """The stages' paces, where the schedule follows from them. On GPUs they are those of equal stages: the order of
        NCCL's launches is proved for their lists."""
        options, pipeline = self.options, self.options.pipeline
        if not isinstance(pipeline, ZeroBubble):
            return ()
        if options.device == "gpu":
            stages = len(self.topology.stages)
            return (Pace(stored=min(pipeline.stored or stages, stages)),) * stages
        pieces, facts = options.micro_batches, self.network.facts
        return paces(
            self.topology, facts, options.batch_size, pieces, self.machine, exact=self.exact, stored=pipeline.stored
        )

    @property
    def exact(self) -> bool:
        """Whether all replicas hold the same weights."""
        return isinstance(self.options.exchange, choices.Allreduce) or self.topology.replicas == 1

    @property
    def weights_dtype(self) -> DType:
        """Return the type of the weights that are updated, evaluated alike and written to files. Layers compute in
        `options.dtype`: with bfloat16, in copies of float32 weights that are rounded once per step."""
        dtype = as_dtype(self.options.dtype)
        return as_dtype("float32") if dtype.name == "bfloat16" else dtype

    @property
    def gradients_dtype(self) -> DType:
        """Return the type of the weights' gradients. On CPU cores it is that of the weights: MPI adds up no bfloat16,
        and products are added to float32 as fast."""
        return as_dtype(self.options.dtype) if self.options.device == "gpu" else self.weights_dtype

    @property
    def statistics_rows(self) -> int:
        """Return the rows over which batch statistics are taken, at least, in mini-batches of the usual size."""
        return self.options.batch_size // self.options.micro_batches // (1 if self.exact else self.topology.replicas)
