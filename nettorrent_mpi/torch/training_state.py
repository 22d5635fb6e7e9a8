"""The training state of a PyTorch run in checkpoints, from which any number of ranks goes on.

A checkpoint is a folder as engine/checkpoint_folder.py writes it, with arrays of these names, whatever wrote them:

    parameters/<name>, buffers/<name>, optimizer/<state>/<name>     whole arrays; of replicas that differ, the average
    replicas/<replica>/...                                          the same, of each replica
    ranks/<rank>/...                                                random states, and what an exchange keeps

Nothing is pickled: types without an own one in these files are the same bits as 16-bit numbers, and what is no tensor
is JSON.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nettorrent_mpi.comm.world import World
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.engine.checkpoint import find_checkpoint
from nettorrent_mpi.engine.checkpoint_folder import checkpoints_in, complete, name_of, tidy, write_blocks
from nettorrent_mpi.engine.checkpoint_manifest import Manifest
from nettorrent_mpi.engine.checkpoint_shards import read_blocks
from nettorrent_mpi.plan.errors import DataError, UserError
from nettorrent_mpi.plan.moves import Holding, whole
from nettorrent_mpi.torch.step_exchange import StepExchange

_PLAIN = ("float32", "float64")  # types that arrays of a checkpoint have themselves


class TrainingState:
    """A TrainingState writes and reads the state of a model, its optimizer and the exchange between replicas.

    All ranks of `world` make one: those of `holders` hold the same `replica` of `replicas`.
    """

    def __init__(
        self,
        world: World,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        exchange: StepExchange | None,
        *,
        replica: int,
        replicas: int,
    ):
        self._world, self._model, self._optimizer, self._exchange = world, model, optimizer, exchange
        self._replica, self._replicas = replica, replicas
        self._holders, self._index = world.size // replicas, world.rank % (world.size // replicas)

    # -- writing ----------------------------------------------------------------------------------------------------

    def save(self, folder: Path, step: int, about: Mapping[str, Any], others: Mapping[str, Any], keep: int) -> Path:
        """Write a checkpoint of this step into `folder`, and keep the `keep` newest. All ranks call, after the same
        step. Raises OutputError on all of them, and a UserError for what cannot be written without pickling.

        `about` are numbers of the run, among them the `rounds` of the exchange so far; `others` are objects with a
        state_dict, by name.
        """
        with self._world.agreement():
            text = json.dumps({
                **about,
                "ranks": self._world.size, "replicas": self._replicas, "tensors": self._tensors(),
                "optimizer": _optimizer_text(self._optimizer, self._names()),
                "others": {name: _jsonable(f"{name}.state_dict()", each.state_dict()) for name, each in others.items()},
            })  # fmt: skip
        blocks = self._own_blocks()
        part = folder / f"{name_of(step)}.tmp"
        with self._world.agreement():
            if self._world.rank == 0:
                tidy(folder)
        with self._world.agreement():
            write_blocks(part, self._world.rank, blocks)
        with self._world.agreement():
            if self._world.rank == 0:
                attributes: dict[str, str | int | float] = {
                    "step": step,
                    "samples": int(about["samples"]),
                    "time": time.time(),
                    "config": text,
                }
                complete(part, range(self._world.size), attributes, keep)
        return folder / name_of(step)

    def _own_blocks(self) -> dict[Holding, Array]:
        """Return what this rank writes."""
        found: dict[str, Array] = {}
        if self._exchange is None:
            found |= {f"{name}": array for name, array in self._mine()}
        else:
            with self._exchange.paused(), self._exchange.shown():
                if self._replica == 0:
                    found |= dict(self._mine(copied=True))
            found |= {f"replicas/{self._replica}/{name}": array for name, array in self._mine()}
            found |= {f"ranks/{self._world.rank}/{name}": a for name, a in self._exchange.memories().items()}
        found |= {f"ranks/{self._world.rank}/{name}": array for name, array in _random_state().items()}
        return {Holding(name, whole(array.shape)): array for name, array in found.items()}

    def _mine(self, *, copied: bool = False) -> Iterator[tuple[str, Array]]:
        """Yield the arrays of the replica that this one of its ranks writes, and their names."""
        for number, (name, tensor) in enumerate(self._state().items()):
            if number % self._holders == self._index:
                array = _written(tensor)
                yield name, array.copy() if copied else array

    def _names(self) -> dict[int, str]:
        return {id(parameter): name for name, parameter in self._model.named_parameters()}

    def _state(self) -> dict[str, torch.Tensor]:
        """Return all tensors of the replica, by their names in a checkpoint."""
        found = {f"parameters/{name}": p.detach() for name, p in self._model.named_parameters()}
        found |= {f"buffers/{name}": buffer for name, buffer in self._model.named_buffers()}
        for name, parameter in self._model.named_parameters():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor):
                    found[f"optimizer/{key}/{name}"] = value.detach()
        return found

    def _tensors(self) -> dict[str, list[Any]]:
        """Return type and shape of each tensor of the replica."""
        return {name: [str(t.dtype)[6:], list(t.shape)] for name, t in self._state().items()}

    # -- reading ----------------------------------------------------------------------------------------------------

    def has_checkpoint(self, folder: Path) -> bool:
        """Whether there is a checkpoint in `folder`, the same answer on all ranks."""
        return self._world.once(lambda: bool(checkpoints_in(folder)))

    def restore(self, folder: Path, others: Mapping[str, Any]) -> dict[str, Any]:
        """Go on from the newest undamaged checkpoint in `folder`, of any number of ranks and replicas; return what was
        `about` it. All ranks call. Raises DataError on all of them, before anything changes."""
        path, manifest = find_checkpoint(self._world, folder)
        with self._world.agreement():
            told = _told(manifest, path)
            self._check(told, path, others)
            alike = (told["ranks"], told["replicas"]) == (self._world.size, self._replicas)
            prefix = f"replicas/{self._replica}/" if alike and self._replicas > 1 else ""
            tensors = {
                name: torch.empty(shape, dtype=getattr(torch, kind)) for name, (kind, shape) in told["tensors"].items()
            }
            _read(path, manifest, prefix, tensors)
            with torch.no_grad():
                for name, tensor in self._state().items():
                    if not name.startswith("optimizer/"):
                        tensor.copy_(tensors[name])
            self._restore_optimizer(told["optimizer"], tensors)
            for name, each in others.items():
                each.load_state_dict(told["others"][name])
        own = f"ranks/{self._world.rank}/"
        if self._exchange is not None:
            self._exchange.restore(
                told["rounds"],
                (lambda wanted: _read_arrays(path, manifest, own, wanted)) if alike else None,
            )
        if alike:
            _restore_random_state(lambda wanted: _read_arrays(path, manifest, own, wanted))
        return dict(told)

    def _check(self, told: Mapping[str, Any], path: Path, others: Mapping[str, Any]) -> None:
        tensors = told["tensors"]
        for name, (kind, shape) in self._tensors().items():
            found = tensors.get(name)
            if name.startswith("optimizer/"):
                continue
            if found is None:
                raise DataError(f"has no {name}; is it another model's?", file=str(path))
            if found != [kind, shape]:
                raise DataError(
                    f"{name} is {found[0]} of shape {tuple(found[1])}, and the model's {kind} of shape {tuple(shape)}; "
                    "is it another model's?",
                    file=str(path),
                )
        kind = type(self._optimizer).__name__
        if told["optimizer"]["kind"] != kind:
            text = f"was made with the optimizer {told['optimizer']['kind']}, and this is {kind}"
            raise DataError(text, file=str(path))
        if len(told["optimizer"]["groups"]) != len(self._optimizer.param_groups):
            raise DataError("has another number of the optimizer's parameter groups", file=str(path))
        missing = [name for name in others if name not in told["others"]]
        if missing:
            raise DataError(f"has no state of {missing[0]}: give it to checkpoint(), too", file=str(path))

    def _restore_optimizer(self, told: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        numbers: dict[str, int] = {}
        names, groups = self._names(), []
        for group, options in zip(self._optimizer.param_groups, told["groups"], strict=True):
            for parameter in group["params"]:
                numbers[names[id(parameter)]] = len(numbers)
            groups.append({**options, "params": [numbers[names[id(p)]] for p in group["params"]]})
        state: dict[int, dict[str, Any]] = {}
        for name, values in told["values"].items():
            state.setdefault(numbers[name], {}).update(values)
        for name, tensor in tensors.items():
            if name.startswith("optimizer/"):
                _, key, parameter_name = name.split("/", 2)
                state.setdefault(numbers[parameter_name], {})[key] = tensor
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})


def _told(manifest: Manifest, path: Path) -> dict[str, Any]:
    try:
        told = json.loads(str(manifest.attributes["config"]))
    except ValueError:
        told = None
    if (
        not isinstance(told, dict)
        or not {"tensors", "optimizer", "others", "ranks", "replicas", "rounds"} <= told.keys()
    ):
        raise DataError("is no checkpoint of a PyTorch run", file=str(path))
    return told


def _written(tensor: torch.Tensor) -> Array:
    """Return a tensor's values in a type that a checkpoint has: the same, or its bits."""
    whole_ = tensor.detach().contiguous()
    if str(whole_.dtype)[6:] in _PLAIN:
        return np.asarray(whole_.numpy())
    found: Array = _bits(whole_).numpy()
    return found


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bits of a contiguous tensor as 16-bit numbers; an odd last byte gets a companion."""
    flat = tensor.reshape(-1).view(torch.uint8)
    if flat.numel() % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    return flat.view(torch.uint16)


def _read(path: Path, manifest: Manifest, prefix: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Fill contiguous tensors with the values of their arrays."""
    arrays = {name: _written(tensor) for name, tensor in tensors.items()}
    _read_arrays(path, manifest, prefix, arrays)
    for name, tensor in tensors.items():
        if str(tensor.dtype)[6:] not in _PLAIN:
            size = tensor.numel() * tensor.element_size()
            read = torch.from_numpy(arrays[name]).view(torch.uint8)[:size].clone()
            tensor.copy_(read.view(tensor.dtype).reshape(tensor.shape))


