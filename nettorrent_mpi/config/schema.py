"""Makes a JSON Schema of configurations from the classes that define them (config/sections.py, plan/specs.py).

Editors complete keys and mark mistakes by it. It knows each value's type and range, but not the relations between
several (a layout that does not fit the ranks), which the loader finds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from nettorrent_mpi.config.described import descriptions, summary
from nettorrent_mpi.config.sections import Bounds, Config, Data, OneOf, Section, Train
from nettorrent_mpi.config.written import NAME, range_of
from nettorrent_mpi.plan import exchange_specs, specs
from nettorrent_mpi.plan.data_specs import DATASETS
from nettorrent_mpi.plan.specs import Spec, first_field

Schema = dict[str, Any]
_PLAIN: dict[Any, Schema] = {
    int: {"type": "integer"},
    float: {"type": "number"},
    str: {"type": "string"},
    bool: {"type": "boolean"},
    NoneType: {"type": "null"},
}
_WORDS = {
    "gt": "exclusiveMinimum",
    "ge": "minimum",
    "lt": "exclusiveMaximum",
    "le": "maximum",
    "min_length": "minItems",
}
# What no annotation tells.
_SPECIAL: dict[tuple[type[Any], str], Schema] = {
    (Data, "name"): {"enum": list(DATASETS)},
    (Train, "micro_batches"): {"anyOf": [{"type": "integer", "minimum": 1}, {"const": "auto"}]},
}
_KINDS: dict[tuple[type[Any], str], Mapping[str, type[Spec]]] = {
    (specs.Residual, "layers"): specs.LAYERS,
    (specs.Residual, "shortcut"): specs.LAYERS,
    (exchange_specs.Gossip, "mix"): exchange_specs.MIXES,
    (exchange_specs.Gossip, "compress"): exchange_specs.COMPRESSIONS,
}
_EXCLUSIVE: dict[type[Any], tuple[str, str]] = {  # never both
    Train: ("epochs", "steps"),
    specs.Step: ("every_epochs", "every_steps"),
}


def schema() -> Schema:
    """Return the schema, of draft 7, as plain data."""
    made = _Schemas()
    whole = made.section(Config)
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "nettorrent_mpi configuration",
        **whole,
        "definitions": made.definitions,
    }


class _Schemas:
    """Makes schemas of classes; those that stand in several places are `definitions`."""

    def __init__(self) -> None:
        self.definitions: dict[str, Schema] = {}

    def section(self, kind: type[Any]) -> Schema:
        """Return the schema of a section: a mapping of its options."""
        return self._mapping(kind, lambda field, hint: self._value(kind, field.name, hint))

    def _mapping(self, kind: type[Any], value: Any) -> Schema:
        hints, texts = get_type_hints(kind, include_extras=True), descriptions(kind)
        properties = {}
        for field in fields(kind):
            properties[field.name] = _described(value(field, hints[field.name]), texts.get(field.name), _default(field))
        found: Schema = {"type": "object", "properties": properties, "additionalProperties": False}
        required = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
        if required:
            found["required"] = required
        if kind in _EXCLUSIVE:
            both = {"required": list(_EXCLUSIVE[kind])}
            given = {name: {"not": {"type": "null"}} for name in _EXCLUSIVE[kind]}
            found["not"] = {**both, "properties": given}
        return _described(found, summary(kind))

    def _value(self, owner: type[Any], option: str, hint: Any) -> Schema:
        if (owner, option) in _SPECIAL:
            return _SPECIAL[owner, option]
        if get_origin(hint) is Annotated:
            kind, *more = get_args(hint)
            found = next((self.one_of(each.kinds) for each in more if isinstance(each, OneOf)), None)
            found = self._value(owner, option, kind) if found is None else found
            for each in more:
                if isinstance(each, Bounds):
                    found = {**found, **_bounds(each.bounds)}
            return found
        origin, inner = get_origin(hint), get_args(hint)
        if origin is Literal:
            return {"enum": list(inner)}
        if origin in (Union, UnionType):
            return _any([self._value(owner, option, each) for each in inner])
        if origin is tuple:
            return self._list(owner, option, inner)
        if isinstance(hint, type) and issubclass(hint, Section):
            return self.section(hint)
        if isinstance(hint, type) and issubclass(hint, Spec):
            kinds = _KINDS.get((owner, option))
            return self.options(hint) if kinds is None else self.one_of(kinds)
        return self._plain(owner, option, hint)

    def _list(self, owner: type[Any], option: str, inner: tuple[Any, ...]) -> Schema:
        if inner[-1] is Ellipsis:
            return {"type": "array", "items": self._value(owner, option, inner[0])}
        items = [self._value(owner, option, each) for each in inner]
        return {"type": "array", "items": items, "minItems": len(items), "maxItems": len(items)}

    def _plain(self, owner: type[Any], option: str, hint: Any) -> Schema:
        if option == "name" and issubclass(owner, specs.LayerSpec):
            return {"type": "string", "pattern": NAME.pattern.replace(r"\Z", "$")}
        found = dict(_PLAIN[hint])
        limits = range_of(owner.kind, option) if issubclass(owner, Spec) and hint in (int, float) else None
        return {**found, **_bounds(limits.bounds)} if limits is not None else found

    def one_of(self, kinds: Mapping[str, type[Spec]]) -> Schema:
        """Return the schema of a spec as it is written: a name, or a name with its options."""
        return _any([{"$ref": f"#/definitions/{self._defined(kind)}"} for kind in kinds.values()])

    def _defined(self, kind: type[Spec]) -> str:
        """Define a spec as it is written; return the definition's name."""
        name = kind.__name__
        if name not in self.definitions:
            self.definitions[name] = {}  # layers inside of layers refer to it
            options = self.options(kind)
            alone = first_field(kind)
            values = [options, {"type": "null"}] if "required" not in options else [options]
            if alone is not None and set(options.get("required", [])) <= {alone}:
                first = {k: v for k, v in options["properties"][alone].items() if k not in ("description", "default")}
                values.append(first)
            named: Schema = {
                "type": "object",
                "properties": {kind.kind: _any(values)},
                "required": [kind.kind],
                "additionalProperties": False,
            }
            bare: list[Schema] = [] if "required" in options else [{"const": kind.kind}]
            self.definitions[name] = _described(_any([*bare, named]), summary(kind))
        return name

    def options(self, kind: type[Spec]) -> Schema:
        """Return the schema of a spec's options: a mapping."""
        return self._mapping(kind, lambda field, hint: self._value(kind, field.name, hint))


def _bounds(bounds: Mapping[str, float]) -> Schema:
    return {_WORDS[name]: bound for name, bound in bounds.items()}


def _any(found: list[Schema]) -> Schema:
    """Return a schema of what one of several describes."""
    flat: list[Schema] = []
    for each in found:
        flat += each["anyOf"] if set(each) == {"anyOf"} else [each]
    return flat[0] if len(flat) == 1 else {"anyOf": flat}


def _described(found: Schema, text: str | None, default: Any = MISSING) -> Schema:
    more: Schema = {"description": re.sub(r"\bNone\b", "null", text)} if text else {}
    if default is not MISSING:
        more["default"] = default
    if "$ref" in found and more:  # in draft 7 nothing counts beside a reference
        found = {"allOf": [found]}
    return {**more, **found} if "description" not in found else {**found, **more}


def _default(field: Field[Any]) -> Any:
    """Return an option's default as plain data; MISSING for none, or where it is a section."""
    value = field.default if field.default is not MISSING else MISSING
    if value is MISSING and field.default_factory is not MISSING:
        made = field.default_factory()
        return made.kind if isinstance(made, Spec) else MISSING
    if isinstance(value, Spec):
        return value.kind
    return list(value) if isinstance(value, tuple) else value
