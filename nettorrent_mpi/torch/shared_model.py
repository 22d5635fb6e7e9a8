"""A model that all ranks start with, and the average of what they have made of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch

from nettorrent_mpi.comm.activity import NOW
from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.comm.world import World
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.torch.models import broadcast
from nettorrent_mpi.torch.slots import carrier
from nettorrent_mpi.torch.step_exchange import StepExchange


class SharedModel:
    """A SharedModel gives all ranks of `world` rank 0's parameters and buffers, and later the average of all. Replicas
    that differ average their parameters by `replicas`, which is set once it is made."""

    def __init__(self, world: World, model: torch.nn.Module, parameters: Mapping[str, torch.nn.Parameter]):
        self._world, self._model, self._parameters = world, model, parameters
        self.replicas: StepExchange | None = None
        with torch.no_grad():
            for tensor in {**parameters, **dict(model.named_buffers())}.values():
                broadcast(world, tensor, 0)

    def statistics(self) -> list[Array]:
        """Return the buffers that a mean is defined for, as arrays: running means and variances."""
        return [
            buffer.detach().numpy()
            for buffer in self._model.buffers()
            if buffer.is_floating_point() and buffer.dim() and carrier(buffer.dtype) == str(buffer.dtype)[6:]
        ]

    @NOW.during("the replicas' average")
    def average(self) -> None:
        """Give all ranks the average of the replicas' parameters and of all ranks' buffers, for good."""
        if self.replicas is not None:
            self.replicas.become()
        self._mean_buffers()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Give all ranks the average inside the `with` block, and their own weights again afterwards."""
        with ExitStack() as stack:
            if self.replicas is not None:
                stack.enter_context(self.replicas.shown())
            kept = [buffer.clone() for buffer in self._model.buffers()]
            self._mean_buffers()
            yield
            with torch.no_grad():
                for buffer, copy in zip(self._model.buffers(), kept, strict=True):
                    buffer.copy_(copy)

    @NOW.during("the replicas' average")
    def _mean_buffers(self) -> None:
        if self._world.size > 1:
            for array in self.statistics():
                self._world.mean(array)

    def adopt(self, optimizer: torch.optim.Optimizer, holders: Group, source: int) -> None:
        """Give the ranks of a replica the weights and the optimizer's state of one of them."""
        states = [optimizer.state.get(p, {}) for p in self._parameters.values()]
        with torch.no_grad():
            for tensor in (*self._parameters.values(), *self._model.buffers()):
                broadcast(holders, tensor, source)
            for state in states:
                for value in state.values():
                    if isinstance(value, torch.Tensor):
                        broadcast(holders, value, source)
