"""Residual blocks add the outputs of two branches."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.nn.layer import Context, Features, Grads, Layer, Params
from nettorrent_mpi.nn.layers.registry import Site, register_layer
from nettorrent_mpi.nn.layers.sequence import Held, Sequence, named
from nettorrent_mpi.plan import specs
from nettorrent_mpi.plan.errors import ShapeError


@register_layer(specs.Residual)
class ResidualLayer(Layer):
    """A residual block: y = body(x) + shortcut(x), the shortcut being x itself if it has no layers (He et al.,
    arXiv:1512.03385).

    The input is whole, the output divided over the cols: a branch that ends with whole features contributes this col's
    slice of them, and gets its dy with zeros elsewhere, which is a partial one. So dx is partial, as for any layer with
    weights. Parameters are named "<inner layer>/<name>".
    """

    splits = True

    def __init__(self, spec: specs.Residual, site: Site):
        assert site.inputs.is_whole, f"{site.name} stands on divided features"
        inner = named((*spec.layers, *spec.shortcut), site.name)
        self.body, self.shortcut = (
            Sequence(layers, replace(site, partial=True))
            for layers in (inner[: len(spec.layers)], inner[len(spec.layers) :])
        )
        shape = self.body.outputs.shape
        if shape != self.shortcut.outputs.shape:
            raise ShapeError(
                f"layer {site.name}: its branches cannot be added: {self.body.previous} gives {shape} a row, but the "
                f"shortcut ({self.shortcut.previous}) gives {self.shortcut.outputs.shape}; make `shortcut` give the "
                "same shape, for example by a conv2d with kernel 1 and the same filters and stride"
            )
        parameters = tuple(
            replace(p, name=key, product=False) for key, p in self.body.parameters + self.shortcut.parameters
        )
        super().__init__(site.name, site.inputs, Features.divided(shape, site.cols, site.col), parameters)

    def forward(self, params: Params, x: Array, ctx: Context) -> tuple[Array, Any]:
        y = ctx.workspace.keep("y", (x.shape[0], *self.outputs.local))
        body, body_saved = self.body.forward(params, x, ctx)
        shortcut, shortcut_saved = self.shortcut.forward(params, x, ctx)
        ctx.ops.add(self._own(self.body, body), self._own(self.shortcut, shortcut), y)
        return y, (body_saved, shortcut_saved)

    def backward(self, params: Params, grads: Grads, saved: Any, dy: Array, ctx: Context) -> Array | None:
        return self._backward(params, grads, saved, dy, ctx, None)

    def backward_inputs(
        self, params: Params, grads: Grads, saved: Any, dy: Array, ctx: Context
    ) -> tuple[Array | None, Any]:
        held: tuple[Held, Held] = ([], [])
        return self._backward(params, grads, saved, dy, ctx, held), held

    def backward_weights(self, grads: Grads, saved: Any, held: Any, ctx: Context) -> None:
        self.body.backward_weights(grads, saved[0], held[0], ctx)
        self.shortcut.backward_weights(grads, saved[1], held[1], ctx)

    def _backward(
        self, params: Params, grads: Grads, saved: Any, dy: Array, ctx: Context, held: tuple[Held, Held] | None
    ) -> Array | None:
        """Return dx, like `backward`; like `backward_inputs` where the layers of both branches have something held."""
        in_body, in_shortcut = held or (None, None)
        self.body.needs_dx = self.shortcut.needs_dx = self.needs_dx
        # Memory under this layer's name, which the inner layers do not use.
        dy_shortcut = self._spread(self.shortcut, dy, "shortcut", ctx)
        dy_body = self._spread(self.body, dy, "body", ctx) if self._ends_whole(self.body) else dy
        dx = self.body.backward(params, grads, saved[0], dy_body, ctx, held=in_body)
        if not self.shortcut.layers:
            if dx is not None:
                ctx.ops.add(dx, dy_shortcut, dx)
            return dx
        dx_body = None
        if dx is not None:
            dx_body = ctx.workspace.scratch(f"{self.name} dx", dx.shape)
            ctx.ops.copy(dx_body, dx)
        dx = self.shortcut.backward(params, grads, saved[1], dy_shortcut, ctx, held=in_shortcut)
        if dx is not None and dx_body is not None:
            ctx.ops.add(dx, dx_body, dx)
        return dx

    def _ends_whole(self, branch: Sequence) -> bool:
        return branch.outputs.is_whole and not self.outputs.is_whole

    def _own(self, branch: Sequence, y: Array) -> Array:
        """Return this col's part of a branch's output."""
        return y[..., slice(*self.outputs.part)] if self._ends_whole(branch) else y

    def _spread(self, branch: Sequence, dy: Array, which: str, ctx: Context) -> Array:
        """Return a copy of dy in the shape of the branch's output, with zeros in the other cols' parts."""
        copy = ctx.workspace.passed(f"{self.name} dy of {which}", (dy.shape[0], *branch.outputs.local))
        if self._ends_whole(branch):
            ctx.ops.fill(copy, 0)
        ctx.ops.copy(self._own(branch, copy), dy)
        return copy

    @property
    def foreign(self) -> bool:
        return self.body.foreign or self.shortcut.foreign

    @property
    def operations(self) -> float:
        return self.body.operations + self.shortcut.operations + 2.0 * prod(self.outputs.shape)
