"""The pipeline: executes a rank's list of actions, one short method per kind of action (design rule 2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from nettorrent_mpi.comm.link import Transfer
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.device import Device
from nettorrent_mpi.engine.batches import Batches
from nettorrent_mpi.engine.state import State
from nettorrent_mpi.engine.tally import Tally
from nettorrent_mpi.engine.trace import Trace
from nettorrent_mpi.engine.update import Update
from nettorrent_mpi.engine.wiring import Wiring
from nettorrent_mpi.nn.layer import Alone, Context, Params
from nettorrent_mpi.nn.layers.sequence import Sequence as Layers
from nettorrent_mpi.nn.losses import Loss
from nettorrent_mpi.plan.actions import Action, Kind
from nettorrent_mpi.plan.errors import NonFiniteError


class Pipeline:
    """Runs forward and backward of this rank's stage for the micro-batches of a mini-batch.

    Micro-batches are numbered from the present mini-batch on: number >= micro_batches is one of a following mini-batch
    (an asynchronous pipeline runs forward ahead). Buffers are rings: the number since the pipeline was last empty
    (`_base` + number) tells the place in them.
    """

    def __init__(
        self,
        wiring: Wiring,
        layers: Layers,
        state: State,
        update: Update,
        loss: Loss,
        tally: Tally,
        *,
        seed: int,
        trace: Trace | None,
        device: Device,
    ):
        self._wiring, self._layers, self._state, self._end, self._loss = wiring, layers, state, update, loss
        self._trace = trace
        self._progress = _all_of(
            *update.progress,
            # A message between hosts goes on its way only when its sender and its receiver look after it.
            wiring.world.progress if len(wiring.topology.stages) > 1 else None,
        )
        self._device, slots = device, wiring.slots
        shared = device.workspace(state.dtype)
        self._workspaces = [device.workspace(state.dtype, shared) for _ in range(slots)]
        self._ctx = Context(device.ops, shared, seed=seed, team=wiring.team, progress=self._progress)
        self._metrics = device.zeros((4,), "float64")  # of one micro-batch
        self._saved: list[Any] = [None] * slots
        self._dy: list[Array | None] = [None] * slots
        self._y: list[Array | None] = [None] * slots
        self._params: list[Params | None] = [None] * slots  # the version that the slot's forward used, until backward
        self._sending_y: list[Transfer | None] = [None] * slots
        self._sending_dx: list[Transfer | None] = [None, None]
        self._base = self._stashed = 0
        self.tally = tally
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

    def run(
        self,
        actions: Sequence[Action],
        batches: Batches,
        *,
        micro_batches: int,
        training: bool,
        step: int = 0,
        rate: float = 0.0,
        first: bool = True,
    ) -> None:
        """Execute the list for the present mini-batch of `batches`, cut into micro-batches. `step` counts from 0.

        `first` says that the pipeline is empty before.
        """
        self._batches, self._rate, self._step, self._micro_batches = batches, rate, step, micro_batches
        self._ctx.training = training
        if first:
            self._base = 0
        trace, methods, progress = self._trace, self._methods, self._progress
        with np.errstate(all="ignore"):  # what is not finite is looked for, and told once
            for action in actions:
                began = trace.now() if trace else 0
                methods[action.kind](action.micro_batch or 0)
                if trace:
                    trace.add(step, action, began)
                if progress:
                    progress()
        self._base += micro_batches

    def drain(self) -> None:
        """Finish every send that is still under way."""
        for transfer in (*self._sending_y, *self._sending_dx):
            _finish(transfer)

    # -- actions, all of micro-batch m ------------------------------------------------------------------------------

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
        wiring, g = self._wiring, self._base + m
        slot, rows = g % wiring.slots, self._batches.rows(m)
        number = m // self._micro_batches
        x = self._batches.inputs(m, g)
        self._ctx.rows, self._ctx.count, self._ctx.step = rows.mine, rows.sharing, self._step + number
        self._ctx.workspace = self._workspaces[slot]
        params = self._state.params
        self._params[slot] = params if self._ctx.training else None
        y, self._saved[slot] = self._layers.forward(params, x, self._ctx)
        self._y[slot] = y
        if wiring.is_last:
            self._score(x, y, m, slot)
        elif not math.isfinite(float(np.add.reduce(y, axis=None))):
            self._diverged(x)

    def _score(self, x: Array, y: Array, m: int, slot: int) -> None:
        """The loss of this micro-batch, and its gradient for the backward to come."""
        training = self._ctx.training
        targets, size = self._batches.targets(m), self._batches.size(m) if training else 1
        self._metrics[...] = 0
        self._dy[slot] = self._loss.forward(y, targets, size, self._ctx, self._metrics, training)
        loss, correct, count, unknown = self._metrics.tolist()
        if self._wiring.place.col == 0:
            self.tally.add(loss, correct, count, unknown)
        if not math.isfinite(loss):
            self._diverged(x)

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
        wiring, g = self._wiring, self._base + m
        slot, rows = g % wiring.slots, self._batches.rows(m)
        self._ctx.rows, self._ctx.count, self._ctx.accumulate = rows.mine, rows.sharing, m > 0
        self._ctx.step = self._step
        dy = self._dy[slot] if wiring.is_last else wiring.dy(g, rows.mine.size)
        params, self._params[slot] = self._params[slot], None
        assert dy is not None
        assert params is not None
        complete = self._end.complete if m == self._micro_batches - 1 else None  # the last one to add gradients
        self._ctx.workspace = self._workspaces[slot]
        dx = self._layers.backward(params, self._state.grads, self._saved[slot], dy, self._ctx, complete)
        if not wiring.is_first:
            assert dx is not None
            np.copyto(wiring.dx(g, rows.mine.size), dx)

    def _await_dx(self, m: int) -> None:
        _finish(self._sending_dx[(self._base + m) % 2])

    def _send_dx(self, m: int) -> None:
        rows, g = self._batches.rows(m), self._base + m
        transfer = self._wiring.send_dx(g, rows.mine.size, rows.whole)
        transfer.start()
        self._sending_dx[g % 2] = transfer

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
        self._keep_version()
        self._end.update(self._rate, self._step + 1)

    def _after_update(self, _: int) -> None:
        self._end.after(self._rate, self._step + 1)

    def _gather(self, _: int) -> None:
        self._end.gather()

    def _keep_version(self) -> None:
        """Where micro-batches are between forward and backward, their version of the weights is kept for them."""
        state = self._state
        under_way = [slot for slot, params in enumerate(self._params) if params is state.params]
        if under_way:
            self._stashed = (self._stashed + 1) % len(state.stashed)
            for segment in state.segments:
                segment.stash(self._stashed)
            for slot in under_way:
                self._params[slot] = state.stashed[self._stashed]

    # -- divergence -------------------------------------------------------------------------------------------------

    def _diverged(self, x: Array) -> None:
        """Raise NonFiniteError, naming the first layer of this stage that gives what is not finite."""
        name = self._layers.layers[-1].name
        quiet = replace(self._ctx, team=Alone())
        workspace = self._device.workspace(self._state.dtype)
        for layer, params in self._layers.with_params(self._state.params):
            if not all(np.isfinite(array).all() for array in params.values()):
                name = layer.name
                break
            if self._wiring.team.cols == 1:
                quiet.workspace = workspace.child(layer.name)
                x, _ = layer.forward(params, x, quiet)
                if not np.isfinite(x).all():
                    name = layer.name
                    break
        raise NonFiniteError(step=self._ctx.step, layer=name, rank=self._wiring.world.rank)


def _finish(transfer: Transfer | None) -> None:
    """Wait for a transfer, if there was one."""
    if transfer is not None:
        transfer.finish()


def _all_of(*calls: Callable[[], None] | None) -> Callable[[], None] | None:
    """What makes all the calls that there are, or None."""
    present = [call for call in calls if call is not None]
    if len(present) < 2:
        return present[0] if present else None

    def make() -> None:
        for call in present:
            call()

    return make
