"""The seconds that a rank's layers take forward and backward are measured by running them, and described by a few
numbers for each weight layer (plan/performance.py), which predict other sizes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import combinations
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.device.arrays import Array, DType, as_dtype, quiet
from nettorrent_mpi.device.device import make_device
from nettorrent_mpi.engine.metrics import SUMS
from nettorrent_mpi.engine.run_plan import Options
from nettorrent_mpi.nn.layer import Alone, Context
from nettorrent_mpi.nn.layers.sequence import Held
from nettorrent_mpi.nn.losses import make_loss
from nettorrent_mpi.nn.model import Network
from nettorrent_mpi.nn.optimizers import make_optimizer
from nettorrent_mpi.plan.blocks import Span
from nettorrent_mpi.plan.performance import LayerCost, LayerTimes
from nettorrent_mpi.plan.sizes import part_of

LEAST, MOST = 5, 100  # passes that are timed of one size
PARTS = (1, 2, 4)  # cols that are measured
SIZES = 4  # numbers of rows: the mini-batch, and its halves


class Company:
    """A Company is what a rank measures in: none, unless a group is given, whose members do the same at the same
    time."""

    def __init__(self, group: Group | None = None):
        self._group = group

    def meet(self) -> None:
        """Wait for the others."""
        if self._group is not None:
            self._group.barrier()

    def agree(self, count: int) -> int:
        """Return the largest of everyone's numbers."""
        most = np.array([count])
        if self._group is not None:
            self._group.maximum(most)
        return int(most[0])


class Sample(NamedTuple):
    """A sample gives the seconds of each weight layer for `rows` rows and one of `cols` cols, in one direction, and of
    the loss; `weights` are those of the second half of a split pass backward."""

    rows: int
    cols: int
    forward: list[float]
    backward: list[float]
    accumulated: list[float]  # backward, where gradients are added to others
    weights: list[float]
    loss: float


class _NoTeam(Alone):
    """A _NoTeam is a team whose other cols are absent: what they would send is not waited for."""

    def __init__(self, cols: int):
        self.cols = cols

    def gather_cols(self, part: Array, whole: Array, workspace: Any) -> None:
        pass

    def scatter_cols(self, partial_whole: Array, part: Array, workspace: Any) -> None:
        pass


class LayerTrial:
    """A LayerTrial runs the layers of a network, one stage for each weight layer, with `rows` rows on one of `cols`
    cols, as a rank with the whole network would: what one layer leaves in the caches is what the next one finds."""

    def __init__(self, network: Network, options: Options, rows: int, cols: int):
        self.rows, self.cols = rows, cols
        device = make_device("cpu", options.kernels, bfloat16=options.bfloat16)
        dtype, draw = as_dtype(options.dtype), np.random.default_rng(0)

        def some(shape: Sequence[int], dtype: DType = dtype) -> Array:
            return (0.1 * draw.standard_normal(shape)).astype(dtype)

        kept_as = "float32" if options.bfloat16 else dtype  # of the gradients of weights

        self._stages = [network.stage(i, i + 1, cols, 0) for i in range(network.weight_layers)]
        self._loss = make_loss(options.loss)
        self._params = [
            {key: some(p.local, dtype if p.trainable else kept_as) for key, p in stage.parameters}
            for stage in self._stages
        ]
        self._grads = [
            {key: some(p.local, kept_as) for key, p in stage.parameters if p.trainable} for stage in self._stages
        ]
        self._x = [some((rows, *stage.inputs.local)) for stage in self._stages]
        self._y = some((rows, *network.output_shape))
        targets = np.zeros((rows,), np.int64)
        # Numbers suit every loss but cross entropy, whose targets are labels.
        self._targets = targets if options.loss.kind == "cross_entropy" else np.zeros_like(self._y)
        self._metrics, self._total = np.zeros(SUMS), np.array([float(rows)])
        self._shared = shared = device.workspace(dtype)
        self._contexts = [
            Context(
                device.ops,
                device.workspace(dtype, shared),
                step=device.numbers(1).array,
                rows=Span(0, rows),
                count=rows,
                team=_NoTeam(cols),
            )
            for _ in self._stages
        ]

    def run(self, *, accumulate: bool) -> tuple[list[float], list[float], float]:
        """Run all layers forward and backward; return their seconds in each direction, and the loss's."""
        clock, saved, forward, backward = time.perf_counter, [], [], []
        for stage, params, x, ctx in zip(self._stages, self._params, self._x, self._contexts, strict=True):
            began = clock()
            y, kept = stage.forward(params, x, ctx)
            forward.append(clock() - began)
            saved.append((y, kept))
        began = clock()
        self._loss.forward(self._y, self._targets, self._total, self._contexts[-1], self._metrics)
        loss = clock() - began
        for i in reversed(range(len(self._stages))):
            ctx, (y, kept) = self._contexts[i], saved[i]
            ctx.accumulate = accumulate
            dy = np.full(y.shape, 1e-3, y.dtype)
            began = clock()
            self._stages[i].backward(self._params[i], self._grads[i], kept, dy, ctx)
            backward.append(clock() - began)
        return forward, backward[::-1], loss

    def split(self) -> list[float]:
        """Run all layers forward and, in two halves, backward; return the seconds of each layer's second half. Stages
        do their halves in turns, as in a pipeline: what a second half needs has left the caches since the first."""
        clock, found, left = time.perf_counter, [], []
        self._shared.keeps_gradients = True
        for i, (stage, params, x, ctx) in enumerate(
            zip(self._stages, self._params, self._x, self._contexts, strict=True)
        ):
            y, kept = stage.forward(params, x, ctx)
            held: Held = []
            ctx.accumulate = False
            stage.backward(params, self._grads[i], kept, np.full(y.shape, 1e-3, y.dtype), ctx, held=held)
            left.append((kept, held))
        for stage, grads, (kept, held), ctx in zip(self._stages, self._grads, left, self._contexts, strict=True):
            began = clock()
            stage.backward_weights(grads, kept, held, ctx)
            found.append(clock() - began)
        self._shared.keeps_gradients = False
        return found


