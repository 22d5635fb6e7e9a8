"""The function `split` divides layers of a model over ranks; what looks at whole gradients and states knows of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nettorrent_mpi.plan.errors import LaunchError, UserError, listed
from nettorrent_mpi.torch.split_layers import SPLIT_CLASSES, SplitLayer, ranks_of, refusal, split_parameters
from nettorrent_mpi.torch.split_tensors import Division, SplitRanks

WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")


def split(
    model: nn.Module, layers: Mapping[str, str], comm: Any = None, *, same_random: bool = True, check: bool = True
) -> nn.Module:
    """Divide layers of `model` over the ranks, by their outputs ("out") or inputs ("in"); return the same model.

        nt.split(model, {"fc1": "out", "fc2": "in", "conv*": "out"})

    `layers` are patterns over the names of modules, in which * matches dots, too; torch.nn.Linear and torch.nn.Conv2d
    can be divided, in any sizes, over any number of ranks. Modules and parameters stay the same objects, so an
    optimizer may be made before; a layer becomes a SplitLinear or a SplitConv2d. From now on all ranks call the model
    with the same inputs, and backward, state_dict and optimizer alike; they get the same outputs, gradients of their
    parts, and whole arrays in a state_dict. All ranks start with rank 0's parameters and buffers.

    Optimizers that work element by element (SGD, Adam, ...) are exact as they are. What looks at a whole gradient sees
    a part: clip by `clip_grad_norm_` of this package, let an optimizer's checkpoint be whole by `whole_state`, and use
    no GradScaler (autocast to bfloat16 needs none) and no optimizer with norms of layers (LAMB, Muon, ...). Values are
    set before, or inside `with whole(model):`. torch.compile breaks its graph at each exchange: without fullgraph=True.

    comm: a Group or a communicator of mpi4py; by default all ranks of the program. In a process that no launcher
    started the model stays as it is.
    same_random: all ranks draw rank 0's random numbers from now on: dropout needs the same ones. With False, call
    torch.manual_seed alike.
    check: ranks compare the shapes and some values of each layer's inputs and gradients, so that ranks that do not do
    the same raise an error instead of waiting for ever or training on nonsense.

    Raises UserErrors on all ranks alike, and then leaves the model as it was.
    """
    ranks = ranks_of(comm)
    try:
        with ranks.world.agreement():
            chosen = _chosen(model, layers)
        _compare(ranks, model, [*(f"{name}: {way}" for name, (_, way) in chosen.items()), f"{same_random=} {check=}"])
    except UserError:
        if comm is not None and comm is not ranks:
            ranks.close()
        raise
    if ranks.size == 1:
        return model
    ranks.check = check
    divided = {id(parameter) for module, _ in chosen.values() for parameter in module.parameters()}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in divided:  # the layer does it
            ranks.broadcast(tensor)
    for name, (module, way) in chosen.items():
        label = f"{name} ({type(module).__name__})" if name else type(module).__name__
        module.__class__ = SPLIT_CLASSES[type(module)]
        module.divide(way, ranks, label)
    if same_random:
        state = torch.get_rng_state()
        ranks.broadcast(state)
        torch.set_rng_state(state)
    return model


def _chosen(model: nn.Module, layers: Mapping[str, str]) -> dict[str, tuple[Any, str]]:
    """Return the modules that `layers` choose by their first names, with the way in which each is to be split."""
    modules = dict(model.named_modules(remove_duplicate=False))
    candidates = [name for name, module in modules.items() if type(module) in SPLIT_CLASSES]
    wrapper = next((type(module).__name__ for module in modules.values() if type(module).__name__ in WRAPPERS), None)
    if wrapper is not None:
        raise UserError(
            f"the model is in a {wrapper}, which has its own copies of the parameters' places: split it before"
        )
    lazy = next((name for name, p in model.named_parameters() if nn.parameter.is_lazy(p)), None)
    if lazy is not None:
        raise UserError(f"split: {lazy} has no shape yet: call the model once before")
    shared = _shared(modules)
    mistakes = []
    chosen: dict[str, tuple[Any, str]] = {}
    names: dict[int, str] = {}
    for pattern, way in layers.items():
        matched = [name for name in modules if fnmatchcase(name, pattern)]
        found = [name for name in matched if isinstance(modules[name], tuple(SPLIT_CLASSES))]
        if not found:
            kinds = sorted({type(modules[name]).__name__ for name in matched})
            but = f"matches {listed(kinds)} only" if kinds else "matches no module"
            mistakes.append(f"{pattern!r} {but}; layers that can be split: {listed(candidates) or 'none'}")
        for name in found:
            module = modules[name]
            first = names.setdefault(id(module), name)
            if first in chosen and chosen[first][1] != way:
                mistakes.append(f"{name!r} is to be split by {chosen[first][1]!r} and by {way!r}")
            elif first not in chosen:
                reason = _reason(module, way, shared)
                mistakes += [f"{name!r} {reason}"] if reason else []
                chosen[first] = module, way
    if mistakes:
        raise UserError("split: " + "; ".join(mistakes))
    return chosen


def _reason(module: Any, way: str, shared: Mapping[int, list[str]]) -> str | None:
    """Return why this layer cannot be split so, None if it can."""
    if isinstance(module, SplitLayer):
        return "is split already"
    kind = type(module)
    if kind not in SPLIT_CLASSES:
        return f"is a {kind.__name__}, whose owner may use its weight in another way than a plain layer"
    parameters = dict(module.named_parameters(recurse=False))
    if set(parameters) - {"bias"} != {"weight"} or list(module.buffers()):
        return (
            f"has the parameters and buffers {listed([*parameters, *dict(module.named_buffers())])}, not its own only"
        )
    for name, parameter in parameters.items():
        if type(parameter) is not nn.Parameter or type(parameter.data) is not Tensor:
            return f"has a {name} of {type(parameter.data).__name__}, which is divided already"
        if len(shared[_memory(parameter)]) > 1:
            return f"shares memory of its {name}: {listed(shared[_memory(parameter)])}; tied weights are not split"
        if parameter.grad is not None:
            return f"has a gradient of its {name}: call optimizer.zero_grad() before"
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks or _in_use(parameter):
            return (
                f"has a {name} that hooks or a living graph refer to: split before hooks are set on parameters (as by "
                "parallelize), and delete losses of earlier steps"
            )
    return refusal(module, way)


def _shared(modules: Mapping[str, nn.Module]) -> dict[int, list[str]]:
    """Return by the memory that they lie in the names of all parameters; a module of several names counts once."""
    found, seen = defaultdict(list), set()
    for prefix, module in modules.items():
        if id(module) not in seen:
            seen.add(id(module))
            for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                found[_memory(parameter)].append(f"{prefix}.{name}" if prefix else name)
    return found


def _memory(parameter: Tensor) -> int:
    if type(parameter.data) is not Tensor or parameter.layout != torch.strided:
        return id(parameter)
    storage = parameter.untyped_storage()
    return storage.data_ptr() if storage.nbytes() and storage.data_ptr() else id(parameter)


def _in_use(parameter: nn.Parameter) -> bool:
    """Whether autograd keeps a node for this parameter, which would go on asking for gradients of the old shape."""
    if not parameter.requires_grad:
        return False
    whole = parameter.data
    parameter.data = whole.new_empty(0)
    with torch.enable_grad():
        node = parameter.view(0).grad_fn.next_functions[0][0]
    shape = node._input_metadata[0].shape
    parameter.data = whole
    return tuple(shape) != (0,)


def _compare(ranks: SplitRanks, model: nn.Module, chosen: Iterable[str]) -> None:
    """Raise a LaunchError on all ranks unless all have the same model and split it alike."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    lines = [f"{name} {list(t.shape)} {t.dtype} on {t.device}, requires_grad={t.requires_grad}" for name, t in tensors]
    lines += chosen
    everyone = ranks.world.gather_objects(lines)
    for rank, theirs in enumerate(everyone):
        if theirs != everyone[0]:
            pairs = zip([*everyone[0], "nothing"], [*theirs, "nothing"], strict=False)
            first, other = next(pair for pair in pairs if pair[0] != pair[1])
            error = LaunchError(f"split: rank {rank} has another model than rank 0: {other}, where rank 0 has {first}")
            ranks.raise_on_all(error)
    if any(tensor.device.type != "cpu" for _, tensor in tensors):
        name, device = next((name, tensor.device) for name, tensor in tensors if tensor.device.type != "cpu")
        ranks.raise_on_all(UserError(f"split: {name} is on {device}: split layers exchange in the host's memory only"))


