"""From the description of a layer to the layer: each module of this folder enters its layers here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from nettorrent_mpi.nn.layer import Features, Layer
from nettorrent_mpi.nn.specs import LayerSpec


@dataclass(frozen=True)
class Site:
    """Where a layer stands."""

    name: str
    inputs: Features
    cols: int = 1  # of the team
    col: int = 0
    follows: str | None = None  # the kind of the activation that comes next, for `initial: auto`
    previous: str = "the input"  # what made the input, for error texts
    partial: bool = False  # does the dy that reaches whole features here hold only this col's part of a sum?


Maker = Callable[[Any, Site], Layer]
M = TypeVar("M", bound=Maker)
_makers: dict[type[LayerSpec], Maker] = {}


def makes(spec: type[LayerSpec]) -> Callable[[M], M]:
    """Enter the decorated class as the one that does what `spec` asks for; it is called with (spec, site)."""

    def enter(maker: M) -> M:
        _makers[spec] = maker
        return maker

    return enter


def make(
    spec: LayerSpec,
    name: str,
    inputs: Features,
    cols: int = 1,
    col: int = 0,
    follows: str | None = None,
    *,
    previous: str = "the input",
    partial: bool = False,
) -> Layer:
    """The layer that `spec` describes, for rank `col` of a team of `cols` cols.

    The inputs of a layer with weights, and of flatten, have to be whole: `Sequence` puts a `Gather` before them where
    they are not. `spec.activation` is not looked at: `Sequence` makes it a layer of its own. Raises ShapeError where
    the inputs do not fit, naming `previous` and the layer.
    """
    return _makers[type(spec)](spec, Site(name, inputs, cols, col, follows, previous, partial))
