"""Converts layers, losses, optimizers and exchanges as they are written (a name, or a name with options) to specs.

    flatten            {dropout: 0.25}            {conv2d: {filters: 32, kernel: 3}}

Mistakes are raised as `Mistake` (one) or `Mistakes` (pydantic's list), both ValueErrors that pydantic carries outwards,
so that config.mistakes can tell the whole path.
"""

from __future__ import annotations

import json
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import field, fields
from typing import Annotated, Any, TypeVar, cast

from pydantic import Field, PlainValidator, TypeAdapter, ValidationError

from nettorrent_mpi.config.mistakes import Mistake, Mistakes, raise_all, shown
from nettorrent_mpi.config.translation import nearest
from nettorrent_mpi.plan import exchange_specs as choices
from nettorrent_mpi.plan import specs
from nettorrent_mpi.plan.records import dataclass
from nettorrent_mpi.plan.specs import LayerSpec, Spec

S = TypeVar("S", bound=Spec)
T = TypeVar("T")


def _number(value: Any) -> Any:
    """The Python number that a NumPy number is. Raises Mistake for what is no value of a configuration."""
    item = getattr(value, "item", None)
    if item is None or getattr(value, "shape", None) != ():
        raise Mistake(f"cannot be {value!r}: give a number, a text, a list, or a name with its options")
    return item()


def strictly(adapter: TypeAdapter[Any], value: Any) -> Any:
    """Check `value` as JSON: a list may be a tuple and a whole number a float; nothing else is converted."""
    return adapter.validate_json(json.dumps(value, default=_number), strict=True)


def section(kind: type[T], value: Any) -> T:
    """Read a section. Raises Mistakes."""
    try:
        return cast("T", strictly(TypeAdapter(kind), value))
    except ValidationError as error:
        raise Mistakes([error]) from None


# ---- what an option may be: by (kind, option), or by option alone; every number of a pair is checked
class Range:
    """A Range of numbers, in pydantic's words: gt, ge, lt, le."""

    def __init__(self, text: str, **bounds: float):
        self.text, self.bounds = text, bounds

    def has(self, number: float) -> bool:
        """Whether a number is in the range, and finite."""
        return math.isfinite(number) and all(_HOLDS[name](number, bound) for name, bound in self.bounds.items())


_HOLDS: dict[str, Callable[[float, float], bool]] = {
    "gt": operator.gt, "ge": operator.ge, "lt": operator.lt, "le": operator.le,
}  # fmt: skip
_COUNT = Range(f"at least 1 and at most {specs.MOST:,}", ge=1, le=specs.MOST)
_POSITIVE = Range("more than 0", gt=0)
_NOT_NEGATIVE = Range("at least 0", ge=0)
_BELOW_ONE = Range("at least 0 and less than 1", ge=0, lt=1)
_ABOVE_ZERO = Range("more than 0 and at most 1", gt=0, le=1)
_BETWEEN = Range("more than 0 and less than 1", gt=0, lt=1)
_FRACTION = Range("between 0 and 1", ge=0, le=1)
_RANGES: dict[str | tuple[str, str], Range] = {
    **dict.fromkeys(("units", "filters", "kernel", "stride", "size", "every", "every_epochs", "every_steps"), _COUNT),
    **dict.fromkeys(("lr", "eps", "factor", "factor_per_epoch"), _POSITIVE),
    **dict.fromkeys(
        ("weight_decay", "lr_decay", "initial_accumulator", "warmup_steps", "class_weights"), _NOT_NEGATIVE
    ),
    **dict.fromkeys(("rate", "label_smoothing", "betas", "alpha", "momentum"), _BELOW_ONE),
    **dict.fromkeys(("dampening", "final", "slope", ("batch_norm", "momentum")), _FRACTION),
    # exchanges
    **dict.fromkeys(("stored", "exact_every", "every_samples", ("linear", "target")), _COUNT),
    **dict.fromkeys(("deadline", ("consensus", "max"), ("loss_divergence", "target")), _POSITIVE),
    **dict.fromkeys(("probability", "part", "gamma"), _ABOVE_ZERO),
    "rate_factor": _POSITIVE,
    "fraction": _BETWEEN,
    **dict.fromkeys(("value", "start", "end"), _FRACTION),
    "divergence_threshold": _NOT_NEGATIVE,
    "slow_momentum": _BELOW_ONE,
    "withhold": _BELOW_ONE,
}


