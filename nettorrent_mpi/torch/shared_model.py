"""A model whose copies on all ranks agree: how they begin, train together, and become one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch

from nettorrent_mpi.comm.activity import NOW
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.plan.exchange_specs import Elite
from nettorrent_mpi.plan.scores import Scores, best_of
from nettorrent_mpi.torch.gradients import GradientAverage
from nettorrent_mpi.torch.models import broadcast, check_model, innermost
from nettorrent_mpi.torch.optimizer_hooks import OptimizerHooks
from nettorrent_mpi.torch.run_ranks import RunRanks
from nettorrent_mpi.torch.slots import carrier
from nettorrent_mpi.torch.split_layers import split_parameters
from nettorrent_mpi.torch.step_exchange import StepExchange


class SharedModel:
    """A SharedModel gives all ranks rank 0's parameters and buffers. From then on backward passes average the gradients
    over the ranks of a replica (`gradients`), and the steps of `optimizer` exchange with other replicas (`replicas`,
    where there are any); later it gives all ranks the average of what they have.

    All ranks make one and call its methods alike. `done` returns the completed part of the run after so many steps of
    the exchange. `by_hand`: rounds are opened apart from steps. Raises UserErrors on all ranks alike.
    """

    def __init__(
        self,
        ranks: RunRanks,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        done: Callable[[int], float],
        *,
        seed: int,
        by_hand: bool = False,
    ):
        self._ranks, self.model, world = ranks, model, ranks.world
        with world.agreement():
            self.optimizer = optimizer = innermost(optimizer)
            self._parameters = dict(model.named_parameters())
            check_model(model, self._parameters, optimizer, exchanged=ranks.peers.size > 1)
        # Averages of different parts of a layer would mean nothing.
        parts = [(name, d.total, d.ranks.size, d.ranks.index) for name, d in split_parameters(model).items()]
        world.same("part of the split layers", str(parts))
        world.same("model", "; ".join(f"{name} {tuple(p.shape)} {p.dtype}" for name, p in self._parameters.items()))
        with torch.no_grad():
            for tensor in {**self._parameters, **dict(model.named_buffers())}.values():
                broadcast(world, tensor, 0)
        trained = {name: p for name, p in self._parameters.items() if p.requires_grad}
        self.gradients = GradientAverage(world, ranks.holders, trained, may_join=ranks.peers.size == 1)
        self.replicas: StepExchange | None = None
        if ranks.peers.size > 1:
            self.replicas = StepExchange(
                ranks.spec,
                trained,
                self._statistics(),
                optimizer,
                ranks.peers,
                ranks.holders,
                seed=seed,
                by_hand=by_hand,
            )
        self._hooks = OptimizerHooks(model, self._parameters, optimizer, self.gradients, self.replicas, done)

    @property
    def step(self) -> int:
        """Return the optimizer's steps so far; fewer than on other ranks where this replica alone skips some."""
        return self._hooks.step

    @step.setter
    def step(self, step: int) -> None:
        self._hooks.step = self.gradients.steps = step

    # -- replicas that differ -----------------------------------------------------------------------------------------

    def catch_up(self) -> None:
        """Let replicas that have done fewer steps than others make up for the exchanges. All ranks call."""
        if self.replicas is not None:
            self.replicas.catch_up()

    @NOW.during("the end of an epoch")
    def end_epoch(self) -> None:
        """Take part in what others still do of the epoch, and let all that average exactly have done as many steps."""
        self.gradients.join()
        self._adopt_furthest()
        self.catch_up()

    def _adopt_furthest(self) -> None:
        """Give the ranks of a replica the weights and the optimizer's state of the one that has done the most steps."""
        holders = self._ranks.holders
        steps = holders.gather_objects(self.step)
        if len(set(steps)) == 1:
            return
        source = steps.index(max(steps))
        states = [self.optimizer.state.get(p, {}) for p in self._parameters.values()]
        with torch.no_grad():
            for tensor in (*self._parameters.values(), *self.model.buffers()):
                broadcast(holders, tensor, source)
            for state in states:
                for value in state.values():
                    if isinstance(value, torch.Tensor):
                        broadcast(holders, value, source)
        self.step = max(steps)

    def open_round(self, loss: float) -> None:
        """Send this replica's parameters, age and loss to a peer, where rounds are opened by hand."""
        self._hooks.check_parameters()
        if self.replicas is not None:
            self.replicas.open_round(loss)

    def close_round(self, loss: float) -> None:
        """Merge what a peer has sent since `open_round`; this replica's loss now is `loss`."""
        if self.replicas is not None:
            self.replicas.close_round(loss)

    def judge(self, value: float) -> int:
        """Compare the replicas by the mean of `value` over their ranks, as the elite exchange does: losers take over
        the weights of winners. Return the best replica's number."""
        spec = self._ranks.spec
        assert isinstance(spec, Elite)
        assert self.replicas is not None
        mine = self._ranks.holders.gather_objects(value)
        score, accuracy = sum(mine) / len(mine), spec.metric == "validation_accuracy"
        own = Scores(0.0 if accuracy and np.isfinite(score) else score, score if accuracy else None)
        found = self._ranks.peers.gather_objects(own)
        self.replicas.judge(found)
        return best_of(found, spec.metric)

    # -- the average --------------------------------------------------------------------------------------------------

    def _statistics(self) -> list[Array]:
        """Return the buffers that a mean is defined for, as arrays: running means and variances."""
        return [
            buffer.detach().numpy()
            for buffer in self.model.buffers()
            if buffer.is_floating_point() and buffer.dim() and carrier(buffer.dtype) == str(buffer.dtype)[6:]
        ]

    @NOW.during("the replicas' average")
    def average(self) -> None:
        """Give all ranks the average of the replicas' parameters and of all ranks' buffers, for good."""
        self.catch_up()
        if self.replicas is not None:
            self.replicas.become()
        self._mean_buffers()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Give all ranks the average inside the `with` block, and their own weights again afterwards."""
        self.catch_up()
        with ExitStack() as stack:
            if self.replicas is not None:
                stack.enter_context(self.replicas.shown())
            kept = [buffer.clone() for buffer in self.model.buffers()]
            self._mean_buffers()
            yield
            with torch.no_grad():
                for buffer, copy in zip(self.model.buffers(), kept, strict=True):
                    buffer.copy_(copy)

    @NOW.during("the replicas' average")
    def _mean_buffers(self) -> None:
        if self._ranks.world.size > 1:
            for array in self._statistics():
                self._ranks.world.mean(array)

    def close(self) -> None:
        """Let the model and the optimizer go: they are plain PyTorch again. All ranks call."""
        self._hooks.remove()
        if self.replicas is not None:
            self.replicas.catch_up()
            self.replicas.close()
        self.gradients.close()
