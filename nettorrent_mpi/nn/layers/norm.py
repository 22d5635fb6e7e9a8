"""Batch norm and layer norm: PyTorch's formulas, with sums over whoever holds the other rows or features."""

from __future__ import annotations

from typing import Any

import numpy as np

from nettorrent_mpi.device.arrays import Array, Workspace
from nettorrent_mpi.device.cpu import passes
from nettorrent_mpi.device.cpu.blocking import RowSum, blocks, repeated, row_block, row_repeats, sum_rows, wide_rows
from nettorrent_mpi.device.cpu.loop import compiled
from nettorrent_mpi.nn.layer import Layer, Parameter, Params, Pass
from nettorrent_mpi.nn.layers.registry import Site, makes
from nettorrent_mpi.plan import specs
from nettorrent_mpi.plan.errors import ConfigError


class Norm(Layer):
    """weight_c * (x - mean) / sqrt(variance + eps) + bias_c; weight and bias are divided as the features are."""

    def __init__(
        self, spec: specs.BatchNorm | specs.LayerNorm, site: Site, statistics: tuple[tuple[str, str], ...] = ()
    ):
        if not spec.eps > 0:
            raise ConfigError(f"layer {site.name}: eps is {spec.eps}, but has to be greater than 0")
        inputs = site.inputs
        axis, part = (None, None) if inputs.is_whole else (0, inputs.part)

        def parameter(name: str, initial: str, trainable: bool) -> Parameter:
            replicated = trainable and inputs.is_whole and site.partial
            return Parameter(name, inputs.shape[-1:], initial, axis, part, trainable, replicated)

        parameters = [parameter("weight", "ones", True), parameter("bias", "zeros", True)]
        parameters += [parameter(name, initial, False) for name, initial in statistics]
        super().__init__(site.name, inputs, inputs, tuple(parameters))
        self.eps = spec.eps

    def store(self, grads: Params, dweight: Array, dbias: Array, accumulate: bool) -> None:
        """Write or add the gradients of weight and bias."""
        for name, value in (("weight", dweight), ("bias", dbias)):
            if accumulate:
                np.add(grads[name], value, out=grads[name])
            else:
                np.copyto(grads[name], value)

    @property
    def operations(self) -> float:
        return 20.0 * float(np.prod(self.outputs.shape))