def range_of(kind: str, option: str) -> Range | None:
    """Return the range of an option's numbers; None if its type says all."""
    return _RANGES.get((kind, option)) or _RANGES.get(option)


NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*\Z")


def _out_of_range(kind: str, options: Mapping[str, Any]) -> Iterator[Mistake]:
    """Yield a mistake for each number that its option does not allow; values of a wrong type are left to pydantic."""
    for option, value in options.items():
        possible = range_of(kind, option)
        for number in value if isinstance(value, list | tuple) else (value,):
            is_number = isinstance(number, int | float) and not isinstance(number, bool)
            if possible is not None and is_number and not possible.has(number):
                yield Mistake(f"must be {possible.text}, not {number}", option)
                break


def _mistakes(spec: Spec) -> Iterator[Mistake]:
    """Yield what is wrong about the values of a spec whose types are right."""
    values = vars(spec)
    for option, value in values.items():
        if isinstance(value, Spec):
            kind = () if isinstance(value, choices.Consensus) else (value.kind,)
            for mistake in _mistakes(value):
                yield Mistake(mistake.text, option, *kind, *mistake.path)
    yield from _out_of_range(spec.kind, values)
    if isinstance(spec, specs.Sgd) and spec.nesterov and (spec.momentum == 0 or spec.dampening != 0):
        yield Mistake("needs a momentum above 0 and no dampening", "nesterov")
    if isinstance(spec, specs.Step) and (spec.every_epochs is None) == (spec.every_steps is None):
        yield Mistake("give one of every_epochs and every_steps: after how many the learning rate drops")
    if isinstance(spec, specs.CrossEntropy) and isinstance(spec.class_weights, tuple) and not any(spec.class_weights):
        yield Mistake("needs a number above 0: rows that weigh 0 teach nothing", "class_weights")
    if isinstance(spec, specs.Residual) and not any(i.weighted for i in (*spec.layers, *spec.shortcut)):
        yield Mistake("has no layer with weights; add a linear or conv2d layer", "layers")
    if isinstance(spec, LayerSpec) and spec.name is not None and not NAME.match(spec.name):
        yield Mistake("must begin with a letter and go on with letters, digits, _ and -", "name")
    if isinstance(spec, choices.Gossip):
        yield from _gossip_mistakes(spec)


def _gossip_mistakes(gossip: choices.Gossip) -> Iterator[Mistake]:
    """Yield what options exclude each other."""
    if "parameters" not in gossip.average:
        yield Mistake("must hold parameters: write [parameters] or [parameters, optimizer]", "average")
    if len(set(gossip.average)) < len(gossip.average):
        yield Mistake("names the same thing twice", "average")
    if gossip.slow_momentum > 0 and gossip.exact_every is None:
        yield Mistake("acts at exact averages only, and there are none: add exact_every", "slow_momentum")
    if isinstance(gossip.compress, choices.Whole):
        if gossip.gamma is not None:
            yield Mistake("is the step towards neighbours whose messages are compressed: add compress", "gamma")
        return
    small = gossip.compress.kind
    if "optimizer" in gossip.average:
        yield Mistake(
            f"{small} would corrupt the optimizer's state, which has to stay positive: leave optimizer out of average "
            "or compress out",
            "compress",
        )
    if gossip.mix != choices.ConstantMix():
        yield Mistake(
            f"{small} works with the pairing's own weights only: leave out mix (constant, without a value) or compress",
            "compress",
        )
    if gossip.pairing == "random":
        yield Mistake(
            f"{small} sends what changed since the neighbours' last message, and pairing random has other neighbours "
            "in every round: choose another pairing, or compress: none",
            "compress",
        )


# ---- reading one spec ----------------------------------------------------------------------------
def split(value: Any, kinds: Mapping[str, type[Spec]], what: str) -> tuple[str, dict[str, Any]]:
    """Split a spec as it was written into its kind and its options by name. Raises Mistake."""
    if isinstance(value, str):
        kind, options = value, None
    elif isinstance(value, dict) and len(value) == 1:
        kind, options = next(iter(value.items()))
    elif isinstance(value, dict) and value:
        raise Mistake(f"wants one {what}, not {' and '.join(map(str, value))} together (is the indentation right?)")
    else:
        a = "an" if what[0] in "aeiou" else "a"
        raise Mistake(f"wants the name of {a} {what}, or a name with its options, not {shown(value)}")
    if kind not in kinds:
        path = (kind,) if isinstance(value, dict) else ()
        raise Mistake(f"unknown {what} {kind!r}; {nearest(kind, kinds, what)}", *path)
    if options is None:
        return kind, {}
    if isinstance(options, dict):
        return kind, options
    alone = specs.first_field(kinds[kind])
    if alone is None:
        besides = " besides name" if issubclass(kinds[kind], LayerSpec) else ""
        raise Mistake(f"{kind} has no options{besides}", kind)
    return kind, {alone: options}


