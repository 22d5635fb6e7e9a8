"""The registry maps a spec to the class of its layer; each module of this folder registers its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from nettorrent_mpi.nn.layer import Features, Layer
from nettorrent_mpi.plan.errors import ConfigError, ShapeError
from nettorrent_mpi.plan.records import dataclass
from nettorrent_mpi.plan.specs import LAYERS, LayerSpec


@dataclass(frozen=True)
class Site:
    """A Site is the position of a layer in the network and in the team."""

    name: str
    inputs: Features
    cols: int = 1  # of the team
    col: int = 0
    follows: str | None = None  # the kind of the activation that comes next, for `initial: auto`
    previous: str = "the input"  # what produced the input, for error texts
    partial: bool = False  # whether the dy of whole features here holds only this col's part of a sum

    def initial(self, asked: str) -> str:
        """Return the requested initial values; `auto` depends on the activation that follows."""
        if asked != "auto":
            return asked
        return "he_normal" if self.follows in ("relu", "leaky_relu", "gelu") else "glorot_uniform"

    def positive(self, option: str, *values: int) -> None:
        """Raise ConfigError unless all values of an option are at least 1."""
        if min(values) < 1:
            raise ConfigError(f"layer {self.name}: {option} is {min(values)}, but has to be at least 1")

    def image(self, kind: str) -> tuple[int, int, int]:
        """Return (height, width, channels) of the input; raises ShapeError if it is not an image."""
        if len(self.inputs.shape) != 3:
            raise ShapeError(
                f"layer {self.name}: {kind} wants images (height, width, channels), but {self.previous} gives "
                f"{self.inputs.shape} a row; put {self.name} before the layer that flattens the images"
            )
        height, width, channels = self.inputs.local
        return height, width, channels

    def fits(self, what: str, size: tuple[int, int], image: tuple[int, ...]) -> None:
        """Raise ShapeError if a window of `size` is larger than the image."""
        if size[0] > image[0] or size[1] > image[1]:
            raise ShapeError(
                f"layer {self.name}: its {what} of {size[0]} x {size[1]} is larger than the {image[0]} x {image[1]} "
                f"image that {self.previous} gives; make the {what} smaller or leave out a pooling layer before it"
            )


Maker = Callable[[Any, Site], Layer]
M = TypeVar("M", bound=Maker)
_makers: dict[type[LayerSpec], Maker] = {}


def register_layer(spec: type[LayerSpec]) -> Callable[[M], M]:
    """Register the decorated class for the layers that `spec` describes; it is called with (spec, site).

    From then on the configuration accepts the spec, by its `kind`. So a custom layer is a frozen dataclass derived from
    LayerSpec, with a `kind` and the options, and a class derived from Layer with this decorator. Raises ValueError if
    another layer has that kind.
    """
    if LAYERS.setdefault(spec.kind, spec) is not spec:
        raise ValueError(f"there is a layer of the kind {spec.kind!r} already: give {spec.__name__} another `kind`")

    def enter(maker: M) -> M:
        _makers[spec] = maker
        return maker

    return enter


def make(spec: LayerSpec, site: Site) -> Layer:
    """Construct the layer that `spec` describes, at a site.

    The inputs of a layer with weights, and of flatten, have to be whole: `Sequence` inserts a `Gather` where they are
    not. `spec.activation` is ignored: `Sequence` makes it a layer of its own. Raises ShapeError if the inputs do not
    fit, naming `previous` and the layer.
    """
    return _makers[type(spec)](spec, site)