@makes(specs.BatchNorm)
class BatchNorm(Norm):
    """Ioffe and Szegedy 2015. Mean and (biased) variance of each channel over the global micro-batch and all positions.

    The sums go over `step.team.sum_over_rows` in float64: first the mean, then the squares of what is left, since the
    difference of two large sums would lose the digits that matter. In training the running statistics (in params, not
    trainable) move by `momentum` towards them, the running variance towards the unbiased one. A rank without rows
    takes part in the sums.
    """

    def __init__(self, spec: specs.BatchNorm, site: Site):
        super().__init__(spec, site, (("running_mean", "zeros"), ("running_var", "ones")))
        self.momentum = spec.momentum
        self._repeats = row_repeats(self.inputs.local)
        self._positions = int(np.prod(self.inputs.shape[:-1]))

    def forward(self, params: Params, x: Array, workspace: Workspace, step: Pass) -> tuple[Array, Any]:
        y = workspace.keep("y", x.shape)
        channels = x.shape[-1:]
        mean = workspace.keep("mean", channels, np.float64)
        scale = workspace.keep("scale", channels, np.float64)  # 1 / sqrt(variance + eps)
        count = 0
        if step.training:
            count = max(step.count * self._positions, 1)
            sum_rows(x, mean, workspace)
            step.team.sum_over_rows(mean)
            mean /= count
            self._sum_squares(x, mean, scale, workspace)
            step.team.sum_over_rows(scale)
            scale /= count
            if step.count:
                self._follow(params, mean, scale, count, workspace)
        else:
            mean[...] = params["running_mean"]
            scale[...] = params["running_var"]
        scale += self.eps
        np.sqrt(scale, out=scale)
        np.reciprocal(scale, out=scale)
        self._normalize(x, mean, self._factor(params, scale, workspace), params["bias"], y, workspace)
        return y, (x, mean, scale, count)

    def _sum_squares(self, x: Array, mean: Array, total: Array, workspace: Workspace) -> None:
        """total <- the sum of (x - mean)^2 of each channel here."""
        if compiled():
            passes.sum_squares(_rows(x), _single("mean", mean, workspace), total)
            return
        x_nw = wide_rows(x, self._repeats)
        mean_w = repeated(mean, self._repeats, "mean", workspace)
        squares = RowSum("of squares", self._repeats, total, workspace)
        for block in blocks(x_nw.shape[0], row_block(x_nw.shape[1])):
            square = workspace.scratch("squares", x_nw[block].shape)
            np.subtract(x_nw[block], mean_w, out=square)
            np.multiply(square, square, out=square)
            squares.add(square)
        squares.finish()

    def _normalize(self, x: Array, mean: Array, factor: Array, bias: Array, y: Array, workspace: Workspace) -> None:
        """y <- (x - mean) * factor + bias."""
        if compiled():
            mean_c, factor_c = _single("mean", mean, workspace), _single("factor", factor, workspace)
            passes.normalize(_rows(x), mean_c, factor_c, bias, _rows(y))
            return
        x_nw, y_nw = wide_rows(x, self._repeats), wide_rows(y, self._repeats)
        mean_w = repeated(mean, self._repeats, "mean", workspace)
        factor_w = repeated(factor, self._repeats, "factor", workspace)
        bias_w = repeated(bias, self._repeats, "bias", workspace)
        for block in blocks(x_nw.shape[0], row_block(x_nw.shape[1])):
            np.subtract(x_nw[block], mean_w, out=y_nw[block])
            np.multiply(y_nw[block], factor_w, out=y_nw[block])
            np.add(y_nw[block], bias_w, out=y_nw[block])

    def _follow(self, params: Params, mean: Array, variance: Array, count: int, workspace: Workspace) -> None:
        """running += momentum * (statistic - running); one number alone has no unbiased variance: the biased one, 0."""
        unbiased = count / max(count - 1, 1)
        move = workspace.scratch("move", mean.shape, np.float64)
        for name, value, factor in (("running_mean", mean, 1.0), ("running_var", variance, unbiased)):
            running = params[name]
            np.multiply(value, factor, out=move)
            np.subtract(move, running, out=move)
            move *= self.momentum
            np.add(running, move, out=running, casting="same_kind")

    def _factor(self, params: Params, scale: Array, workspace: Workspace) -> Array:
        """weight / sqrt(variance + eps)."""
        factor = workspace.scratch("factor", scale.shape, np.float64)
        np.multiply(params["weight"], scale, out=factor)
        return factor

    def backward(
        self, params: Params, grads: Params, saved: Any, dy: Array, workspace: Workspace, step: Pass
    ) -> Array | None:
        x, mean, scale, count = saved
        sums = workspace.scratch("sums", (2, *scale.shape), np.float64)
        self._sum_gradients(x, dy, mean, sums, workspace)
        sums[0] *= scale
        self.store(grads, sums[0], sums[1], step.accumulate)
        if not self.needs_dx:
            return None
        # dx = weight * scale * (dy - mean of dy - xhat * mean of (dy * xhat)), xhat = (x - mean) * scale
        if count:
            step.team.sum_over_rows(sums)
            sums *= -1 / count
            sums[0] *= scale
        else:  # the statistics were constants
            sums[...] = 0
        self._move_gradients(x, dy, mean, sums, self._factor(params, scale, workspace), workspace)
        return dy

    def _sum_gradients(self, x: Array, dy: Array, mean: Array, sums: Array, workspace: Workspace) -> None:
        """sums <- for each channel here the sums of (x - mean) * dy and of dy."""
        if compiled():
            passes.norm_sums(_rows(x), _rows(dy), _single("mean", mean, workspace), sums[0], sums[1])
            return
        x_nw, dy_nw = wide_rows(x, self._repeats), wide_rows(dy, self._repeats)
        mean_w = repeated(mean, self._repeats, "mean", workspace)
        weight_sum = RowSum("of dy times x", self._repeats, sums[0], workspace)
        bias_sum = RowSum("of dy", self._repeats, sums[1], workspace)
        for block in blocks(x_nw.shape[0], row_block(x_nw.shape[1])):
            work = workspace.scratch("centred", x_nw[block].shape)
            np.subtract(x_nw[block], mean_w, out=work)
            np.multiply(work, dy_nw[block], out=work)
            weight_sum.add(work)
            bias_sum.add(dy_nw[block])
        weight_sum.finish()
        bias_sum.finish()

    def _move_gradients(
        self, x: Array, dy: Array, mean: Array, sums: Array, factor: Array, workspace: Workspace
    ) -> None:
        """dy <- (dy + (x - mean) * sums[0] + sums[1]) * factor."""
        if compiled():
            singles = (("mean", mean), ("slope", sums[0]), ("shift", sums[1]), ("factor", factor))
            passes.norm_back(_rows(x), _rows(dy), *(_single(name, values, workspace) for name, values in singles))
            return
        x_nw, dy_nw = wide_rows(x, self._repeats), wide_rows(dy, self._repeats)
        mean_w = repeated(mean, self._repeats, "mean", workspace)
        slope_w = repeated(sums[0], self._repeats, "slope", workspace)
        shift_w = repeated(sums[1], self._repeats, "shift", workspace)
        factor_w = repeated(factor, self._repeats, "factor", workspace)
        for block in blocks(x_nw.shape[0], row_block(x_nw.shape[1])):
            work = workspace.scratch("centred", x_nw[block].shape)
            np.subtract(x_nw[block], mean_w, out=work)
            np.multiply(work, slope_w, out=work)
            np.add(work, shift_w, out=work)
            np.add(dy_nw[block], work, out=dy_nw[block])
            np.multiply(dy_nw[block], factor_w, out=dy_nw[block])


