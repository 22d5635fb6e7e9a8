"""Layers, losses, optimizers and schedules as they are written ("a name, or a name with its options") become specs.

    flatten            {dropout: 0.25}            {conv2d: {filters: 32, kernel: 3}}

Mistakes are raised as `Mistake` (one) or `Mistakes` (pydantic's list), both ValueErrors that pydantic carries outwards,
so that app.mistakes can tell the whole path.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Annotated, Any, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, TypeAdapter, ValidationError

from nettorrent_mpi.nn import specs
from nettorrent_mpi.nn.specs import LayerSpec, Spec

S = TypeVar("S", bound=Spec)
WEIGHTED = (specs.Linear, specs.Conv2d, specs.Residual)  # the weight layers, by which swarms are counted


class Mistake(ValueError):  # noqa: N818
    """One mistake at `path` below the value that is being checked, told in our own words."""

    def __init__(self, text: str, *path: str | int):
        super().__init__(text)
        self.text, self.path = text, path


class Mistakes(ValueError):  # noqa: N818
    """What pydantic found below `path`."""

    def __init__(self, error: ValidationError, *path: str | int):
        super().__init__(str(path))
        self.error, self.path = error, path


def nearest(word: str, known: Iterable[str]) -> str:
    """How to go on after an unknown word: the nearest known one, or all of them."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else f"possible: {', '.join(known)}"


def shown(value: Any) -> str:
    """`value` as a person would call it."""
    if isinstance(value, str):
        return f"the text {value[:60]!r}"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    return "nothing (null)" if value is None else json.dumps(value)


def strictly(adapter: TypeAdapter[Any], value: Any) -> Any:
    """`value` checked as JSON: a list may be a tuple and a whole number a float; nothing else is converted."""
    return adapter.validate_json(json.dumps(value), strict=True)


# ---- what an option may be: by (kind, option), or by option alone; every number of a pair is checked
Rule = tuple[Callable[[Any], bool], str]
_COUNT: Rule = (lambda n: n >= 1, "at least 1")
_POSITIVE: Rule = (lambda x: x > 0, "more than 0")
_NOT_NEGATIVE: Rule = (lambda x: x >= 0, "at least 0")
_BELOW_ONE: Rule = (lambda x: 0 <= x < 1, "at least 0 and less than 1")
_FRACTION: Rule = (lambda x: 0 <= x <= 1, "between 0 and 1")
_RULES: dict[str | tuple[str, str], Rule] = {
    **dict.fromkeys(("units", "filters", "kernel", "stride", "size", "every"), _COUNT),
    **dict.fromkeys(("lr", "eps", "factor"), _POSITIVE),
    **dict.fromkeys(("weight_decay", "lr_decay", "initial_accumulator", "warmup_steps"), _NOT_NEGATIVE),
    **dict.fromkeys(("rate", "label_smoothing", "betas", "alpha", "momentum"), _BELOW_ONE),
    **dict.fromkeys(("dampening", "final", ("batch_norm", "momentum")), _FRACTION),
}
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*\Z")


def _check_ranges(spec: Spec) -> None:
    for option in (f.name for f in fields(spec)):
        value = getattr(spec, option)
        rule = _RULES.get((spec.kind, option)) or _RULES.get(option)
        if rule is None or value is None:
            continue
        for number in value if isinstance(value, tuple) else (value,):
            if not rule[0](number):
                raise Mistake(f"must be {rule[1]}, not {number}", option)
    if isinstance(spec, specs.Sgd) and spec.nesterov and (spec.momentum == 0 or spec.dampening != 0):
        raise Mistake("needs a momentum above 0 and no dampening", "nesterov")
    if isinstance(spec, specs.Residual) and not any(isinstance(i, WEIGHTED) for i in (*spec.layers, *spec.shortcut)):
        raise Mistake("has no layer with weights; add a linear or conv2d layer", "layers")
    if isinstance(spec, LayerSpec) and spec.name is not None and not _NAME.match(spec.name):
        raise Mistake("must begin with a letter and go on with letters, digits, _ and -", "name")


