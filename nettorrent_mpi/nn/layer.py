"""The interface of a layer: its features, its parameters, the team that computes it, and the context of each pass.

Shape legend, for all of nn/: capital letter = the whole dimension, small letter = this rank's part. B, b rows of the
(micro-)batch; I, i inputs; O, o outputs (neurons or filters); H, W height and width; C, c channels. `partial_` = a sum
over the cols that is still to be reduced.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any, ClassVar, Protocol

from nettorrent_mpi.device.arrays import Array, Shape, Workspace
from nettorrent_mpi.device.ops import Ops
from nettorrent_mpi.plan.blocks import Span, span
from nettorrent_mpi.plan.moves import Box
from nettorrent_mpi.plan.records import dataclass

NO_ROWS = Span(0, 0)
Params = Mapping[str, Array]  # parameter name -> this rank's block
Grads = Mapping[str, Any]  # parameter name -> array for its gradient, or (`Parameter.product`) `Operands`


@dataclass(frozen=True)
class Features:
    """Features are one row of activations: `shape` is the whole row; this rank holds `part` of its last axis.

    `part` is the whole axis unless an earlier layer divided its neurons or filters over the cols of the team; `parts`
    is their number: with fewer neurons than cols one part can be the whole axis while the others are empty.
    """

    shape: Shape
    part: Span
    parts: int = 1

    @staticmethod
    def whole(shape: Shape) -> Features:
        return Features(shape, Span(0, shape[-1]))

    @staticmethod
    def divided(shape: Shape, cols: int, col: int) -> Features:
        return Features(shape, span(shape[-1], cols, col), cols)

    @property
    def local(self) -> Shape:
        """The shape of one row on this rank."""
        return (*self.shape[:-1], self.part.size)

    @property
    def is_whole(self) -> bool:
        return self.parts == 1 and self.part.size == self.shape[-1]


@dataclass(frozen=True)
class Parameter:
    """A Parameter is one array of a layer, in global coordinates.

    Each rank holds `part` of `axis` (the whole array if axis is None). `trainable` is False for running statistics,
    which no optimizer updates. `replicated_sum` is True where every col holds the whole array but sees only part of its
    gradient (see `Layer`), so that it is reduced over the cols as well.
    """

    name: str
    shape: Shape
    initial: str = "zeros"  # a name known to nn.initial
    axis: int | None = None
    part: Span | None = None
    trainable: bool = True
    replicated_sum: bool = False
    fans: tuple[int, int] = (1, 1)  # (fan in, fan out) for the initial values
    product: bool = False  # whether its gradient is one product x.T @ dy, which may go to `Operands`
    filters: bool = False  # whether it has the filters of a convolution, whose order in memory is the device's own

    @property
    def local(self) -> Shape:
        """The shape of this rank's block."""
        if self.axis is None or self.part is None:
            return self.shape
        return (*self.shape[: self.axis], self.part.size, *self.shape[self.axis + 1 :])

    @property
    def box(self) -> Box:
        """This rank's block as a part of the whole array."""
        return tuple(
            self.part if axis == self.axis and self.part is not None else Span(0, length)
            for axis, length in enumerate(self.shape)
        )

    @property
    def index(self) -> tuple[slice, ...]:
        """The slices of this rank's block in the whole array."""
        if self.axis is None or self.part is None:
            return (slice(None),) * len(self.shape)
        return (slice(None),) * self.axis + (slice(*self.part),)


class Team(Protocol):
    """A layer's view of the ranks of its stage, with collective operations: all of them make the same calls."""

    cols: int
    col: int
    holders: int  # ranks that hold rows of the same global micro-batch
    holder: int

    def sum_over_rows(self, values: Array) -> None:
        """All-reduce `values` in place over all ranks that hold other rows of the same global micro-batch."""

    def gather_over_rows(self, parts: Array) -> None:
        """All-gather over the same ranks: parts (holders, n), in which parts[holder] is this rank's."""

    def sum_over_cols(self, values: Array) -> None:
        """All-reduce `values` in place over the cols of the team (the same rows, other neurons)."""

    def gather_cols(self, part: Array, whole: Array, workspace: Workspace) -> None:
        """All-gather: whole_b..C <- the parts part_b..c of all cols side by side on the last axis."""

    def scatter_cols(self, partial_whole: Array, part: Array, workspace: Workspace) -> None:
        """Reduce-scatter: part_b..c <- this col's slice of the sum over the cols of partial_whole_b..C (gather_cols'
        adjoint)."""


class Alone:
    """A team of one rank, whose operations do nothing."""

    cols = 1
    col = 0
    holders = 1
    holder = 0

    def sum_over_rows(self, values: Array) -> None:
        pass

    def gather_over_rows(self, parts: Array) -> None:
        pass

    def sum_over_cols(self, values: Array) -> None:
        pass

    def gather_cols(self, part: Array, whole: Array, workspace: Workspace) -> None:
        whole[...] = part

    def scatter_cols(self, partial_whole: Array, part: Array, workspace: Workspace) -> None:
        part[...] = partial_whole


