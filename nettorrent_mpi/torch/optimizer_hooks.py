"""Hooks around an optimizer's step: gradients are final before it, and replicas exchange before and after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from nettorrent_mpi.plan.errors import UserError
from nettorrent_mpi.torch.gradients import GradientAverage
from nettorrent_mpi.torch.step_exchange import StepExchange


class OptimizerHooks:
    """OptimizerHooks let each step of the script's optimizer take part in what the ranks do together.

    `parameters` are the model's, by name, which must stay the same objects. `replicas` is the exchange with other
    replicas, where there are any, and `done` tells which part of the run is complete after so many rounds of it.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        parameters: Mapping[str, torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
        average: GradientAverage,
        replicas: StepExchange | None,
        done: Callable[[int], float],
    ):
        self.step = 0  # optimizer steps so far; fewer than on other ranks where this replica alone skips some
        self._model, self._parameters = model, parameters
        self._average, self._replicas, self._done = average, replicas, done
        self._where = {id(p): (p.data_ptr(), p.dtype) for p in parameters.values()}
        self._factors: list[float] | None = None
        self._hooks: list[Any] = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        if replicas is not None:
            trained = (p for p in parameters.values() if p.requires_grad)
            self._hooks += [p.register_post_accumulate_grad_hook(lambda _: replicas.progress()) for p in trained]

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Meet the others before the optimizer updates: if its step has a closure, once that has made gradients."""
        self.check_parameters()
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._before_update(optimizer)
            return None
        evaluations = 0

        def evaluated() -> Any:
            nonlocal evaluations
            loss, evaluations = closure(), evaluations + 1
            if isinstance(optimizer, torch.optim.LBFGS):  # which compares the losses of several evaluations
                loss = self._average.mean(float(torch.as_tensor(loss).detach()))
            if evaluations == 1:
                self._before_update(optimizer)
            return loss

        if "closure" in kwargs:
            return args, kwargs | {"closure": evaluated}
        return (args[0], evaluated, *args[2:]), kwargs

    def _before_update(self, optimizer: torch.optim.Optimizer) -> None:
        self._average.before_step()
        if self._replicas is None:
            return
        self._replicas.done = self._done(self._replicas.step)
        factor = self._replicas.before_step()
        if factor != 1:
            self._factors = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * factor

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self._replicas is not None:
            self._replicas.after_step()
        if self._factors is not None:
            for group, rate in zip(optimizer.param_groups, self._factors, strict=True):
                group["lr"] = rate
            self._factors = None
        self.step += 1

    def check_parameters(self) -> None:
        """Raise an error if parameters are no longer those that were parallelized: they would train apart."""
        found = list(self._model.parameters())
        if len(found) != len(self._where) or any(id(p) not in self._where for p in found):
            names = [name for name, p in self._model.named_parameters() if id(p) not in self._where]
            gone = [name for name in self._parameters if name not in dict(self._model.named_parameters())]
            told = f"{names[0]} is new in the model" if names else f"{gone[0]} is gone from the model"
            raise UserError(f"{told} since parallelize: call parallelize after the model is complete and on its device")
        for name, parameter in self._parameters.items():
            address, kind = self._where[id(parameter)]
            if parameter.dtype != kind:
                raise UserError(
                    f"{name} was {kind} at parallelize and is {parameter.dtype}: convert the model before parallelize"
                )
            if self._replicas is not None and parameter.data_ptr() != address:
                raise UserError(
                    f"{name} has got other memory since parallelize, which replicas would not exchange: change "
                    "parameters in place (p.copy_(...) under torch.no_grad()), or replace them before parallelize"
                )

    def remove(self) -> None:
        """Let the optimizer and the parameters go."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
