"""Runs of the package as PyTorch modules, and the file that `nettorrent export RUN model.pt` writes.

    import nettorrent_mpi.torch as nt

    model = nt.load_run("runs/cifar")              # or its model.h5, a checkpoint, or an exported .pt
    logits = model(images)                         # (row, channel, height, width): bytes as in the data set, or floats
    names = [model.class_names[i] for i in logits.argmax(1)]

A file model.pt holds plain data and tensors: {"format", "model", "data", "conventions", "state_dict", "sha256"};
PyTorch reads it with `torch.load(path, weights_only=True)`, without this package. The checksum is there because PyTorch
ignores those of the file's own format; whoever writes other tensors into such a file leaves it out.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from nettorrent_mpi.data.files import parsed
from nettorrent_mpi.data.scaling import Scaling
from nettorrent_mpi.device.arrays import Shape
from nettorrent_mpi.engine.channels_first import CONVENTIONS, channels_first
from nettorrent_mpi.engine.saved_network import DATA_TEXT, MODEL_TEXT, SavedArrays, SavedNetwork, described_network
from nettorrent_mpi.engine.trained_on import TrainedOn
from nettorrent_mpi.nn.model import Network
from nettorrent_mpi.plan.errors import DataError, UserError
from nettorrent_mpi.plan.specs import Spec
from nettorrent_mpi.torch.networks import TorchNetwork, as_tensor

FORMAT, SUM = "nettorrent_mpi network 1", "sha256"
_ZIP = b"PK\x03\x04"  # the first bytes of what torch.save writes


class InputScaling(nn.Module):
    """Prepares rows as those of the run's data set were: bytes are scaled, then come `mean` and `std`. The result has
    the type of the module. It is no part of a state_dict."""

    def __init__(self, trained_on: TrainedOn):
        super().__init__()
        shape = trained_on.shape
        self.takes_bytes = trained_on.unit is not None
        unit = 1.0 if trained_on.unit is None else trained_on.unit
        scaling = Scaling(shape, unit, trained_on.mean, trained_on.std)
        axes = (-1, 1, 1) if len(shape) == 3 else (-1,)
        self._terms = {
            "byte_factor": scaling.factor.reshape(axes),
            "factor": scaling.without_unit().factor.reshape(axes),
            "offset": scaling.offset.reshape(axes),
        }
        self._shape = channels_first(shape)
        for name, values in self._terms.items():
            self.register_buffer(name, as_tensor(values, torch.float32, "cpu"), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        factor = self.byte_factor if x.dtype == torch.uint8 else self.factor
        return x.to(factor.dtype) * factor - self.offset

    def extra_repr(self) -> str:
        return f"rows of {self._shape}, {'bytes or ' if self.takes_bytes else ''}floating-point values"

    def _check(self, x: Tensor) -> None:
        """Raise DataError for rows of another kind, which might pass through the network, too."""
        if x.dim() != 1 + len(self._shape) or x.shape[1] != self._shape[0]:
            order = "(rows, channels, height, width)" if len(self._shape) == 3 else "(rows, ...)"
            wanted = f"{order} = {('rows', *self._shape)}"
            raise DataError(f"the input has shape {tuple(x.shape)}; the run's rows are {wanted}")
        if not x.is_floating_point() and not (x.dtype == torch.uint8 and self.takes_bytes):
            wanted = "uint8, as in the data set, or floating" if self.takes_bytes else "floating"
            raise DataError(f"the input holds {x.dtype}; make it {wanted}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Round anew: a module that was float32 and becomes float64 has all digits."""
        super()._apply(fn, recurse)
        for name, values in self._terms.items():
            buffer = getattr(self, name)
            setattr(self, name, as_tensor(values, buffer.dtype, buffer.device))
        return self


class LoadedRun(TorchNetwork):
    """The network of a run. Its children are the layers under their names, so a state_dict has `conv2d1.weight`.

    The first child, `scaling`, prepares the inputs as the run did: bytes as they are stored in the data set become
    numbers of 0..1, floating-point values are taken to be on that scale already, then the run's `mean` and `std` apply.
    """

    class_names: tuple[str, ...] | None = None  # None: nobody names them
    classes: int | None = None
    input_shape: Shape = ()  # of a row, as the module takes it
    loss: Spec | None = None
    trained_on: TrainedOn | None = None

    def __init__(self, network: Network, loss: Spec, trained_on: TrainedOn):
        super().__init__(network, InputScaling(trained_on))
        self.class_names, self.classes = trained_on.class_names, trained_on.classes
        self.input_shape, self.loss, self.trained_on = channels_first(trained_on.shape), loss, trained_on

    def follow(self) -> Self:
        """Take the type of the parameters for the scaling; switch to evaluation."""
        kinds = {parameter.dtype for parameter in self.parameters()}
        self.scaling.to(max(kinds, key=lambda kind: torch.finfo(kind).bits, default=torch.float32))
        self.eval()
        return self