def measure_layers(
    network: Network, options: Options, company: Company, seconds: float, *, cols: int = 1, rows: int = 1
) -> Sample:
    """Time the layers with so many rows on one of `cols` cols, in about `seconds` seconds. All of the `company`
    call."""
    trial = LayerTrial(network, options, rows, cols)
    with quiet():
        for accumulate in (False, True):
            trial.run(accumulate=accumulate)
        began = time.perf_counter()
        trial.run(accumulate=False)
        count = company.agree(min(max(LEAST, int(seconds / 2 / (time.perf_counter() - began))), MOST))
        found: list[list[tuple[list[float], list[float], float]]] = [[], []]
        for accumulate in (False, True):
            for _ in range(count):
                company.meet()
                found[accumulate].append(trial.run(accumulate=accumulate))
        halves = []
        for _ in range(1 + max(count // 2, LEAST)):
            company.meet()
            halves.append(trial.split())
    forward, backward = _medians([each[0] for each in found[0]]), _medians([each[1] for each in found[0]])
    added = _medians([each[1] for each in found[1]])
    return Sample(rows, cols, forward, backward, added, _medians(halves[1:]), median(each[2] for each in found[0]))


def measure_update(network: Network, options: Options, company: Company) -> tuple[float, float]:
    """Return the seconds in which the optimizer updates a parameter of this network, and the bytes per second at which
    two ranks of a node add up their gradients, each a half (the `reduction` of the cost model)."""
    device = make_device("cpu", options.kernels, bfloat16=options.bfloat16)
    optimizer, dtype = make_optimizer(options.optimizer), as_dtype("float32" if options.bfloat16 else options.dtype)
    size = max(sum(facts.parameters for facts in network.facts), 1)
    draw = np.random.default_rng(0)
    params, grads = ((0.1 * draw.standard_normal(size)).astype(dtype) for _ in range(2))
    states, step = optimizer.init(device, size, params.dtype), optimizer.numbers(1e-4, 2)
    numbers, half = device.numbers(len(step)), slice(size // 2 or 1)
    numbers.set(step)
    scale, copy = None, params.astype(as_dtype(options.dtype)) if options.bfloat16 else None

    def update() -> None:
        optimizer.update(device.ops, params, grads, states, numbers.array, scale)
        if copy is not None:
            device.ops.copy(copy, params)

    def add() -> None:
        device.ops.add(params[half], grads[half], sums)

    sums = np.empty_like(params[half])
    updated, added = (_time(call, company) for call in (update, add))
    return updated / size, size * params.itemsize / max(added, 1e-9)


def _time(call: Callable[[], None], company: Company) -> float:
    took = []
    for _ in range(2 * LEAST):
        company.meet()
        began = time.perf_counter()
        call()
        took.append(time.perf_counter() - began)
    return median(took[LEAST // 2 :])


def _medians(runs: Sequence[Sequence[float]]) -> list[float]:
    return [median(times) for times in zip(*runs, strict=True)]


def fitted(network: Network, samples: Sequence[Sample]) -> dict[str, LayerTimes]:
    """Fit each weight layer's costs to the samples, so that the relative errors are least. No cost is negative."""
    found = {}
    for i, facts in enumerate(network.facts):
        parts = [part_of(facts.units, each.cols) for each in samples]
        rows = np.array([[1.0, each.rows, each.rows * part, part] for each, part in zip(samples, parts, strict=True)])
        forward = least_errors(rows, [each.forward[i] for each in samples])
        backward = least_errors(rows, [each.backward[i] for each in samples])
        more = [(each.accumulated[i] - each.backward[i]) / part for each, part in zip(samples, parts, strict=True)]
        weights = LayerCost(*least_errors(rows, [each.weights[i] for each in samples]))
        found[facts.name] = LayerTimes(LayerCost(*forward), LayerCost(*backward), max(median(more), 0.0), weights)
    return found


def least_errors(matrix: np.ndarray, seconds: Sequence[float], of: Sequence[float] | None = None) -> list[float]:
    """Return the numbers x >= 0 with the least errors of matrix @ x relative to `of` (None: to the seconds): of all
    choices of those above 0 the best, as there are few."""
    weights = 1 / np.maximum(np.array(seconds if of is None else of), 1e-9)
    scaled, wanted = matrix * weights[:, None], np.array(seconds) * weights
    best, columns = (float((wanted**2).sum()), np.zeros(matrix.shape[1])), range(matrix.shape[1])
    for count in range(1, len(columns) + 1):
        for chosen in combinations(columns, count):
            x = np.zeros(len(columns))
            x[list(chosen)] = np.linalg.lstsq(scaled[:, chosen], wanted, rcond=None)[0]
            error = float(((scaled @ x - wanted) ** 2).sum())
            if (x >= 0).all() and error < best[0] - 1e-12:
                best = (error, x)
    return [float(each) for each in best[1]]
