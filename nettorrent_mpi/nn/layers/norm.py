"""Batch norm and layer norm: PyTorch's formulas, with sums reduced over the ranks that hold the other rows or
features."""

from __future__ import annotations

from math import prod
from typing import Any

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.nn.layer import Context, Grads, Layer, Parameter, Params
from nettorrent_mpi.nn.layers.registry import Site, register_layer
from nettorrent_mpi.plan import specs


class Norm(Layer):
    """The base of both norms: weight_c * (x - mean) / sqrt(variance + eps) + bias_c; weight and bias are divided like
    the features."""

    def __init__(
        self, spec: specs.BatchNorm | specs.LayerNorm, site: Site, statistics: tuple[tuple[str, str], ...] = ()
    ):
        inputs = site.inputs
        axis, part = (None, None) if inputs.is_whole else (0, inputs.part)

        def parameter(name: str, initial: str, trainable: bool) -> Parameter:
            replicated = trainable and inputs.is_whole and site.partial
            return Parameter(name, inputs.shape[-1:], initial, axis, part, trainable, replicated)

        parameters = [parameter("weight", "ones", True), parameter("bias", "zeros", True)]
        parameters += [parameter(name, initial, False) for name, initial in statistics]
        super().__init__(site.name, inputs, inputs, tuple(parameters))
        self.eps = spec.eps

    def store(self, grads: Grads, gradients: Array, ctx: Context) -> None:
        """Write or add the gradients (2, c) of weight and bias."""
        ctx.ops.store(grads["weight"], gradients[0], ctx.accumulate)
        ctx.ops.store(grads["bias"], gradients[1], ctx.accumulate)

    @property
    def operations(self) -> float:
        return 20.0 * prod(self.outputs.shape)


@register_layer(specs.BatchNorm)
class BatchNormLayer(Norm):
    """Batch norm (Ioffe and Szegedy 2015) uses mean and (biased) variance of each channel over the global micro-batch
    and all positions.

    Each rank computes the sum of its rows and the squared deviations from their mean, since the difference of two large
    sums would lose the significant digits, and all get those of all in one message. In training the running statistics
    (in params, not trainable) move by `momentum` towards them, the running variance towards the unbiased one. A rank
    without rows takes part.

    The last mini-batch of an epoch may be smaller than the others. The numbers n of a channel in its micro-batches,
    fewer than the usual N, move the running statistics by `momentum` (n - 1) / (N - 1) alone, as is the weight of a
    variance with n - 1 degrees of freedom: a few odd rows do not undo what all before them told. A single number has no
    variance: it is its own mean, becomes 0, and moves no statistics and no weights below. (Normalized by the running
    statistics, a lone row made a whole step by its own noise: test losses 0.91 in place of 0.71.)
    """

    def __init__(self, spec: specs.BatchNorm, site: Site):
        super().__init__(spec, site, (("running_mean", "zeros"), ("running_var", "ones")))
        self.momentum = spec.momentum
        self._positions = prod(self.inputs.shape[:-1])

    def forward(self, params: Params, x: Array, ctx: Context) -> tuple[Array, Any]:
        ops, workspace = ctx.ops, ctx.workspace
        y = workspace.keep("y", x.shape)
        mean = workspace.keep("mean", x.shape[-1:], "float64")
        scale = workspace.keep("scale", x.shape[-1:], "float64")  # 1 / sqrt(variance + eps)
        count = ctx.count * self._positions if ctx.training else 0
        if count:
            parts = workspace.scratch("moments", (ctx.team.holders, 1 + 2 * x.shape[-1]), "float64")
            ops.moments(x, parts[ctx.team.holder])
            ctx.team.gather_over_rows(parts)
            usual = max(ctx.usual * self._positions, count)
            momentum = self.momentum if count == usual else self.momentum * (count - 1) / (usual - 1)
            running = params["running_mean"], params["running_var"]
            ops.merge_moments(parts, mean, scale, *running, momentum if count > 1 else 0.0, self.eps)
        else:
            ops.copy(mean, params["running_mean"])
            ops.copy(scale, params["running_var"])
            ops.inverse_root(scale, self.eps)
        ops.normalize(x, mean, scale, params["weight"], params["bias"], y)
        return y, (x, mean, scale, count)

    def backward(self, params: Params, grads: Grads, saved: Any, dy: Array, ctx: Context) -> Array | None:
        x, mean, scale, count = saved
        sums = ctx.workspace.scratch("sums", (2, *scale.shape), "float64")
        ctx.ops.norm_sums(x, dy, mean, scale, sums)
        self.store(grads, sums, ctx)
        if not self.needs_dx:
            return None
        if count:
            ctx.team.sum_over_rows(sums)
        ctx.ops.norm_grad(x, dy, mean, scale, params["weight"], sums, count)
        return dy


@register_layer(specs.LayerNorm)
class LayerNormLayer(Norm):
    """Layer norm (Ba, Kiros, Hinton 2016) works on the last axis of each row and position, over all cols where it is
    divided. Statistics are of the arrays' type, but float32 for bfloat16, and gradients are rounded once then."""

    def forward(self, params: Params, x: Array, ctx: Context) -> tuple[Array, Any]:
        ops, rows, features = ctx.ops, (prod(x.shape[:-1]),), self.inputs.shape[-1]
        y = ctx.workspace.keep("y", x.shape)
        kind = "float32" if x.dtype.name == "bfloat16" else None
        mean = ctx.workspace.keep("mean", rows, kind)
        scale = ctx.workspace.keep("scale", rows, kind)  # 1 / sqrt(variance + eps)
        ops.sum_features(x, mean)
        self._over_cols(mean, ctx)
        ops.divide(mean, features)
        ops.center(x, mean, y, scale)
        self._over_cols(scale, ctx)
        ops.divide(scale, features)
        ops.inverse_root(scale, self.eps)
        ops.scale_features(y, scale, params["weight"], params["bias"])
        return y, (x, mean, scale)

    def backward(self, params: Params, grads: Grads, saved: Any, dy: Array, ctx: Context) -> Array | None:
        x, mean, scale = saved
        gradients = ctx.workspace.scratch("sums", (2, x.shape[-1]), "float64" if mean.dtype != x.dtype else None)
        sums = ctx.workspace.scratch("row sums", (2, *mean.shape), mean.dtype)
        ctx.ops.layer_norm_sums(x, dy, mean, scale, params["weight"], gradients, sums)
        self.store(grads, gradients, ctx)
        if not self.needs_dx:
            return None
        # dx = scale * (weight * dy - mean of (weight * dy) - xhat * mean of (weight * dy * xhat))
        self._over_cols(sums, ctx)
        ctx.ops.divide(sums, -self.inputs.shape[-1])
        ctx.ops.layer_norm_grad(x, dy, mean, scale, sums)
        return dy

    def _over_cols(self, sums: Array, ctx: Context) -> None:
        if not self.inputs.is_whole:
            ctx.team.sum_over_cols(sums)