def _places(model: nn.Module) -> dict[int, Division]:
    """Return by its identity how each divided parameter is divided."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {id(parameters[name]): division for name, division in split_parameters(model).items()}


def clip_grad_norm_(model: nn.Module, max_norm: float, norm_type: float = 2.0) -> Tensor:
    """Clip the gradients of a model with split layers as torch.nn.utils.clip_grad_norm_ does those of the whole model;
    return the norm of all gradients. All ranks call."""
    places = _places(model)
    mine: dict[SplitRanks, list[Tensor]] = {division.ranks: [] for division in places.values()}
    alike: list[Tensor] = []
    for parameter in model.parameters():
        if parameter.grad is not None and parameter.grad.numel():  # an empty one has no greatest element
            (mine[places[id(parameter)].ranks] if id(parameter) in places else alike).append(parameter.grad)
    total = float(nn.utils.get_total_norm(alike, norm_type))
    for ranks, grads in mine.items():
        ranks.meet("clipping of gradients")
        own = np.array([float(nn.utils.get_total_norm(grads, norm_type))])
        if np.isinf(norm_type):
            ranks.world.maximum(own)
            total = max(total, float(own[0]))
        else:
            own **= norm_type
            ranks.world.all_reduce(own)
            total = (total**norm_type + float(own[0])) ** (1 / norm_type)
    dtype = next((parameter.grad.dtype for parameter in model.parameters() if parameter.grad is not None), None)
    norm = torch.tensor(total, dtype=dtype)
    nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
    return norm


def whole_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Let optimizer.state_dict() have whole arrays for the divided parameters of `model`, so that it fits any number of
    ranks and the undivided model, and load_state_dict() take them. state_dict() is then collective: all ranks call."""
    places = _places(model)

    def moved(optimizer: torch.optim.Optimizer, state: dict[str, Any], gather: bool) -> dict[str, Any]:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        numbers = [number for group in state["param_groups"] for number in group["params"]]
        made = dict(state["state"])
        for number, parameter in zip(numbers, parameters, strict=True):
            division = places.get(id(parameter))
            if division is None or number not in made:
                continue
            values = made[number] = dict(made[number])
            shape = parameter.shape if gather else division.shape(parameter)
            for key in sorted(
                key for key, value in values.items() if isinstance(value, Tensor) and value.shape == shape
            ):
                if gather:
                    division.ranks.meet(f"state_dict of the optimizer: {key} of parameter {number}")
                values[key] = division.whole(values[key]) if gather else division.part(values[key])
        return {**state, "state": made}

    optimizer.register_state_dict_post_hook(lambda optimizer, state: moved(optimizer, state, gather=True))
    optimizer.register_load_state_dict_pre_hook(lambda optimizer, state: moved(optimizer, state, gather=False))
