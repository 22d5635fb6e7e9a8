"""Tensors that all ranks of a group hold alike, or of which each rank holds a part: how one becomes the other, forward
and backward.

The span of a dimension that a rank holds is `plan.blocks.span`. There are two pairs of conjugate functions (Shoeybi et
al., Megatron-LM, arXiv 1909.08053, section 3); each one's backward is the other's forward, so that gradients can be
differentiated again:

    copied     whole -> whole, used for a part of the work on each rank   <->   reduced    partial sums -> their sum
    scattered  whole -> this rank's span of a dimension                   <->   gathered   spans -> whole
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.comm.world import World
from nettorrent_mpi.plan import blocks
from nettorrent_mpi.plan.errors import LaunchError, UserError

SAMPLES = 31  # elements of a tensor that all ranks should hold alike which are compared
TOLERANCE = 1e-3  # of the largest one: ranks on different processors round differently
NOT_FINITE = 1e300  # stands for it where numbers are compared
GOLDEN = 0.6180339887498949  # its multiples modulo 1 lie evenly, and never all in the same column of a batch
HALF = (torch.float16, torch.bfloat16)


class SplitRanks:
    """The ranks over which layers are divided. It owns their communicator, a duplicate, until `close`.

    `check`: whether ranks compare what they do, and with which values, before each pass through a layer.
    """

    def __init__(self, comm: Any = None):
        """Begin on all ranks of the program (None), or on those of a Group or a communicator of mpi4py. They all
        call."""
        self.world = World(comm.comm if isinstance(comm, Group) else comm)
        self.size, self.index = self.world.size, self.world.index
        self.check = True
        self.closed = False
        # MPI is no part of a graph that torch.compile makes.
        plain: Callable[[Any], Any] = (lambda function: function) if self.size == 1 else torch.compiler.disable
        self.copied, self.reduced = plain(self._copied), plain(self._reduced)
        self.scattered, self.gathered = plain(self._scattered), plain(self._gathered)

    def close(self) -> None:
        """Free the communicator; layers that are divided over it cannot be used any more. All ranks call."""
        if not self.closed:
            self.closed = True
            self.world.free()

    def __deepcopy__(self, memo: object) -> SplitRanks:
        return self

    def __reduce__(self) -> Any:
        raise TypeError("a model with layers that are divided over ranks cannot be pickled: save its state_dict()")

    def span(self, total: int) -> blocks.Span:
        """Return this rank's span of a dimension."""
        return blocks.span(total, self.size, self.index)

    # -- agreement ----------------------------------------------------------------------------------------------------

    def meet(self, what: str, values: Tensor | None = None) -> None:
        """Raise the same LaunchError on all ranks unless all do the same now, with (about) the same values.

        One all-reduce of 2 x 33 numbers. Ranks that pass other shapes, run another layer, or do not run the model at
        all would otherwise wait for each other for ever, or compute nonsense.
        """
        if self.closed:
            raise UserError(f"the communicator of split layers was freed by close: {what}")
        if self.size == 1:
            return
        mine = np.zeros(SAMPLES + 2)
        mine[0] = zlib.crc32(what.encode())
        if values is not None and values.numel():
            values = values.detach()
            sampled = torch.cat([values[_positions(tuple(values.shape))], values.mean()[None]]).to("cpu", torch.float64)
            mine[1:] = torch.nan_to_num(sampled, NOT_FINITE, NOT_FINITE, -NOT_FINITE).numpy()
        extremes = np.concatenate([mine, -mine])
        self.world.maximum(extremes)
        highest, lowest = extremes[: mine.size], -extremes[mine.size :]
        if highest[0] != lowest[0]:
            self._tell_apart(what)
        largest = np.maximum(np.abs(highest[1:]), np.abs(lowest[1:])).max()
        if (highest[1:] - lowest[1:] > TOLERANCE * largest).any():
            everyone = np.array(self.world.gather_objects(mine[1:]))
            rank = int(np.abs(everyone - everyone[0]).max(axis=1).argmax())
            at = int(np.abs(everyone[rank] - everyone[0]).argmax())
            error = LaunchError(
                f"{what}: rank {rank} has other values than rank 0 ({everyone[rank, at]:.6g}, not "
                f"{everyone[0, at]:.6g}); all ranks have to give a model with split layers the same inputs, to compute "
                "the same loss, to draw the same random numbers (the same torch.manual_seed), and to clip gradients by "
                "nettorrent_mpi.torch.clip_grad_norm_"
            )
            self.raise_on_all(error)

    def raise_on_all(self, error: Exception) -> None:
        """Raise an error that all ranks have found alike."""
        with self.world.agreement():
            raise error

    def _tell_apart(self, what: str) -> None:
        doing = self.world.gather_objects(what)
        other = next(rank for rank, each in enumerate(doing) if each != doing[0])
        error = LaunchError(
            f"the ranks do not do the same with a model whose layers are split over them: rank 0 is at the {doing[0]}; "
            f"rank {other} is at the {doing[other]}. All ranks have to call the model, backward and state_dict alike, "
            "with inputs of the same shape"
        )
        self.raise_on_all(error)

    # -- moves --------------------------------------------------------------------------------------------------------

    def broadcast(self, tensor: Tensor) -> None:
        """Give a tensor rank 0's values, in place."""
        if self.size > 1 and tensor.numel():
            values = tensor.detach().contiguous()
            self.world.broadcast(array_of(values), 0)
            tensor.detach().copy_(values)

    def part(self, whole: Tensor, dim: int) -> Tensor:
        """Return this rank's span of a dimension, a view."""
        mine = self.span(whole.shape[dim])
        return whole.narrow(dim, mine.start, mine.size)

    def whole(self, part: Tensor, dim: int, total: int) -> Tensor:
        """All-gather: return the whole of which each rank holds a span of dimension `dim`."""
        if self.size == 1:
            return part.detach().clone()
        dim %= part.dim()
        before, after = part.shape[:dim], part.shape[dim + 1 :]
        shapes = [(*before, blocks.span(total, self.size, rank).size, *after) for rank in range(self.size)]
        counts = [int(np.prod(shape)) for shape in shapes]
        flat = part.new_empty(sum(counts))
        self.world.all_gather(array_of(part.detach().contiguous()), array_of(flat), counts)
        return torch.cat([piece.view(shape) for piece, shape in zip(flat.split(counts), shapes, strict=True)], dim)

    def sum(self, partial: Tensor) -> Tensor:
        """All-reduce: return the sum over all ranks, bitwise the same on all; half precision is added in float32."""
        kind = torch.float32 if partial.dtype in HALF else partial.dtype
        total = partial.detach().to(kind, copy=True, memory_format=torch.contiguous_format)
        self.world.all_reduce(array_of(total))
        return total.to(partial.dtype)

    # -- differentiable -----------------------------------------------------------------------------------------------

    def _copied(self, x: Tensor, layer: str, trained: bool = True) -> Tensor:
        """Return x, of which every rank needs all: partial gradients are all-reduced backward."""
        made: Tensor = _Copied.apply(x, self, layer, _forward(x, trained))
        return made

    def _reduced(self, partial: Tensor, layer: str) -> Tensor:
        """Return the sum of all ranks' partial sums."""
        made: Tensor = _Reduced.apply(partial, self, layer)
        return made

    def _scattered(self, x: Tensor, dim: int, total: int, layer: str, trained: bool = True) -> Tensor:
        """Return this rank's span of x, whose dimension `dim` has to have the size `total`: gradients are all-gathered
        backward."""
        made: Tensor = _Scattered.apply(x, self, dim, total, layer, _forward(x, trained))
        return made

    def _gathered(self, part: Tensor, dim: int, total: int, layer: str) -> Tensor:
        """Return the whole from all ranks' spans."""
        made: Tensor = _Gathered.apply(part, self, dim, total, layer)
        return made

    def enter(self, x: Tensor, way: str, layer: str) -> None:
        """Compare what comes to all ranks alike: the input of a forward pass, or the gradient of a backward pass."""
        if self.check:
            self.meet(f"{way} of {layer} with {x.dtype} {list(x.shape)} on {x.device.type}", x)
        if x.device.type != "cpu":
            raise UserError(f"{layer} got a tensor on {x.device}: split layers compute on the CPU only")


