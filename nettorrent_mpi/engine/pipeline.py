"""The pipeline executes a rank's list of actions, with one short method for each kind of action (design rule 2)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from nettorrent_mpi.comm.activity import NOW
from nettorrent_mpi.comm.link import Transfer
from nettorrent_mpi.device.arrays import Array, quiet
from nettorrent_mpi.device.device import Device
from nettorrent_mpi.engine.divergence import Divergence
from nettorrent_mpi.engine.metrics import LOSS, Metrics
from nettorrent_mpi.engine.rank_seconds import COMPUTING, Spent
from nettorrent_mpi.engine.recorder import Recorder
from nettorrent_mpi.engine.run_plan import Plan
from nettorrent_mpi.engine.state import State
from nettorrent_mpi.engine.trace import Trace
from nettorrent_mpi.engine.update import Update
from nettorrent_mpi.engine.wiring import Wiring
from nettorrent_mpi.engine.work import Work
from nettorrent_mpi.nn.layer import Context, Params
from nettorrent_mpi.nn.layers.sequence import Held
from nettorrent_mpi.nn.layers.sequence import Sequence as Layers
from nettorrent_mpi.nn.losses import make_loss
from nettorrent_mpi.plan.actions import Kind
from nettorrent_mpi.plan.stream import age


class Pipeline:
    """A pipeline runs forward and backward passes of this rank's stage for the micro-batches of a mini-batch, and the
    end of the step.

    Micro-batches are numbered from the present mini-batch on: a number >= micro_batches is one of a following
    mini-batch (an asynchronous pipeline runs forward passes ahead). Buffers form rings, indexed by the number since the
    pipeline was last empty (`_base` + number).
    """

    def __init__(
        self,
        plan: Plan,
        wiring: Wiring,
        device: Device,
        layers: Layers,
        state: State,
        update: Update,
        metrics: Metrics,
        progress: Callable[[], None] | None,
        ahead: int,
    ):
        """`progress` lets messages move; it is called between actions and between layers. Forward passes run up to
        `ahead` mini-batches ahead."""
        self._wiring, self._device, self._layers, self._state = wiring, device, layers, state
        self._end, self.loss, self._metrics = update, make_loss(plan.options.loss), metrics
        self.trace = Trace() if plan.options.trace else None
        self.spent = Spent()
        self._progress = progress
        slots = wiring.slots
        shared = device.workspace(state.dtype)
        shared.keeps_gradients = plan.split
        self._workspaces = [device.workspace(state.dtype, shared) for _ in range(slots)]
        self._ctx = Context(device.ops, shared, seed=plan.options.seed, team=wiring.team)
        self._ctx.usual = plan.statistics_rows
        self._passes = recorder = Recorder(device, self._ctx)
        self._ctx.progress = progress and recorder.noting(progress)
        self._complete = recorder.noting(update.complete)
        # Layers from outside the package may compute with what changes on the host from step to step. Where versions of
        # the weights and buffers take turns, a pass comes again after many steps only.
        self._repeats = device.kind == "cpu" and not layers.foreign and not state.versions
        self._saved: list[Any] = [None] * slots
        self._held: list[Held] = [[] for _ in range(slots)]  # between both halves of a split backward pass
        self._dy: list[Array | None] = [None] * slots
        self._y: list[Array | None] = [None] * slots
        self._params: list[Params | None] = [None] * slots  # the version that the slot's forward used, until backward
        self._sending_y: list[Transfer | None] = [None] * slots
        self._sending_dx: list[Transfer | None] = [None] * wiring.buffers.dx
        # For operations: the numbers of the present step and of those that forward passes run ahead to, and the weight
        # of the rows that the loss of the present mini-batch is averaged over; the last stage is never ahead.
        self._numbers = device.numbers(2 + ahead)
        *self._step_of, self._total = (self._numbers.array[i : i + 1] for i in range(2 + ahead))
        self._exact, self._filled = plan.exact, [0] * slots
        if state.versions:
            stages, micro_batches = len(plan.topology.stages), plan.options.micro_batches
            self._filled = [age(stages, micro_batches, wiring.place.stage, m) for m in range(slots)]
        self._base = 0
        self._outputs: Array | None = None
        self.divergence = Divergence(device, layers, state, metrics, wiring.team.cols)
        self._methods: dict[Kind, Callable[[int], None]] = {
            "L": self._load,
            "PA": self._post_x,
            "RA": self._receive_x,
            "F": self._forward,
            "WA": self._await_y,
            "SA": self._send_y,
            "PG": self._post_dy,
            "RG": self._receive_dy,
            "B": self._backward,
            "I": self._backward_inputs,
            "W": self._backward_weights,
            "WG": self._await_dx,
            "SG": self._send_dx,
            "R": self._reduce,
            "M": self._multiply,
            "N": self._norm,
            "X": self._before_update,
            "U": self._update,
            "Y": self._after_update,
            "G": self._gather,
        }

    def begin(self, work: Work) -> None:
        """Make this the work that actions belong to, and tell the device what is new in it."""
        self._batches, self._micro_batches, self._step, self._rate = work.batches, work.pieces, work.step, work.rate
        self._ctx.training, self._outputs = work.training, work.outputs
        self._passes.on = self._repeats and work.training
        total = work.batches.weight(0) if work.training and self._wiring.is_last else 1
        self._numbers.set([*range(work.step, work.step + len(self._step_of)), total])
        work.batches.prepare(work.actions, self._step_of)
        if work.training:
            self._end.begin(work.rate, work.step + 1)
        if work.first:
            self._base = 0

    def run(self, work: Work) -> None:
        """Execute a list of actions."""
        self.begin(work)
        step = work.step
        trace, methods, progress, now, waiting = self.trace, self._methods, self._progress, NOW, NOW.waiting
        clock, compute = time.perf_counter_ns, 0
        start, waited = clock(), waiting.nanoseconds
        with quiet():  # non-finite values are located once
            for action in work.actions:
                now.action, now.step = action, step + 1
                now.count += 1
                began = trace.now() if trace else 0
                if action.kind in COMPUTING:
                    before, idle = clock(), waiting.nanoseconds
                    methods[action.kind](action.micro_batch or 0)
                    compute += clock() - before - (waiting.nanoseconds - idle)
                else:
                    methods[action.kind](action.micro_batch or 0)
                if trace:
                    trace.add(step, action, began)
                if progress:
                    progress()
        if work.training:
            self.spent.add(clock() - start, compute, waiting.nanoseconds - waited)
        self._base += work.pieces

    def drain(self) -> None:
        """Finish all sends in flight."""
        for transfer in (*self._sending_y, *self._sending_dx):
            _finish(transfer)

    def close(self) -> None:
        """Finish what is in flight, and give up what uses the wiring's channels."""
        self.drain()

    # -- actions of micro-batch m -----------------------------------------------------------------------------------

    def _load(self, m: int) -> None:
        self._batches.load(m)

    def _post_x(self, m: int) -> None:
        self._transfer_x(m).start()

    def _receive_x(self, m: int) -> None:
        self._transfer_x(m).finish()

    def _transfer_x(self, m: int) -> Transfer:
        rows = self._batches.rows(m)
        return self._wiring.receive_x(self._base + m, rows.mine.size, rows.whole)

    def _forward(self, m: int) -> None:
        ctx, g = self._ctx, self._base + m
        slot, rows = g % self._wiring.slots, self._batches.rows(m)
        x = self._batches.inputs(m, g)
        ctx.rows, ctx.count, ctx.step = rows.mine, rows.sharing, self._step_of[m // self._micro_batches]
        ctx.workspace = self._workspaces[slot]
        # What fills a pipeline without flush again would have run earlier if it had not been drained.
        params = self._state.version(self._filled[m] if m < len(self._filled) and ctx.training else 0)
        self._params[slot] = params if ctx.training else None
        passes, values = self._passes, ("forward", m // self._micro_batches, ctx.rows, ctx.count)
        found = passes.repeated(values, params, x, ctx.workspace)
        if found is None:
            with passes:
                found = passes.learned(self._layers.forward(params, x, ctx))
        y, self._saved[slot] = found
        self._y[slot] = y
        if self._outputs is not None:
            if self._wiring.is_last and self._wiring.place.col == 0:
                self._outputs[slice(*rows.mine)] = self._device.on_host(y)
        elif self._wiring.is_last:
            self._score(x, y, m, slot)
        else:
            self.divergence.look(x, y, self._metrics.values, ctx, self._step + m // self._micro_batches)

    def _score(self, x: Array, y: Array, m: int, slot: int) -> None:
        """Add the loss of this micro-batch to the metrics, and keep its gradient for the backward pass."""
        metrics = self._metrics.values if self._wiring.place.col == 0 else self._metrics.ignored
        ctx, loss, passes, targets = self._ctx, self.loss, self._passes, self._batches.targets(m)
        dy = passes.repeated("loss", loss, y, targets, metrics, ctx.workspace)
        if dy is None:
            with passes:
                dy = passes.learned(loss.forward(y, targets, self._total, ctx, metrics, ctx.training))
        self._dy[slot] = dy
        step = self._step + m // self._micro_batches
        self.divergence.look(x, metrics[LOSS : LOSS + 1], metrics, ctx, step)

    def _await_y(self, m: int) -> None:
        _finish(self._sending_y[(self._base + m) % self._wiring.slots])

    def _send_y(self, m: int) -> None:
        slot = (self._base + m) % self._wiring.slots
        y = self._y[slot]
        assert y is not None
        transfer = self._wiring.send_y(y, self._batches.rows(m).whole)
        transfer.start()
        self._sending_y[slot] = transfer

    def _post_dy(self, m: int) -> None:
        self._transfer_dy(m).start()

    def _receive_dy(self, m: int) -> None:
        self._transfer_dy(m).finish()

    def _transfer_dy(self, m: int) -> Transfer:
        rows = self._batches.rows(m)
        return self._wiring.receive_dy(self._base + m, rows.mine.size, rows.whole)

    def _backward(self, m: int) -> None:
        self._differentiate(m, split=False)

    def _backward_inputs(self, m: int) -> None:
        self._differentiate(m, split=True)

    def _backward_weights(self, m: int) -> None:
        slot = self._begin_backward(m)
        complete = self._complete if m == self._micro_batches - 1 else None  # the last one to add gradients
        ctx, passes, saved, held = self._ctx, self._passes, self._saved[slot], self._held[slot]
        values = "weights", ctx.rows, ctx.accumulate, complete is not None
        if passes.repeated(values, saved, held, ctx.workspace) is None:
            with passes:
                self._layers.backward_weights(self._state.grads, saved, held, ctx, complete)
                passes.learned(held)

    def _begin_backward(self, m: int) -> int:
        """Tell the context of a pass backward, and return its slot."""
        ctx, slot, rows = self._ctx, (self._base + m) % self._wiring.slots, self._batches.rows(m)
        ctx.rows, ctx.count, ctx.step, ctx.accumulate = rows.mine, rows.sharing, self._step_of[0], m > 0
        ctx.workspace = self._workspaces[slot]
        return slot

    def _differentiate(self, m: int, *, split: bool) -> None:
        """Run the layers backward; if `split` without the gradients that `_backward_weights` computes."""
        ctx, wiring, g, slot = self._ctx, self._wiring, self._base + m, self._begin_backward(m)
        dy = self._dy[slot] if wiring.is_last else wiring.dy(g, ctx.rows.size)
        params, self._params[slot] = self._params[slot], None
        assert dy is not None
        assert params is not None
        complete = self._complete if not split and m == self._micro_batches - 1 else None
        passes, saved, out = self._passes, self._saved[slot], None if wiring.is_first else wiring.dx(g, ctx.rows.size)
        values = "backward", ctx.rows, ctx.count, ctx.accumulate, complete is not None, split
        held: Held | None = passes.repeated(values, params, saved, dy, out, ctx.workspace)
        if held is None:
            with passes:
                held, grads = [], self._state.grads
                dx = self._layers.backward(params, grads, saved, dy, ctx, complete, held=held if split else None)
                if out is not None:
                    assert dx is not None
                    ctx.ops.copy(out, dx)
                passes.learned(held)
        self._held[slot] = held

    def _await_dx(self, m: int) -> None:
        _finish(self._sending_dx[(self._base + m) % self._wiring.buffers.dx])

    def _send_dx(self, m: int) -> None:
        rows, g = self._batches.rows(m), self._base + m
        transfer = self._wiring.send_dx(g, rows.mine.size, rows.whole)
        transfer.start()
        self._sending_dx[g % self._wiring.buffers.dx] = transfer

    # -- the end of a step ------------------------------------------------------------------------------------------

    def _reduce(self, _: int) -> None:
        self._end.reduce()

    def _multiply(self, _: int) -> None:
        self._end.multiply(self._batches.batch_size(0))

    def _norm(self, _: int) -> None:
        self._end.norm()

    def _before_update(self, _: int) -> None:
        self._keep_version()
        self._end.before(self._step + 1)

    def _update(self, _: int) -> None:
        if self._exact:
            self._keep_version()
        self._end.update()

    def _after_update(self, _: int) -> None:
        self._end.after(self._rate, self._step + 1)

    def _gather(self, _: int) -> None:
        self._end.gather()

    def _keep_version(self) -> None:
        """Copy the weights, before a step changes them, for the micro-batches that are between their forward and
        backward passes, or would be if the pipeline were not being drained."""
        state = self._state
        if state.versions:
            state.keep_version()
            for slot, params in enumerate(self._params):
                if params is state.params:
                    self._params[slot] = state.version(1)


def _finish(transfer: Transfer | None) -> None:
    """Wait for a transfer, if there was one."""
    if transfer is not None:
        transfer.finish()
