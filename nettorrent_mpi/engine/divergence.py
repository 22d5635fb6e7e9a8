"""A Divergence knows which step and which layer first made a value that is not finite."""

from __future__ import annotations

from dataclasses import replace

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.device import Device
from nettorrent_mpi.engine.metrics import NONFINITE, Metrics
from nettorrent_mpi.engine.state import State
from nettorrent_mpi.nn.layer import Alone, Context
from nettorrent_mpi.nn.layers.sequence import Sequence


class Divergence:
    """A Divergence watches one stage's outputs, or the loss on the last stage, for values that are not finite.

    The device counts them with the metrics. On a CPU the first one is located at once; on a GPU, whose values the host
    does not read in a step, the step is known with the next report, and the layer is the stage's last one.
    """

    def __init__(self, device: Device, layers: Sequence, state: State, metrics: Metrics, cols: int):
        self._device, self._layers, self._state, self._metrics, self._cols = device, layers, state, metrics, cols
        self._at_once = device.kind == "cpu"
        self._found: tuple[int, str] | None = None

    def look(self, x: Array, y: Array, metrics: Array, ctx: Context, step: int) -> None:
        """Count y, which the stage made of the inputs x in this step, if it is not finite."""
        assert ctx.step is not None
        ctx.ops.count_nonfinite(y, metrics[NONFINITE:], ctx.step)
        if self._at_once and self._found is None and metrics[NONFINITE]:
            self._found = step, self._culprit(x, ctx)

    @property
    def known(self) -> bool:
        """Whether this rank knows of a value that was not finite."""
        return self._found is not None or self._metrics.nonfinite is not None

    def found(self) -> tuple[int, str] | None:
        """Return (step, layer) of the first non-finite value that this rank has seen, or None. For use at rest."""
        if self._found is None and not self._at_once:
            self._metrics.look()
            if self._metrics.nonfinite is not None:
                self._found = self._metrics.nonfinite, self._layers.layers[-1].name
        return self._found

    def forget(self) -> None:
        """Forget what was not finite: other parameters are loaded, or the error has been raised."""
        self._found = None
        self._metrics.forget_nonfinite()

    def _culprit(self, x: Array, ctx: Context) -> str:
        """Return the name of the first layer of this stage whose output for these inputs is not finite."""
        workspace, finite = self._device.workspace(self._state.dtype), ctx.ops.all_finite
        ctx = replace(ctx, team=Alone())
        for layer, params in self._layers.with_params(self._state.params):
            if not all(finite(array) for array in params.values()):
                return layer.name
            if self._cols == 1:
                ctx.workspace = workspace.child(layer.name)
                x, _ = layer.forward(params, x, ctx)
                if not finite(x):
                    return layer.name
        return self._layers.layers[-1].name
