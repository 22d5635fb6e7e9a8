"""Frozen dataclasses whose methods are made when they are first needed.

`dataclasses.dataclass` writes the source of six methods for each class and compiles it when the module loads: 0.3 ms, a
hundred times in each rank of a training, which uses a third of these classes. `dataclass` of this module gives the same
classes, but leaves the making to the first object, comparison or look at the fields. Nothing is deferred for classes
that are not frozen or have such methods of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from threading import RLock
from typing import TYPE_CHECKING, Any

__all__ = ["dataclass"]

_METHODS = ("__init__", "__repr__", "__eq__", "__hash__", "__setattr__", "__delattr__")
_FACTS = (
    "__dataclass_fields__",
    "__dataclass_params__",
    "__match_args__",
)  # what dataclasses itself reads, and `match`
_MAKING = RLock()


class _Fact:
    """A _Fact is found where an attribute of a dataclass will be: it has the class made and gives the attribute."""

    def __init__(self, name: str, make: Callable[[], None]):
        self._name, self._make = name, make

    def __get__(self, instance: object, owner: type) -> Any:
        self._make()
        return getattr(owner, self._name)


def _deferred(cls: type, options: dict[str, Any]) -> type:
    """Return the class with methods that have it made as a dataclass when one of them is called."""

    def make() -> None:
        with _MAKING:
            if isinstance(cls.__dict__.get(_FACTS[0]), _Fact):  # else another thread was faster
                for name in (*_METHODS, *_FACTS):
                    delattr(cls, name)
                dataclasses.dataclass(**options)(cls)

    def method(name: str) -> Callable[..., Any]:
        def first(self: object, *arguments: Any, **named: Any) -> Any:
            make()
            return getattr(cls, name)(self, *arguments, **named)

        return first

    for name in _METHODS:
        setattr(cls, name, method(name))
    for name in _FACTS:
        setattr(cls, name, _Fact(name, make))
    return cls


if TYPE_CHECKING:
    from dataclasses import dataclass
else:

    def dataclass(cls: type | None = None, **options: Any) -> Any:
        """Do what dataclasses.dataclass does, later."""
        if cls is None:
            return lambda cls: dataclass(cls, **options)
        if not options.get("frozen") or options.keys() - {"frozen", "kw_only"} or cls.__dict__.keys() & {*_METHODS}:
            return dataclasses.dataclass(cls, **options)
        return _deferred(cls, options)
