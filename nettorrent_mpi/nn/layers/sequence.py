"""A sequence runs layers one after another: a stage, or a branch of a residual block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Any

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.nn.layer import Context, Grads, Layer, Parameter, Params
from nettorrent_mpi.nn.layers.activations import ReluLayer
from nettorrent_mpi.nn.layers.form import Gather
from nettorrent_mpi.nn.layers.registry import Site, make
from nettorrent_mpi.plan import specs
from nettorrent_mpi.plan.errors import ConfigError, ShapeError

Held = list[Any]  # what each layer of a sequence has left for its `backward_weights`; None: nothing


class Sequence:
    """A Sequence holds the layers that `layers` describe, at a site of the network; each spec carries its name.

    `activation:` of a layer becomes a layer of its own, "<layer>.<activation>", in `specs`, too. Where features are
    divided and a layer needs whole ones, a `Gather` is inserted. A layer writes over its input where that is no longer
    needed. A layer with weights computes the ReLU that follows it directly (`Layer.takes_relu`), or max pooling the one
    before it, which is then passed over. `parameters` are pairs ("<layer>/<name>", parameter); the mappings given to
    forward and backward have these keys. Of the site, `inputs` are whole; `name` (of a residual block, otherwise empty)
    goes before the layers' names, not before the keys. `partial` says that, where the last layer's features are whole,
    each col gets only a part of dy (see `Layer`); `follows` is the kind of the activation after the last layer,
    `previous` describes what comes before the first.
    """

    def __init__(self, layers: Seq[specs.LayerSpec], site: Site):
        self.inputs = self.outputs = site.inputs
        self.layers: list[Layer] = []
        self.takes_relu: list[bool] = []  # whether each layer computes the ReLU beside it, too
        self.passed_over: list[bool] = []  # whether each layer is a ReLU that the one before or after computes
        self._splits: list[bool] = []  # whether each layer's backward pass has two halves
        self.parameters: tuple[tuple[str, Parameter], ...] = ()
        self.previous = site.previous  # after the last layer: what produced the outputs
        self._keys: list[str] = []
        self._firsts: list[int] = []  # start of each layer's parameters in `parameters`
        self._free = False  # whether the next layer may write over its input
        self._of: list[tuple[Params, list[Params]]] = []  # mappings seen so far, and each layer's part of them
        self._needs_dx = True
        self.specs = expanded(layers)
        weights = [i for i, spec in enumerate(self.specs) if spec.weighted]
        last = weights[-1] if weights else -1
        for i, spec in enumerate(self.specs):
            assert spec.name is not None
            name = f"{site.name}/{spec.name}" if site.name else spec.name
            if (spec.weighted or spec.reads_whole) and not self.outputs.is_whole:
                self.append(Gather(f"{name}.gather", self.outputs, site.partial or i <= last))
            follows = _activation_after(self.specs, i, site.follows)
            partial = site.cols > 1 and (site.partial or i < last)
            try:
                layer = make(spec, Site(name, self.outputs, site.cols, site.col, follows, self.previous, partial))
            except ShapeError as error:
                error.layer = spec.name.partition(".")[0]  # of a block that this sequence is in, after that
                raise
            self.append(layer, spec.name)
            self.previous = f"layer {layer.name}"

    def append(self, layer: Layer, key: str | None = None) -> None:
        """Append a layer; `key` (default: its name) goes before the names of its parameters."""
        key = layer.name if key is None else key
        layer.in_place = layer.elementwise and self._free
        same_memory = layer.in_place or layer.passes_on
        self._free = not layer.reads_output and (self._free or not same_memory)
        says = vars(type(layer)).get
        before = bool(says("takes_relu_before")) and bool(self.layers) and type(self.layers[-1]) is ReluLayer
        after = type(layer) is ReluLayer and layer.in_place and bool(vars(type(self.layers[-1])).get("takes_relu"))
        if before:
            if self.passed_over[-1]:
                self.takes_relu[-2] = False
            self.passed_over[-1] = True
        if after:
            self.takes_relu[-1] = True
        self.takes_relu.append(before)
        self.passed_over.append(after)
        self._splits.append(says("splits", False))
        self.layers.append(layer)
        self._keys.append(key)
        self._firsts.append(len(self.parameters))
        self.parameters += tuple((f"{key}/{parameter.name}", parameter) for parameter in layer.parameters)
        self.outputs = layer.outputs

    @property
    def needs_dx(self) -> bool:
        """Whether the gradient of the inputs is needed."""
        return self._needs_dx

    @needs_dx.setter
    def needs_dx(self, needed: bool) -> None:
        self._needs_dx = needed
        for layer in self.layers:  # no gradient is needed before the first parameters
            layer.needs_dx = needed
            if layer.parameters:
                break

    @property
    def most_cols(self) -> int:
        """Return the largest number of cols that gives every layer with weights at least one neuron or filter on
        each."""
        return min((width for spec in self.specs for width in spec.widths()), default=1)

    @property
    def foreign(self) -> bool:
        """Whether a layer is from outside the package."""
        return any(layer.foreign for layer in self.layers)

    @property
    def operations(self) -> float:
        """Return the floating-point operations of forward and backward for one row of the whole layers."""
        return sum(layer.operations for layer in self.layers)

    def with_params(self, params: Params) -> Iterator[tuple[Layer, Params]]:
        """Yield each layer with its own parameters."""
        return zip(self.layers, self._shares(params), strict=True)

    def _shares(self, arrays: Params) -> list[Params]:
        """Return the arrays of each layer under its own names for them: cached for a mapping, whose arrays stay the
        same."""
        for seen, shares in self._of:
            if seen is arrays:
                return shares
        shares = [
            {p.name: arrays[f"{key}/{p.name}"] for p in layer.parameters if f"{key}/{p.name}" in arrays}
            for layer, key in zip(self.layers, self._keys, strict=True)
        ]
        self._of.append((arrays, shares))
        return shares

    def forward(self, params: Params, x: Array, ctx: Context) -> tuple[Array, list[Any]]:
        """Return (y, saved) like `Layer.forward`; each layer has its own part of ctx.workspace."""
        saved: list[Any] = []
        workspace = ctx.workspace
        shares = self._shares(params)
        for i, layer in enumerate(self.layers):
            if self.passed_over[i]:
                saved.append(None)
                continue
            ctx.workspace, ctx.relu = workspace.child(self._keys[i]), self.takes_relu[i]
            x, kept = layer.forward(shares[i], x, ctx)
            saved.append(kept)
            if ctx.progress is not None:
                ctx.progress()
        ctx.workspace, ctx.relu = workspace, False
        return x, saved

    def backward(
        self,
        params: Params,
        grads: Grads,
        saved: list[Any],
        dy: Array,
        ctx: Context,
        complete: Callable[[int], None] | None = None,
        *,
        held: Held | None = None,
    ) -> Array | None:
        """Return dx like `Layer.backward`; None if needs_dx is False.

        After each layer, `complete(first)` says that the gradients of `parameters` from `first` on are written; these
        parameters are not read any more in this backward pass. With a list `held` layers that can leave the gradients
        of their weights to `backward_weights`, and fill the list for it; the memory of ctx.workspace has to keep
        gradients then.
        """
        if held is not None:
            held[:] = [None] * len(self.layers)
        loose = False  # whether the gradient may lie in memory that a later layer writes
        gradient: Array | None = dy
        own, own_grads, workspace = self._shares(params), self._shares(grads), ctx.workspace
        for i in range(len(self.layers) - 1, -1, -1):
            layer = self.layers[i]
            if gradient is None or not (layer.needs_dx or layer.parameters):
                break
            if self.passed_over[i]:
                continue
            ctx.workspace, ctx.relu = workspace.child(self._keys[i]), self.takes_relu[i]
            if held is None or not self._splits[i]:
                gradient = layer.backward(own[i], own_grads[i], saved[i], gradient, ctx)
                loose |= layer.foreign
            else:
                if loose:
                    mine = ctx.workspace.passed("dy", gradient.shape)
                    ctx.ops.copy(mine, gradient)
                    gradient = mine
                gradient, held[i] = layer.backward_inputs(own[i], own_grads[i], saved[i], gradient, ctx)
                loose = layer.foreign  # inside a block
            if complete is not None:
                complete(self._firsts[i])
            if ctx.progress is not None:
                ctx.progress()
        ctx.workspace, ctx.relu = workspace, False
        return gradient if self._needs_dx else None

    def backward_weights(
        self, grads: Grads, saved: list[Any], held: Held, ctx: Context, complete: Callable[[int], None] | None = None
    ) -> None:
        """Write the gradients that a `backward` with the list `held` has left out; `complete` as there."""
        own_grads, workspace = self._shares(grads), ctx.workspace
        for i in range(len(self.layers) - 1, -1, -1):
            if held[i] is not None:
                ctx.workspace = workspace.child(self._keys[i])
                self.layers[i].backward_weights(own_grads[i], saved[i], held[i], ctx)
            if complete is not None:
                complete(self._firsts[i])
            if held[i] is not None and ctx.progress is not None:
                ctx.progress()
        ctx.workspace = workspace


def named(layers: Seq[specs.LayerSpec], where: str = "model.layers") -> tuple[specs.LayerSpec, ...]:
    """Return the layers with default names (kind and count) where none is given. Raises ConfigError for duplicate
    names."""
    counts: Counter[str] = Counter()
    result = []
    for layer in layers:
        counts[layer.kind] += 1
        result.append(layer if layer.name else replace(layer, name=f"{layer.kind}{counts[layer.kind]}"))
    for name, count in Counter(layer.name for layer in result).items():
        if count > 1:
            raise ConfigError(f"two layers have the name {name!r}; give each its own", key=where)
    return tuple(result)


def expanded(layers: Seq[specs.LayerSpec]) -> list[specs.LayerSpec]:
    """Return the layers with each `activation:` as a layer of its own."""
    result: list[specs.LayerSpec] = []
    for spec in layers:
        result.append(spec)
        activation = getattr(spec, "activation", None)
        if activation:
            result.append(specs.LAYERS[activation](name=f"{spec.name}.{activation}"))
    return result


def _activation_after(layers: Seq[specs.LayerSpec], index: int, end: str | None) -> str | None:
    """Return the kind of the first activation after a layer and before the next weights."""
    for spec in layers[index + 1 :]:
        if spec.weighted:
            return None
        if spec.activates:
            return spec.kind
    return end