def parse(value: Any, kinds: Mapping[str, type[S]], what: str) -> S:
    """Make the spec that `value` asks for. Raises Mistake or Mistakes, whose paths begin below `value`."""
    if isinstance(value, Spec):
        if type(value) not in kinds.values():
            raise Mistake(f"wants one of {', '.join(kinds)}, not {value.kind}")
        raise_all(list(_mistakes(value)))
        return cast("S", value)
    kind, options = split(value, kinds, what)
    try:
        spec = strictly(_adapter(kinds[kind]), options)
        if kinds[kind] in _WRITTEN:
            spec = kinds[kind](**{f.name: getattr(spec, f.name) for f in fields(kinds[kind])})
    except ValidationError as error:
        raise Mistakes([error, *_out_of_range(kind, options)], kind) from None
    wrong = list(_mistakes(spec))
    if wrong:
        raise Mistakes(wrong, kind)
    return cast("S", spec)


def _adapter(kind: type[Spec]) -> TypeAdapter[Any]:
    if kind not in _adapters:
        _adapters[kind] = TypeAdapter(_WRITTEN.get(kind, kind))
    return _adapters[kind]


_adapters: dict[type[Spec], TypeAdapter[Any]] = {}  # building one takes about a millisecond

Layer = Annotated[LayerSpec, PlainValidator(lambda value: parse(value, specs.LAYERS, "layer"))]
Mix = Annotated[Spec, PlainValidator(lambda value: parse(value, choices.MIXES, "mix"))]
Compression = Annotated[Spec, PlainValidator(lambda value: parse(value, choices.COMPRESSIONS, "compression"))]


@dataclass(frozen=True)
class _WrittenResidual(specs.Residual):
    """Describes specs.Residual as it is written: its layers are again names with options."""

    layers: Annotated[tuple[Layer, ...], Field(min_length=1)]
    shortcut: tuple[Layer, ...] = ()


@dataclass(frozen=True)
class _WrittenGossip(choices.Gossip):
    """Describes choices.Gossip as it is written: mix and compress are again names with options."""

    mix: Mix = field(default_factory=choices.ConstantMix)
    compress: Compression = field(default_factory=choices.Whole)


_WRITTEN: dict[type[Spec], type[Spec]] = {specs.Residual: _WrittenResidual, choices.Gossip: _WrittenGossip}


# ---- where specs stand: for --set, and for the hints after an unknown key ------------------------
def kinds_at(path: tuple[str | int, ...]) -> tuple[Mapping[str, type[Spec]], str] | None:
    """Return the possible kinds, and what they are, if a spec stands at `path` of a configuration; else None."""
    fixed: dict[tuple[str | int, ...], tuple[Mapping[str, type[Spec]], str]] = {
        ("model", "loss"): (specs.LOSSES, "loss"),
        ("train", "optimizer"): (specs.OPTIMIZERS, "optimizer"),
        ("train", "schedule"): (specs.SCHEDULES, "schedule"),
        ("pipeline",): (choices.PIPELINES, "pipeline"),
        ("exchange",): (choices.EXCHANGES, "exchange"),
        ("redundancy",): (choices.REDUNDANCIES, "kind of redundancy"),
        ("exchange", "gossip", "mix"): (choices.MIXES, "mix"),
        ("exchange", "gossip", "compress"): (choices.COMPRESSIONS, "compression"),
    }
    if path in fixed:
        return fixed[path]
    if len(path) >= 3 and path[0] == "model" and path[-2] in ("layers", "shortcut") and isinstance(path[-1], int):
        return specs.LAYERS, "layer"
    return None


def options_at(path: tuple[str | int, ...]) -> list[str] | None:
    """Return the names of the options at `path`, where those of a spec stand: `("train", "optimizer", "adam")`."""
    found = kinds_at(path[:-1])
    kind = found[0].get(str(path[-1])) if found and path else None
    return None if kind is None else [f.name for f in fields(kind)]