class Operands(ABC):
    """Operands receive the two matrices whose product is a weight gradient, in place of the product."""

    @abstractmethod
    def put(self, x_bI: Array, dy_bo: Array, ctx: Context) -> None:
        """Take x_bI and dy_bo of the mini-batch's rows `ctx.rows`: x_bI.T @ dy_bo is their part of the weight
        gradient."""


@dataclass(slots=True)
class Context:
    """The context of a pass: what the forward or backward of one micro-batch needs besides its arrays."""

    ops: Ops
    workspace: Workspace  # memory of this micro-batch's slot; for a layer, its own part of it
    training: bool = True
    accumulate: bool = False  # whether this micro-batch's gradients are added, or overwrite
    seed: int = 0
    step: Array | None = None  # the number of the step, from 0, as a float64 on the device (for dropout)
    rows: Span = NO_ROWS  # numbers of these rows in the whole mini-batch (for dropout)
    count: int = 0  # rows of the whole micro-batch, over all ranks that share batch statistics
    usual: int = 0  # `count` is at least this, unless the mini-batch is smaller than usual: the last one of an epoch
    team: Team = field(default_factory=Alone)
    progress: Callable[[], None] | None = (
        None  # called between layers, so that messages progress while this rank computes
    )
    relu: bool = False  # whether this layer computes the ReLU beside it, too (`Layer.takes_relu`, `takes_relu_before`)


class Layer(ABC):
    """A Layer is stateless and belongs to one rank: its shapes are fixed at construction, arrays are passed in.

    The input of a layer with weights is always whole (all features of this rank's rows); its neurons or filters, and so
    its output, may be divided over the cols of the team. Other layers work on whatever part they get. Because backward
    is linear in dy, a layer with whole features before divided weights receives, on each col, only a partial dy, and
    returns a partial dx; its parameters' gradients are partial too (`Parameter.replicated_sum`).

    `backward` may overwrite dy, and returns memory that is valid until another layer runs. Neither direction allocates
    after the first step. Layers of the package compute by ctx.ops and ctx.team alone, from what lies in arrays: a pass
    that comes again is repeated by these calls (engine/recorder.py), or by a GPU's graph.
    """

    # Whether `forward` may write its output over its input (elementwise layers); the caller decides with `in_place`.
    elementwise: ClassVar[bool] = False
    # Whether `backward` reads the layer's own output, so that no other layer may overwrite it.
    reads_output: ClassVar[bool] = False
    # Whether `forward` may return the memory of its input as its output (flatten; dropout in evaluation).
    passes_on: ClassVar[bool] = False
    # Whether `forward` computes max(., 0) of its output where `ctx.relu` says so, and `backward` its derivative, which
    # saves a GPU passes. It holds for the class that says so, not for those derived from it.
    takes_relu: ClassVar[bool] = False
    # The same for the ReLU before it, whose input it gets then.
    takes_relu_before: ClassVar[bool] = False
    # Whether backward can be done in two halves: `backward_inputs`, then `backward_weights`. Other layers do all in the
    # first. It holds for the class that says so, not for those derived from it.
    splits: ClassVar[bool] = False

    def __init__(self, name: str, inputs: Features, outputs: Features, parameters: tuple[Parameter, ...] = ()):
        self.name = name
        self.inputs = inputs
        self.outputs = outputs
        self.parameters = parameters
        self.in_place = False
        self.needs_dx = True  # False for the first layer of the network, whose input needs no gradient

    @abstractmethod
    def forward(self, params: Params, x: Array, ctx: Context) -> tuple[Array, Any]:
        """Return (y, saved): x has shape (b, *inputs.local), y (b, *outputs.local). Zero rows are allowed.

        `saved` holds what backward needs: arrays of ctx.workspace.keep, or x itself, which stays unchanged until then.
        """

    @abstractmethod
    def backward(self, params: Params, grads: Grads, saved: Any, dy: Array, ctx: Context) -> Array | None:
        """Return dx, or None if needs_dx is False (a layer without parameters is not called then), and write the
        parameters' gradients (or add them if ctx.accumulate)."""

    def backward_inputs(
        self, params: Params, grads: Grads, saved: Any, dy: Array, ctx: Context
    ) -> tuple[Array | None, Any]:
        """Return (dx, held), like `backward` without the gradients that `backward_weights` writes later; until then dy
        and what is `held` stay as they are. For layers that split."""
        raise NotImplementedError

    def backward_weights(self, grads: Grads, saved: Any, held: Any, ctx: Context) -> None:
        """Write the gradients (or add them if ctx.accumulate) that `backward_inputs` has left out."""
        raise NotImplementedError

    @property
    def foreign(self) -> bool:
        """Whether it is, or contains, a layer from outside the package, which may compute with what changes on the host
        from step to step: a GPU executes it anew each time."""
        return not type(self).__module__.startswith("nettorrent_mpi.")

    @property
    def operations(self) -> float:
        """Return the floating-point operations of forward and backward for one row of the whole layer."""
        return 0.0
