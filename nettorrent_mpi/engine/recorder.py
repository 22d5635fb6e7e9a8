"""A recorder repeats passes of layers on a CPU by the calls of operations that they come to.

The arrays of the steady state are the same objects in every step, and what changes from step to step lies in them
(`device.numbers`), as a GPU's graphs need it. So a pass that comes again makes the same calls with the same arguments:
they are noted once, and then made without the code of the layers that leads to them, which takes as long as the small
products between a few rows and a few hundred neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

from nettorrent_mpi.device.device import Device
from nettorrent_mpi.nn.layer import Context

T = TypeVar("T")
Call = Callable[[], object]

REMEMBERED = 512  # passes: in the steady state a few for each micro-batch in flight


class _Pass(NamedTuple):
    """A _Pass was executed before. `calls` is None if they were not noted. `objects` live on: those by whose ids it is
    known, and what the calls work on."""

    objects: tuple[object, ...]
    calls: list[Call] | None
    result: Any


class Recorder:
    """A Recorder repeats passes that it has noted. Others are executed inside a `with` block, which notes them:

        result = recorder.repeated(values, *objects)
        if result is None:
            with recorder:
                result = recorder.learned(execute())

    A pass depends on these values, on which objects these are, and on what lies in arrays. It is executed once as it
    is, so that all memory is allocated and all algorithms are chosen, and noted when it comes again. While `on` is
    False all are executed.
    """

    on = False

    def __init__(self, device: Device, ctx: Context):
        self._device, self._ctx = device, ctx
        self._ops, self._team, self._shared = ctx.ops, ctx.team, ctx.workspace
        self._known: dict[Hashable, _Pass] = {}
        self._made = 0  # arrays that the workspaces had made by the latest pass that was executed
        self._key: Hashable = None  # of the pass that is executed, with its objects
        self._objects: tuple[object, ...] = ()
        self._calls: list[Call] | None = None  # of the pass that is noted

    def repeated(self, values: Hashable, *objects: object) -> Any | None:
        """Repeat a pass and return its result, the same object each time; None if it has to be executed."""
        if not self.on:
            return None
        self._key = key = (values, *map(id, objects))
        self._objects = objects
        known = self._known.get(key)
        if known is None or known.calls is None or self._made != self._shared.made:
            return None
        for call in known.calls:
            call()
        return known.result

    def __enter__(self) -> None:
        """Begin to execute the pass that `repeated` was asked for last: note it, unless it is the first time."""
        if self._made != self._shared.made:  # in the place of smaller ones, perhaps: of an evaluation's many rows
            self._known.clear()
            self._made = self._shared.made
        if self.on and self._key in self._known:
            self._calls, ctx = [], self._ctx
            ctx.ops = cast("Any", _Watched(self._ops, self._note_operation))
            ctx.team = cast("Any", _Watched(self._team, self._note_collective))

    def learned(self, result: T) -> T:
        """Return the result of the pass that is executed, and keep what was noted, unless it has made new arrays."""
        if self.on:
            if self._made != self._shared.made:
                self._calls = None
            if len(self._known) >= REMEMBERED:
                self._known = {key: known for key, known in self._known.items() if known.calls is not None}
            if len(self._known) < REMEMBERED:
                self._known[self._key] = _Pass(self._objects, self._calls, result)
        return result

    def __exit__(self, *error: object) -> None:
        self._ctx.ops, self._ctx.team, self._calls = self._ops, self._team, None

    def noting(self, function: Callable[..., object]) -> Callable[..., None]:
        """Return a function that calls this one, and belongs to the passes that call it."""

        def noted(*arguments: Any) -> None:
            function(*arguments)
            if self._calls is not None:
                self._calls.append(partial(function, *arguments))

        return noted

    def _note_operation(self, name: str, *arguments: Any, **named: Any) -> None:
        assert self._calls is not None
        self._objects += (arguments, named)  # a library is given addresses
        self._calls += self._device.prepared(name, *arguments, **named)

    def _note_collective(self, name: str, *arguments: Any) -> None:
        assert self._calls is not None
        self._calls.append(partial(getattr(self._team, name), *arguments))


class _Watched:
    """A _Watched object does what the one inside does, and `tell`s the name and the arguments of each method called."""

    def __init__(self, inside: object, tell: Callable[..., None]):
        self._inside, self._tell = inside, tell

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inside, name)
        if not callable(found):
            return found

        def told(*arguments: Any, **named: Any) -> Any:
            result = found(*arguments, **named)
            self._tell(name, *arguments, **named)
            return result

        return told