def _read_arrays(path: Path, manifest: Manifest, prefix: str, wanted: Mapping[str, Array]) -> None:
    """Fill arrays with those of the checkpoint. Raises DataError for one that it lacks, or that has another shape."""
    for name, array in wanted.items():
        saved = manifest.arrays.get(prefix + name)
        if saved is None or saved.shape != array.shape:
            raise DataError(f"has no array {prefix}{name} of shape {array.shape}", file=str(path))
    read_blocks(path, manifest, prefix, {Holding(name, whole(a.shape)): a for name, a in wanted.items()})


def _optimizer_text(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, Any]:
    """Return what an optimizer keeps besides tensors: the options of its groups, and other values."""
    groups = [
        {key: _jsonable(f"the optimizer's {key}", value) for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    values = {
        names[id(parameter)]: {
            key: _jsonable(f"the optimizer's {key}", value)
            for key, value in state.items()
            if not isinstance(value, torch.Tensor)
        }
        for parameter, state in optimizer.state.items()
    }
    return {"kind": type(optimizer).__name__, "groups": groups, "values": values}


def _jsonable(what: str, value: Any) -> Any:
    """Return a value that JSON can hold. Raises UserError."""
    if isinstance(value, torch.Tensor) and not value.dim():
        return value.item()
    try:
        json.dumps(value)
    except TypeError:
        raise UserError(
            f"{what} is {value!r}, which a checkpoint cannot hold: it has numbers, texts and lists"
        ) from None
    return value


def _random_state() -> dict[str, Array]:
    """Return the states of PyTorch's, NumPy's and Python's random numbers."""
    _, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    _, words, next_gauss = random.getstate()
    numbers = np.array([position, has_gauss, gauss, next_gauss is not None, next_gauss or 0.0], np.float64)
    return {
        "random/torch": np.asarray(_bits(torch.get_rng_state()).numpy()),
        "random/numpy": np.asarray(keys).view(np.uint16),
        "random/python": np.array(words, np.uint32).view(np.uint16),
        "random/numbers": numbers,
    }


def _restore_random_state(read: Any) -> None:
    states = _random_state()
    read(states)
    torch.set_rng_state(torch.from_numpy(states["random/torch"]).view(torch.uint8))
    position, has_gauss, gauss, has_next, next_gauss = states["random/numbers"].tolist()
    np.random.set_state(("MT19937", states["random/numpy"].view(np.uint32), int(position), int(has_gauss), gauss))  # noqa: NPY002
    words = tuple(int(word) for word in states["random/python"].view(np.uint32))
    random.setstate((3, words, next_gauss if has_next else None))
