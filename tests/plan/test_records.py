"""A dataclass whose methods are made later is the class that dataclasses makes at once."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from nettorrent_mpi.plan import records


class Plain:
    a: int
    b: str = "x"
    c: list[int] = dataclasses.field(default_factory=list)
    d: float | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.a < 0:
            raise ValueError(self.a)


def made(**options: Any) -> tuple[type[Any], type[Any]]:
    """The same class made later, and at once, with a subclass of each."""
    pair, body = [], {name: value for name, value in vars(Plain).items() if name not in ("__dict__", "__weakref__")}
    for decorate in (records.dataclass, dataclasses.dataclass):
        base = decorate(frozen=True, **options)(type("Base", (), dict(body)))
        pair.append(decorate(frozen=True)(type("Below", (base,), {"__annotations__": {"e": "int"}, "e": 5})))
    assert isinstance(pair[0].__dict__["__dataclass_fields__"], records._Fact)  # nothing is made yet
    return pair[0], pair[1]


USES: dict[str, Callable[[type[Any]], object]] = {
    "made": lambda cls: repr(cls(1)),
    "made with more": lambda cls: repr(cls(a=1, b="y", c=[2], d=0.5, e=7)),
    "equal": lambda cls: (cls(1) == cls(1), cls(1) == cls(2), cls(1) == 1),
    "hash": lambda cls: (hash(cls(1, c=(), e=0)) == hash(cls(1, c=(), e=0)), cls.__hash__ is object.__hash__),
    "fields": lambda cls: [(each.name, each.type, each.kw_only, each.init) for each in dataclasses.fields(cls)],
    "base's fields": lambda cls: [each.name for each in dataclasses.fields(cls.__mro__[1])],
    "is one": lambda cls: (dataclasses.is_dataclass(cls), dataclasses.is_dataclass(cls(1))),
    "parameters": lambda cls: repr(cls.__dataclass_params__),
    "match": lambda cls: cls.__match_args__,
    "replaced": lambda cls: repr(dataclasses.replace(cls(1), a=2, e=9)),
    "plain": lambda cls: dataclasses.asdict(cls(1)),
    "copied": lambda cls: copy.deepcopy(cls(1)) == cls(1),
    "defaults": lambda cls: (cls(1).b, cls.b, cls.e, cls.d),
}
WRONG: dict[str, Callable[[type[Any]], object]] = {
    "assigned": lambda cls: setattr(cls(1), "a", 2),
    "assigned to another": lambda cls: setattr(cls(1), "other", 2),
    "assigned before it is made": lambda cls: setattr(object.__new__(cls), "a", 2),
    "deleted": lambda cls: delattr(cls(1), "a"),
    "too few": lambda cls: cls(),
    "too many": lambda cls: cls(1, "x", [], 5, 6, 7),
    "unknown": lambda cls: cls(1, unknown=2),
    "refused": lambda cls: cls(-1),
}


@pytest.mark.parametrize("use", USES)
def test_classes_are_used_alike(use: str) -> None:
    later, once = made()
    assert USES[use](later) == USES[use](once)


@pytest.mark.parametrize("use", WRONG)
def test_mistakes_are_told_alike(use: str) -> None:
    told = []
    for cls in made():
        with pytest.raises((AttributeError, TypeError, ValueError)) as error:
            WRONG[use](cls)
        told.append((type(error.value), str(error.value)))
    assert told[0] == told[1]


def test_names_only() -> None:
    later, once = made(kw_only=True)
    for cls in (later, once):
        with pytest.raises(TypeError):
            cls(1)
    assert repr(later(a=1)) == repr(once(a=1))


@records.dataclass(frozen=True)
class Sent:
    a: int
    b: tuple[int, ...] = ()


def test_an_object_that_was_received_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unpickling calls no method of the class: what an object is compared and hashed by is made then."""
    sent = pickle.dumps(Sent(1, (2,)))
    fresh = records.dataclass(frozen=True)(type("Sent", (), {"__annotations__": {"a": "int", "b": "tuple"}, "b": ()}))
    fresh.__module__ = __name__
    monkeypatch.setitem(globals(), "Sent", fresh)
    for look in (hash, repr, lambda one: one == pickle.loads(sent)):
        received = pickle.loads(sent)
        assert look(received)
        assert (received.a, received.b) == (1, (2,))
    with pytest.raises(dataclasses.FrozenInstanceError):
        pickle.loads(sent).a = 2


def test_dataclasses_of_a_script_inherit() -> None:
    """A layer of a script's own is made by dataclasses, from a class that is not made yet."""
    base, _ = made()

    @dataclasses.dataclass(frozen=True)
    class Own(base):  # type: ignore[misc, valid-type]
        f: int = 6

    assert repr(Own(1)).endswith("Own(a=1, b='x', c=[], d=None, e=5, f=6)")


def test_a_class_without_a_decorator_inherits() -> None:
    base, _ = made()
    plain = type("Plain", (base,), {})
    assert plain(1).a == 1
    assert plain(1) == plain(1)
    assert plain(1) != base(1)


def test_threads_make_it_once() -> None:
    for _ in range(50):
        later, _once = made()
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(dataclasses.fields, [later] * 4))
        assert found == [dataclasses.fields(later)] * 4
        assert later(1).e == 5


@pytest.mark.parametrize("options", [{}, {"frozen": True, "eq": False}, {"frozen": True, "slots": True}])
def test_other_dataclasses_are_made_at_once(options: dict[str, Any]) -> None:
    cls = records.dataclass(**options)(type("Other", (), {"__annotations__": {"a": "int"}}))
    assert isinstance(cls.__dict__["__dataclass_fields__"], dict)
