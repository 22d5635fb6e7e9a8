"""The pipeline: executes a rank's list of actions, one short method per kind of action (design rule 2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from nettorrent_mpi.comm.transfers import Transfer
from nettorrent_mpi.engine.exchange import ExactExchange
from nettorrent_mpi.engine.feed import Feed
from nettorrent_mpi.engine.state import State
from nettorrent_mpi.engine.trace import Trace
from nettorrent_mpi.engine.wiring import Wiring
from nettorrent_mpi.nn.backend import Array, Workspace
from nettorrent_mpi.nn.layer import Alone, Pass
from nettorrent_mpi.nn.layers.sequence import Sequence as Layers
from nettorrent_mpi.nn.losses import Loss
from nettorrent_mpi.plan.actions import Action, Kind
from nettorrent_mpi.plan.blocks import Span, span
from nettorrent_mpi.plan.errors import NonFiniteError


class Tally:
    """Sums over the rows that this rank saw: of the loss, of right answers, of rows; and whether right is not defined.

    Only ranks of the last stage count, and of a team's cols only the first, so that sums over all ranks are right.
    """

    def __init__(self) -> None:
        self._numbers = (0.0, 0.0, 0.0, 0.0)

    def add(self, loss: float, correct: float, rows: float, unknown: float = 0.0) -> None:
        a, b, c, d = self._numbers
        self._numbers = (a + loss, b + max(correct, 0), c + rows, d + unknown + (correct < 0))

    def numbers(self) -> tuple[float, float, float, float]:
        """(loss, right answers, rows, times that right was not defined)."""
        return self._numbers

    def take(self) -> tuple[float, float, float, float]:
        """The numbers, which begin anew."""
        taken, self._numbers = self._numbers, (0.0, 0.0, 0.0, 0.0)
        return taken


class Pipeline:
    """Runs forward and backward of this rank's stage for the micro-batches of a mini-batch."""

    def __init__(
        self,
        wiring: Wiring,
        layers: Layers,
        state: State,
        exchange: ExactExchange,
        loss: Loss,
        *,
        seed: int,
        trace: Trace | None,
    ):
        self._wiring, self._layers, self._state, self._exchange, self._loss = wiring, layers, state, exchange, loss
        self._trace = trace
        self._pass = Pass(seed=seed, team=wiring.team)
        shared = Workspace(state.dtype)
        self._workspaces = [Workspace(state.dtype, shared) for _ in range(wiring.slots)]
        self._loss_workspaces = [Workspace(state.dtype, shared) for _ in range(wiring.slots)]
        self._saved: list[Any] = [None] * wiring.slots
        self._dy: list[Array | None] = [None] * wiring.slots
        self._y: list[Array | None] = [None] * wiring.slots
        self._sending_y: list[Transfer | None] = [None] * wiring.slots
        self._sending_dx: list[Transfer | None] = [None, None]
        self.tally = Tally()
        self._methods: dict[Kind, Callable[[int], None]] = {
            "RA": self._receive_x,
            "F": self._forward,
            "SA": self._send_y,
            "RG": self._receive_dy,
            "B": self._backward,
            "SG": self._send_dx,
            "R": self._reduce,
            "N": self._norm,
            "U": self._update,
        }

    def run(
        self,
        actions: Sequence[Action],
        feed: Feed,
        *,
        micro_batches: int,
        training: bool,
        step: int = 0,
        rate: float = 0.0,
    ) -> None:
        """Execute the list for the rows that `feed` holds, cut into micro-batches. `step` counts from 0."""
        self._feed, self._size, self._rate = feed, feed.size, rate
        self._micro_batches = micro_batches
        self._pass.training, self._pass.step = training, step
        self._posted_x = self._posted_dy = 0
        self._post_x(self._wiring.ring)
        if training:
            self._post_dy(2)
        trace, methods = self._trace, self._methods
        with np.errstate(all="ignore"):  # what is not finite is looked for, and told once
            if trace is None:
                for action in actions:
                    methods[action.kind](action.micro_batch or 0)
            else:
                for action in actions:
                    began = trace.now()
                    methods[action.kind](action.micro_batch or 0)
                    trace.add(step, action, began)

    def drain(self) -> None:
        """Finish every send that is still under way."""
        for transfer in (*self._sending_y, *self._sending_dx):
            if transfer is not None:
                transfer.finish()

    # -- which rows -------------------------------------------------------------------------------------------------

    def _rows(self, micro_batch: int) -> tuple[Span, int, int]:
        """(this rank's rows of the mini-batch, rows of the micro-batch in this replica, and over all replicas)."""
        place, topology = self._wiring.place, self._wiring.topology
        whole = span(self._size, self._micro_batches, micro_batch)
        replica = span(whole.size, topology.replicas, place.replica)
        return topology.batch_rows(place, self._size, self._micro_batches, micro_batch), replica.size, whole.size

    # -- receives are posted before they are needed -----------------------------------------------------------------

    def _post_x(self, until: int) -> None:
        if self._wiring.is_first:
            return
        for m in range(self._posted_x, min(until, self._micro_batches)):
            rows, of, _ = self._rows(m)
            self._wiring.receive_x(m, rows.size, of).start()
        self._posted_x = max(self._posted_x, min(until, self._micro_batches))

    def _post_dy(self, until: int) -> None:
        if self._wiring.is_last:
            return
        for m in range(self._posted_dy, min(until, self._micro_batches)):
            rows, of, _ = self._rows(m)
            self._wiring.receive_dy(m, rows.size, of).start()
        self._posted_dy = max(self._posted_dy, min(until, self._micro_batches))

    # -- actions ----------------------------------------------------------------------------------------------------

    def _receive_x(self, m: int) -> None:
        rows, of, _ = self._rows(m)
        self._wiring.receive_x(m, rows.size, of).finish()

    def _forward(self, m: int) -> None:
        wiring, slot = self._wiring, m % self._wiring.slots
        rows, _, count = self._rows(m)
        x = wiring.x(m, rows.size)
        if wiring.is_first:
            self._feed.inputs(rows, x)
        sending = self._sending_y[slot]
        if sending is not None:  # the slot's last output may still be on its way
            sending.finish()
        self._pass.rows, self._pass.count = rows, count
        y, self._saved[slot] = self._layers.forward(self._state.params, x, self._workspaces[slot], self._pass)
        self._y[slot] = y
        if wiring.is_last:
            self._score(x, y, rows, slot)
        elif not math.isfinite(float(np.add.reduce(y, axis=None))):
            self._diverged(x)
        if not self._pass.training:
            self._post_x(m + 1 + wiring.ring)

    def _score(self, x: Array, y: Array, rows: Span, slot: int) -> None:
        """The loss of this micro-batch, and its gradient for the backward to come."""
        result = self._loss.forward(
            y, self._feed.targets(rows), self._size, self._loss_workspaces[slot], gradient=self._pass.training
        )
        self._dy[slot] = result.dy
        if self._wiring.place.col == 0:
            self.tally.add(result.loss_sum, result.correct, rows.size)
        if not math.isfinite(result.loss_sum):
            self._diverged(x)

    def _send_y(self, m: int) -> None:
        slot = m % self._wiring.slots
        y = self._y[slot]
        assert y is not None
        transfer = self._wiring.send_y(y, self._rows(m)[1])
        transfer.start()
        self._sending_y[slot] = transfer

    def _receive_dy(self, m: int) -> None:
        rows, of, _ = self._rows(m)
        self._wiring.receive_dy(m, rows.size, of).finish()

    def _backward(self, m: int) -> None:
        wiring, slot = self._wiring, m % self._wiring.slots
        rows, _, count = self._rows(m)
        self._pass.rows, self._pass.count, self._pass.accumulate = rows, count, m > 0
        dy = self._dy[slot] if wiring.is_last else wiring.dy(m, rows.size)
        assert dy is not None
        dx = self._layers.backward(
            self._state.params, self._state.grads, self._saved[slot], dy, self._workspaces[slot], self._pass
        )
        if not wiring.is_first:
            assert dx is not None
            sending = self._sending_dx[m % 2]
            if sending is not None:
                sending.finish()
            np.copyto(wiring.dx(m, rows.size), dx)
        self._post_x(m + 1 + wiring.ring)
        self._post_dy(m + 1 + 2)

    def _send_dx(self, m: int) -> None:
        rows, of, _ = self._rows(m)
        transfer = self._wiring.send_dx(m, rows.size, of)
        transfer.start()
        self._sending_dx[m % 2] = transfer

    def _reduce(self, _: int) -> None:
        self._exchange.reduce()

    def _norm(self, _: int) -> None:
        self._exchange.norm()

    def _update(self, _: int) -> None:
        self._exchange.update(self._rate, self._pass.step + 1)

    # -- divergence -------------------------------------------------------------------------------------------------

    def _diverged(self, x: Array) -> None:
        """Raise NonFiniteError, naming the first layer of this stage that gives what is not finite."""
        name = self._layers.layers[-1].name
        quiet = replace(self._pass, team=Alone())
        workspace = Workspace(self._state.dtype)
        for layer, params in self._layers.with_params(self._state.params):
            if not all(np.isfinite(array).all() for array in params.values()):
                name = layer.name
                break
            if self._wiring.team.cols == 1:
                x, _ = layer.forward(params, x, workspace.child(layer.name), quiet)
                if not np.isfinite(x).all():
                    name = layer.name
                    break
        raise NonFiniteError(step=self._pass.step, layer=name, rank=self._wiring.world.rank)
