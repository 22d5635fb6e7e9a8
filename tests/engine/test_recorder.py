"""A recorder repeats a pass only where it would come to the same calls with the same arrays."""

from __future__ import annotations

import numpy as np
import pytest

from nettorrent_mpi.device.device import make_device
from nettorrent_mpi.engine.recorder import REMEMBERED, Recorder
from nettorrent_mpi.nn.layer import Alone, Context


class Passes:
    """Passes that add x to y by the device's operations, and gather y by the team's, under a recorder."""

    def __init__(self) -> None:
        device = make_device("cpu", "numpy")
        self.ctx = Context(device.ops, device.workspace("float64"), team=Alone())
        self.recorder = Recorder(device, self.ctx)
        self.recorder.on = True
        self.executed, self.told = 0, list[int]()
        self.y, self.whole = np.zeros(3), np.zeros(3)
        self.tell = self.recorder.noting(self.told.append)

    def run(self, x: np.ndarray, name: str = "kept", size: int = 3) -> np.ndarray:
        found = self.recorder.repeated(size, x)
        if found is None:
            with self.recorder:
                self.executed += 1
                kept = self.ctx.workspace.keep(name, (size,))
                self.ctx.ops.copy(kept[:3], x)
                self.ctx.ops.add(self.y, kept[:3], self.y)
                assert self.ctx.team.cols == 1
                self.ctx.team.gather_cols(self.y, self.whole, self.ctx.workspace)
                self.tell(1)
                found = self.recorder.learned(kept)
        return found


def test_the_third_pass_on_is_repeated() -> None:
    passes, x = Passes(), np.ones(3)
    for times in range(1, 7):
        x[:] = times  # what lies in arrays may change
        passes.run(x)
    assert passes.executed == 3  # the first one makes an array
    assert passes.told == [1] * 6
    assert np.array_equal(passes.whole, np.full(3, sum(range(1, 7))))


def test_other_arrays_and_values_are_other_passes() -> None:
    passes, x, other = Passes(), np.ones(3), np.full(3, 2.0)
    for _ in range(4):
        passes.run(x)
        passes.run(other)
        passes.run(x, "larger", 4)
    assert np.array_equal(passes.whole, np.full(3, 16.0))
    executed = passes.executed
    assert passes.run(x) is passes.run(x)
    assert passes.run(x, "larger", 4).size == 4
    assert passes.executed == executed


def test_new_arrays_of_the_workspace_end_what_was_noted() -> None:
    passes, x = Passes(), np.ones(3)
    for _ in range(4):
        kept = passes.run(x)
    passes.ctx.workspace.keep("kept", (5,))  # an evaluation's, in the place of the smaller one
    executed = passes.executed
    assert passes.run(x) is not kept
    assert passes.executed == executed + 1


def test_while_it_is_off_all_are_executed() -> None:
    passes, x = Passes(), np.ones(3)
    passes.recorder.on = False
    for _ in range(5):
        passes.run(x)
    assert passes.executed == 5


def test_an_error_ends_the_noting() -> None:
    passes, x, ops = Passes(), np.ones(3), None
    ops = passes.ctx.ops
    passes.run(x)
    passes.run(x)
    with pytest.raises(ValueError, match="broadcast"), passes.recorder:
        passes.ctx.ops.add(np.ones(3), np.ones(4), np.ones(3))
    assert passes.ctx.ops is ops
    assert isinstance(passes.ctx.team, Alone)


def test_it_does_not_grow_with_passes_that_do_not_come_again() -> None:
    passes, x = Passes(), np.ones(3)
    for _ in range(4):
        passes.run(x)
    executed = passes.executed
    for _ in range(2 * REMEMBERED):
        passes.run(np.ones(3))
    assert len(passes.recorder._known) <= REMEMBERED
    executed = passes.executed
    passes.run(x)
    assert passes.executed == executed