def _rows(x: Array) -> Array:
    """x (b, ..., c) as (rows * positions, c), also where c is 0."""
    return x.reshape(int(np.prod(x.shape[:-1])), x.shape[-1])


def _single(name: str, values: Array, workspace: Workspace) -> Array:
    """values (channels,) in the workspace's type."""
    return repeated(values, 1, name, workspace)


@makes(specs.LayerNorm)
class LayerNorm(Norm):
    """Ba, Kiros, Hinton 2016: over the last axis of each row and position; over all cols where it is divided."""

    def forward(self, params: Params, x: Array, workspace: Workspace, step: Pass) -> tuple[Array, Any]:
        y = workspace.keep("y", x.shape)
        x_nc, y_nc = _rows(x), _rows(y)
        mean = workspace.keep("mean", (x_nc.shape[0],))
        scale = workspace.keep("scale", (x_nc.shape[0],))  # 1 / sqrt(variance + eps)
        features, height = self.inputs.shape[-1], row_block(x_nc.shape[1])
        np.add.reduce(x_nc, axis=1, out=mean)
        self._over_cols(mean, step)
        mean /= features
        for block in blocks(x_nc.shape[0], height):
            np.subtract(x_nc[block], mean[block, None], out=y_nc[block])
            square = workspace.scratch("squares", y_nc[block].shape)
            np.multiply(y_nc[block], y_nc[block], out=square)
            np.add.reduce(square, axis=1, out=scale[block])
        self._over_cols(scale, step)
        scale /= features
        scale += self.eps
        np.sqrt(scale, out=scale)
        np.reciprocal(scale, out=scale)
        for block in blocks(x_nc.shape[0], height):
            np.multiply(y_nc[block], scale[block, None], out=y_nc[block])
            np.multiply(y_nc[block], params["weight"], out=y_nc[block])
            np.add(y_nc[block], params["bias"], out=y_nc[block])
        return y, (x, mean, scale)

    def backward(
        self, params: Params, grads: Params, saved: Any, dy: Array, workspace: Workspace, step: Pass
    ) -> Array | None:
        x, mean, scale = saved
        x_nc, dy_nc = _rows(x), _rows(dy)
        height = row_block(x_nc.shape[1])
        gradients = workspace.scratch("sums", (2, x_nc.shape[1]))
        weight_sum = RowSum("of dy times x", 1, gradients[0], workspace)
        bias_sum = RowSum("of dy", 1, gradients[1], workspace)
        # Of each row: the sums of weight * dy * xhat and of weight * dy, xhat = (x - mean) * scale.
        sums = workspace.scratch("row sums", (2, x_nc.shape[0]))
        for block in blocks(x_nc.shape[0], height):
            hat = self._hat(x_nc[block], mean[block], scale[block], workspace)
            product = workspace.scratch("product", hat.shape)
            np.multiply(dy_nc[block], hat, out=product)
            weight_sum.add(product)
            bias_sum.add(dy_nc[block])
            np.multiply(product, params["weight"], out=product)
            np.add.reduce(product, axis=1, out=sums[0, block])
            np.multiply(dy_nc[block], params["weight"], out=dy_nc[block])
            np.add.reduce(dy_nc[block], axis=1, out=sums[1, block])
        weight_sum.finish()
        bias_sum.finish()
        self.store(grads, gradients[0], gradients[1], step.accumulate)
        if not self.needs_dx:
            return None
        # dx = scale * (weight * dy - mean of (weight * dy) - xhat * mean of (weight * dy * xhat))
        self._over_cols(sums, step)
        sums /= -self.inputs.shape[-1]
        for block in blocks(x_nc.shape[0], height):
            hat = self._hat(x_nc[block], mean[block], scale[block], workspace)
            np.multiply(hat, sums[0, block, None], out=hat)
            np.add(hat, sums[1, block, None], out=hat)
            np.add(dy_nc[block], hat, out=dy_nc[block])
            np.multiply(dy_nc[block], scale[block, None], out=dy_nc[block])
        return dy

    def _hat(self, x_nc: Array, mean: Array, scale: Array, workspace: Workspace) -> Array:
        hat = workspace.scratch("centred", x_nc.shape)
        np.subtract(x_nc, mean[:, None], out=hat)
        np.multiply(hat, scale[:, None], out=hat)
        return hat

    def _over_cols(self, sums: Array, step: Pass) -> None:
        if not self.inputs.is_whole:
            step.team.sum_over_cols(sums)