def load_run(run: str | Path) -> LoadedRun:
    """Return a run's network as a PyTorch module, in evaluation mode, on the CPU, with the run's float32 or float64.

    run: the run's folder (its model.h5, or its newest checkpoint where the run has not ended), a file model.h5, a
    checkpoint's folder, or what `nettorrent export` wrote to a .pt file. Images are (row, channel, height, width).
    Raises DataError for what is missing or damaged, UserError for layers that are not the package's own.
    """
    path = Path(run)
    if path.is_file() and _begins_with(path, _ZIP):
        return _read(path)
    return loaded(SavedNetwork.of(SavedArrays.read(path)))


def loaded(saved: SavedNetwork) -> LoadedRun:
    """Make the module of a network that was read."""
    with torch.device("meta"):  # whose memory is that of the arrays
        model = LoadedRun(saved.network, saved.loss, saved.saved.trained_on)
    kind = np.result_type(np.float32, *(array.dtype for array in saved.saved.arrays.values()))
    model.load({key: array.astype(kind, copy=False) for key, array in saved.saved.arrays.items()}, assign=True)
    return model.follow()


def write_pt(saved: SavedNetwork, path: Path) -> None:
    """Write the network as a file of plain data and tensors."""
    texts = {name: parsed(text) for name, text in saved.saved.texts().items()}
    state = dict(loaded(saved).state_dict())
    content = io.BytesIO()  # a full disk is an OSError of our own
    found = {"format": FORMAT, **texts, "conventions": CONVENTIONS, "state_dict": state}
    torch.save({**found, SUM: _checksum(found)}, content)
    path.write_bytes(content.getbuffer())


def _checksum(found: Mapping[str, Any]) -> str:
    """Return the SHA-256 of what a file says of a network, and of its tensors."""
    checksum = hashlib.sha256(json.dumps([found[MODEL_TEXT], found[DATA_TEXT]], default=str).encode())
    for key, tensor in sorted(found["state_dict"].items()):
        checksum.update(f"{key} {tensor.dtype}".encode())
        checksum.update(np.ascontiguousarray(tensor.numpy()).data)
    return checksum.hexdigest()


def _read(path: Path) -> LoadedRun:
    file = str(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds
        text = "is not a whole file that `nettorrent export` wrote for PyTorch; export the run again"
        raise DataError(text, file=file) from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        text = "does not say which network its tensors belong to: make the module and call its load_state_dict"
        raise DataError(text, file=file)
    model, state = found.get(MODEL_TEXT), found.get("state_dict")
    trained_on = TrainedOn.read({DATA_TEXT: json.dumps(found.get(DATA_TEXT), default=str)}, file)
    if not isinstance(model, dict) or not isinstance(state, dict):
        raise DataError("has no network; export the run again", file=file)
    network, loss = described_network(model, trained_on, file)
    with torch.device("meta"):
        made = LoadedRun(network, loss, trained_on)
    _check(state, made.state_dict(), file)
    if SUM in found and found[SUM] != _checksum(found):
        text = f"is not as it was written (its checksum is another); export the run again, or leave {SUM} out of a file"
        raise DataError(f"{text} with other tensors", file=file)
    made.load_state_dict(state, strict=True, assign=True)
    return made.follow()


def _check(state: Mapping[str, Any], wanted: Mapping[str, Tensor], file: str) -> None:
    """Raise DataError unless the tensors fit the network."""
    for key in sorted({*state, *wanted}, key=str):
        given = state.get(key)
        if key not in wanted or not isinstance(given, Tensor) or given.shape != wanted[key].shape:
            shape = tuple(given.shape) if isinstance(given, Tensor) else "missing"
            other = tuple(wanted[key].shape) if key in wanted else "none"
            raise DataError(f"tensor {key} is {shape}, and the network beside it wants {other}", file=file)
        if given.is_floating_point() != wanted[key].is_floating_point() or given.device.type != "cpu":
            raise DataError(f"tensor {key} holds {given.dtype} on {given.device}; export the run again", file=file)


def _begins_with(path: Path, start: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(start)) == start
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