# ---- reading one spec ----------------------------------------------------------------------------
def split(value: Any, kinds: Mapping[str, type[Spec]], what: str) -> tuple[str, dict[str, Any]]:
    """(kind, options by name) of one spec as it was written. Raises Mistake."""
    if isinstance(value, str):
        kind, options = value, None
    elif isinstance(value, dict) and len(value) == 1:
        kind, options = next(iter(value.items()))
    elif isinstance(value, dict) and value:
        raise Mistake(f"wants one {what}, not {' and '.join(map(str, value))} together (is the indentation right?)")
    else:
        raise Mistake(f"wants the name of a {what}, or a name with its options, not {shown(value)}")
    if kind not in kinds:
        path = (kind,) if isinstance(value, dict) else ()
        raise Mistake(f"unknown {what} {kind!r}; {nearest(kind, kinds)}", *path)
    if options is None:
        return kind, {}
    if isinstance(options, dict):
        return kind, options
    alone = specs.first_field(kinds[kind])
    if alone is None:
        raise Mistake(f"{kind} has no options besides name", kind)
    return kind, {alone: options}


def parse(value: Any, kinds: Mapping[str, type[S]], what: str) -> S:
    """The spec that `value` asks for. Raises Mistake or Mistakes, whose paths begin below `value`."""
    if isinstance(value, Spec):
        if type(value) not in kinds.values():
            raise Mistake(f"wants a {what}, not a {value.kind}")
        _check_ranges(value)
        return cast("S", value)
    kind, options = split(value, kinds, what)
    try:
        checked = strictly(_adapter(kinds[kind]), options)
        spec = specs.Residual(**dict(checked)) if isinstance(checked, _Residual) else checked
        _check_ranges(spec)
    except Mistake as mistake:
        raise Mistake(mistake.text, kind, *mistake.path) from None
    except ValidationError as error:
        raise Mistakes(error, kind) from None
    return cast("S", spec)


def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    if kind not in _adapters:
        _adapters[kind] = TypeAdapter(_Residual if kind is specs.Residual else kind)
    return _adapters[kind]


_adapters: dict[type[Any], TypeAdapter[Any]] = {}  # building one takes about a millisecond

Layer = Annotated[LayerSpec, PlainValidator(lambda value: parse(value, specs.LAYERS, "layer"))]
Loss = Annotated[Spec, PlainValidator(lambda value: parse(value, specs.LOSSES, "loss"))]
Optimizer = Annotated[Spec, PlainValidator(lambda value: parse(value, specs.OPTIMIZERS, "optimizer"))]
Schedule = Annotated[Spec, PlainValidator(lambda value: parse(value, specs.SCHEDULES, "schedule"))]


class _Residual(BaseModel):
    """specs.Residual as it is written: its layers are again names with options."""

    model_config = ConfigDict(extra="forbid")
    layers: Annotated[tuple[Layer, ...], Field(min_length=1)]
    shortcut: tuple[Layer, ...] = ()
    name: str | None = None


# ---- where specs stand, for --set ----------------------------------------------------------------
def kinds_at(path: tuple[str | int, ...]) -> tuple[Mapping[str, type[Spec]], str] | None:
    """(the kinds that may be asked for, what they are) where a spec stands at `path` of a configuration, else None."""
    fixed: dict[tuple[str | int, ...], tuple[Mapping[str, type[Spec]], str]] = {
        ("model", "loss"): (specs.LOSSES, "loss"),
        ("train", "optimizer"): (specs.OPTIMIZERS, "optimizer"),
        ("train", "schedule"): (specs.SCHEDULES, "schedule"),
    }
    if path in fixed:
        return fixed[path]
    if len(path) >= 3 and path[0] == "model" and path[-2] in ("layers", "shortcut") and isinstance(path[-1], int):
        return specs.LAYERS, "layer"
    return None


# ---- writing -------------------------------------------------------------------------------------
def plain(value: Any) -> Any:
    """`value` with lists for tuples and {kind: options} for specs: what YAML and JSON can hold."""
    if isinstance(value, LayerSpec):
        return plain(specs.to_plain(value))
    if isinstance(value, Spec):
        return {value.kind: plain(value.options())}
    if isinstance(value, BaseModel):
        return {name: plain(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