def _forward(x: Tensor, trained: bool) -> str:
    """Name a forward pass, and what its backward pass will compute: ranks that differ in that would wait for ever."""
    asked = [name for name, asks in (("input", x.requires_grad), ("parameters", trained)) if asks]
    return f"forward pass (for gradients of {' and '.join(asked) if torch.is_grad_enabled() and asked else 'nothing'})"


class Division(NamedTuple):
    """A Division divides a parameter: this rank holds the span `part` of `total` in dimension `dim`."""

    ranks: SplitRanks
    dim: int
    total: int

    def shape(self, part: Tensor) -> torch.Size:
        """Return the whole's shape."""
        return torch.Size([self.total if dim == self.dim else size for dim, size in enumerate(part.shape)])

    def whole(self, part: Tensor) -> Tensor:
        """All-gather a tensor that is divided like the parameter. All ranks call."""
        return self.ranks.whole(part, self.dim, self.total)

    def part(self, whole: Tensor) -> Tensor:
        """Return this rank's part of a whole tensor, a copy."""
        return self.ranks.part(whole, self.dim).clone()


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: SplitRanks, layer: str, way: str) -> Tensor:
        ctx.arguments = ranks, layer
        ranks.enter(x, way, layer)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _Reduced.apply(grad, *ctx.arguments), None, None, None


class _Reduced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, ranks: SplitRanks, layer: str) -> Tensor:
        ctx.arguments = ranks, layer
        return ranks.sum(partial)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _Copied.apply(grad, *ctx.arguments, "backward pass"), None, None


class _Scattered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: SplitRanks, dim: int, total: int, layer: str, way: str) -> Tensor:
        ctx.arguments = ranks, dim, total, layer
        ranks.enter(x, way, layer)
        if x.dim() < -dim or x.shape[dim] != total:  # on all ranks alike
            raise ValueError(f"{layer} has {total} inputs, and got a tensor of shape {list(x.shape)}")
        return ranks.part(x, dim).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _Gathered.apply(grad, *ctx.arguments), None, None, None, None, None


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, ranks: SplitRanks, dim: int, total: int, layer: str) -> Tensor:
        ctx.arguments = ranks, dim, total, layer
        return ranks.whole(part, dim, total)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _Scattered.apply(grad, *ctx.arguments, "backward pass"), None, None, None, None


def array_of(tensor: Tensor) -> npt.NDArray[Any]:
    """Return a contiguous tensor's memory as a flat array; NumPy has no bfloat16, whose bits are all that is moved."""
    flat = tensor.detach().reshape(-1)
    array: npt.NDArray[Any] = (flat.view(torch.int16) if flat.dtype == torch.bfloat16 else flat).numpy()
    return array


@lru_cache(maxsize=256)
def _positions(shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Return where the samples of a tensor of this shape lie."""
    size = int(np.prod(shape))
    flat = (np.arange(1, SAMPLES + 1) * GOLDEN % 1 * size).astype(np.int64)
    return tuple(torch.from_numpy(index) for index in np.unravel_index(flat, shape))
