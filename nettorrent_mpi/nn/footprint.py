"""The memory that layers need is measured by running them.

Only the layers know it: an activation may write over its input, a convolution works in blocks. So a stage's layers run
forward and backward with a few rows, then with more, and the growth of their workspaces with the rows is observed.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

from nettorrent_mpi.device.arrays import Array, DType, Workspace, as_dtype, quiet, unwritten
from nettorrent_mpi.device.device import StreamDevice, make_device
from nettorrent_mpi.device.ops import Ops
from nettorrent_mpi.nn.layer import Context, Grads, Operands, Parameter, Params
from nettorrent_mpi.nn.layers.sequence import Held, Sequence
from nettorrent_mpi.nn.losses import Loss
from nettorrent_mpi.nn.optimizers import Optimizer
from nettorrent_mpi.plan.blocks import Span

ROWS = 4  # rows of the first trial
LARGE = 64 << 20  # bytes of a weight whose gradient is not computed in a trial: it may not fit the machine that plans
ENOUGH = 8 << 20  # bytes at which a trial is the last one: operations in blocks have filled a block by then


class Footprint(NamedTuple):
    """A footprint counts the bytes that layers take on one rank, without parameters and gradients."""

    kept: int  # for one micro-batch, from its forward to the end of its backward
    shared: int  # shared by all micro-batches: scratch memory of the layer that runs


class _Absent:
    """A team of `cols` whose other members are absent: it allocates what they would make it allocate."""

    holders, holder = 1, 0  # more take a few numbers for each channel

    def __init__(self, ops: Ops, cols: int):
        self._ops, self.cols, self.col = ops, cols, 0

    def sum_over_rows(self, values: Array) -> None:
        pass

    def gather_over_rows(self, parts: Array) -> None:
        pass

    def sum_over_cols(self, values: Array) -> None:
        pass

    def gather_cols(self, part: Array, whole: Array, workspace: Workspace) -> None:
        workspace.scratch("gather", (whole.size,))
        self._ops.fill(whole, 0)

    def scatter_cols(self, partial_whole: Array, part: Array, workspace: Workspace) -> None:
        workspace.scratch("scatter", (partial_whole.size,))
        self._ops.fill(part, 0)


class _Elsewhere(Operands):
    """Operands that other ranks hold, or that a trial leaves out, take no memory here."""

    def put(self, x_bI: Array, dy_bo: Array, ctx: Context) -> None:
        pass


def footprint(
    layers: Sequence,
    rows: int,
    dtype: DType,
    *,
    cols: int = 1,
    accumulate: bool = False,
    loss: Loss | None = None,
    labels: bool = True,
    elsewhere: Collection[str] = (),
    split: bool = False,
) -> Footprint:
    """Measure the memory for micro-batches of `rows` rows in training.

    The layers' neurons are divided over `cols`; `accumulate` says that a mini-batch has several micro-batches, whose
    gradients are added up; the last stage's layers come with the loss, whose targets are `labels` or as many numbers as
    there are outputs. The layers do not compute the gradients of the weights `elsewhere` (see `Operands`). Where
    backward passes are `split`, gradients are kept for their second half.
    """
    short = as_dtype(dtype).name == "bfloat16"
    device, kept_as = make_device("cpu", "numpy", bfloat16=short), "float32" if short else dtype
    params = {key: unwritten(p.local, dtype if p.trainable else kept_as) for key, p in layers.parameters}
    sizes = {key: params[key].nbytes for key, each in layers.parameters if each.product and key not in elsewhere}
    large = {key: size for key, size in sizes.items() if size > LARGE}
    grads = {
        key: _Elsewhere() if key in elsewhere or key in large else device.zeros(parameter.local, kept_as)
        for key, parameter in layers.parameters
        if parameter.trainable
    }

    def trial(count: int) -> Footprint:
        # With NumPy alone: nothing is tuned, and the other libraries need no more (a block of a megabyte or two).
        device = make_device("cpu", "numpy", bfloat16=short)
        shared = device.workspace(dtype)
        shared.keeps_gradients = split
        own = device.workspace(dtype, shared)
        step, total = device.numbers(1).array, device.numbers(1)
        total.set([1])
        ctx = Context(device.ops, own, step=step, rows=Span(0, count), count=count, team=_Absent(device.ops, cols))
        y, saved = layers.forward(params, device.zeros((count, *layers.inputs.local), dtype), ctx)
        if loss is not None:
            targets = device.zeros((count,), "int64") if labels else device.zeros(y.shape, dtype)
            loss.forward(y, targets, total.array, ctx, device.zeros((5,), "float64"))
        for ctx.accumulate in (False, accumulate):  # twice: while scratch grows, no dy overlaps it
            _backward(layers, params, grads, saved, device.zeros(y.shape, dtype), ctx, split=split)
        return Footprint(own.bytes, shared.bytes + device.working_bytes)

    with quiet():
        count = before = min(rows, ROWS)
        few = more = trial(count)
        while count < rows and (count == ROWS or sum(more) < ENOUGH):
            before, few, count = count, more, min(2 * count, rows)
            more = trial(count)
    ahead = (rows - count) / max(count - before, 1)
    kept, scratch = (round(b + max(b - a, 0) * ahead) for a, b in zip(few, more, strict=True))
    # A gradient that is added to others is computed in scratch memory, which the layers share.
    return Footprint(kept, scratch + (max(large.values(), default=0) if accumulate else 0))


def footprint_on(
    device: StreamDevice,
    layers: Sequence,
    rows: int,
    dtype: DType,
    *,
    cols: int = 1,
    accumulate: bool = False,
    loss: Loss | None = None,
    labels: bool = True,
    split: bool = False,
) -> Footprint:
    """Count the memory for micro-batches of `rows` rows in training on a GPU that only counts (`planned_gpu`): by what
    the device has allocated, since it gives nothing back. See `footprint`."""

    def block(parameter: Parameter) -> Array:
        """Return a block; filters lie in memory in the device's order."""
        shape = parameter.local
        axes = device.filter_axes if parameter.filters else tuple(range(len(shape)))
        order = [axes.index(axis) for axis in range(len(axes))]
        return device.empty(tuple(shape[axis] for axis in axes), dtype).transpose(order)

    params = {key: block(parameter) for key, parameter in layers.parameters}
    grads = {key: block(parameter) for key, parameter in layers.parameters if parameter.trainable}
    x, step = device.empty((rows, *layers.inputs.local), dtype), device.numbers(1).array
    targets = device.empty((rows,), "int64") if labels else device.empty((rows, *layers.outputs.shape), dtype)
    metrics, total = device.zeros((5,), "float64"), device.numbers(1).array
    shared = device.workspace(dtype)
    shared.keeps_gradients = split
    before, held, dy = device.held_bytes, [], None
    for _ in range(2):  # slots: what the second one adds is kept for a micro-batch
        ctx = Context(device.ops, device.workspace(dtype, shared), step=step, rows=Span(0, rows), count=rows)
        ctx.team = _Absent(device.ops, cols)
        y, saved = layers.forward(params, x, ctx)
        if loss is not None:
            loss.forward(y, targets, total, ctx, metrics)
        if dy is None:
            unit = device.held_bytes
            dy = device.empty(y.shape, dtype)
            before += device.held_bytes - unit
        for ctx.accumulate in (False, accumulate):
            _backward(layers, params, grads, saved, dy, ctx, split=split)
        held.append(device.held_bytes - before)
    return Footprint(held[1] - held[0], 2 * held[0] - held[1])


def _backward(
    layers: Sequence, params: Params, grads: Grads, saved: list[Any], dy: Array, ctx: Context, *, split: bool
) -> None:
    """Run layers backward, in two halves if `split`."""
    held: Held | None = [] if split else None
    layers.backward(params, grads, saved, dy, ctx, held=held)
    if held is not None:
        layers.backward_weights(grads, saved, held, ctx)


def update_footprint(optimizer: Optimizer, elements: int, dtype: DType) -> int:
    """Measure the scratch memory of an optimizer for `elements` parameters, with a part of them."""
    device, size = make_device("cpu", "numpy"), min(elements, ENOUGH // 64)
    params, grads = device.zeros((size,), dtype), device.zeros((size,), dtype)
    step = optimizer.numbers(0.1, 2)
    numbers, scale = device.numbers(len(step)), device.numbers(1)
    numbers.set(step)
    scale.set([0.5])
    with quiet():  # zeros of float16 are divided by an eps that is 0 there
        optimizer.update(device.ops, params, grads, optimizer.init(device, size, dtype), numbers.array, scale.array)
    return device.working_bytes
