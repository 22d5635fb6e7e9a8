"""Parameters of one type as views of one flat array, and what their optimizer keeps of them.

An exchange works on a rank's shard of the array, and the model and its optimizer on the same memory: nothing is copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.exchange import Shards
from nettorrent_mpi.torch.slots import length, slots


def is_like(value: Any, parameter: torch.Tensor) -> bool:
    """Whether a value of an optimizer's state has a number for each of the parameter's."""
    return (
        isinstance(value, torch.Tensor)
        and value.dim() > 0
        and value.shape == parameter.shape
        and value.dtype == parameter.dtype
    )


def outline(optimizer: torch.optim.Optimizer, parameters: Iterable[torch.Tensor]) -> list[dict[str, Any]]:
    """Return an optimizer's state of each parameter, with `...` for arrays like the parameter."""
    states = [(p, optimizer.state.get(p, {})) for p in parameters]
    return [{name: ... if is_like(value, p) else value for name, value in state.items()} for p, state in states]


class FlatParameters:
    """The parameters of one type: their flat array, and the shard of it that this rank exchanges with its peers.

    The optimizer's state joins where it is exchanged (`join_state`): arrays of the same order.
    """

    def __init__(self, kind: str, tensors: Sequence[torch.nn.Parameter], statistics: Sequence[Array], holders: Group):
        self.tensors = tensors
        self._kind, self._holders = kind, holders
        self._size = length(tensors, holders.size)
        self.array: Array = np.zeros(self._size, kind)
        for tensor, slot in zip(tensors, slots(self.array, tensors), strict=True):
            slot.copy_(tensor.detach())
            tensor.data = slot
        self._counts = [self._size // holders.size] * holders.size
        self._own = slice(self._counts[0] * holders.index, self._counts[0] * (holders.index + 1))
        self._state: dict[str, Array] = {}
        self._slots: dict[str, list[torch.Tensor]] = {}  # of the state
        self.shards = Shards([self.array[self._own]], {}, statistics, self.gather)

    def gather(self) -> None:
        """Give all holders everyone's shards, of the parameters and of the state that has joined."""
        for array in (self.array, *self._state.values()):
            self._holders.all_gather(array[self._own], array, self._counts)

    def state_names(self, optimizer: torch.optim.Optimizer) -> list[str]:
        """Return the names of the optimizer's arrays that are like parameters."""
        states = outline(optimizer, self.tensors)
        return list(dict.fromkeys(name for state in states for name, value in state.items() if value is ...))

    def join_state(self, optimizer: torch.optim.Optimizer, names: Iterable[str]) -> None:
        """Let the optimizer's arrays of these names lie in flat arrays, too; zeros where it has none yet."""
        for name in names:
            if name not in self._state:
                self._state[name] = np.zeros(self._size, self._kind)
                self._slots[name] = slots(self._state[name], self.tensors)
                self.shards.optimizer[name] = [self._state[name][self._own]]  # type: ignore[index]
        self.take_state(optimizer)

    def take_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Move what the optimizer has made since the last call of the arrays that have joined to their places."""
        for name, places in self._slots.items():
            for tensor, slot in zip(self.tensors, places, strict=True):
                value = optimizer.state.get(tensor, {}).get(name)
                if value is not slot and is_like(value, tensor):
                    slot.copy_(value)
                    optimizer.state[tensor][name] = slot

    def set_state(self, optimizer: torch.optim.Optimizer, states: Sequence[dict[str, Any]]) -> None:
        """Let the optimizer's state be as in an `outline`, whose arrays have joined and have their values already."""
        for number, (tensor, state) in enumerate(zip(self.tensors, states, strict=True)):
            optimizer.state.pop(tensor, None)
            if state:
                optimizer.state[tensor] = {
                    name: self._slots[name][number] if value is ... else value for name, value in state.items()
                }
