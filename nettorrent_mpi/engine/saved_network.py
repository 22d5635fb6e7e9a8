"""A SavedNetwork is a network as files have it, for other programs: its layers, its arrays, and what it was trained on.

The same texts of JSON stand in all files of a network: `model` has the layers and the loss as in a configuration,
`data` what the inputs and the labels mean (engine/trained_on.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from nettorrent_mpi.config.sections import Model
from nettorrent_mpi.config.written import section
from nettorrent_mpi.data.files import parsed
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.engine.checkpoint import network_of, read_network
from nettorrent_mpi.engine.trained_on import ATTRIBUTE, TrainedOn
from nettorrent_mpi.nn.model import Network
from nettorrent_mpi.plan.errors import DataError, UserError
from nettorrent_mpi.plan.records import dataclass
from nettorrent_mpi.plan.specs import LAYERS, Spec

MODEL_TEXT, DATA_TEXT = "model", ATTRIBUTE  # the names of the texts
OWN = "nettorrent_mpi."  # the package's modules


@dataclass(frozen=True)
class SavedArrays:
    """SavedArrays are the arrays of a network, "<layer>/<name>", and the texts beside them: all that is needed where
    nobody computes with its layers, which may be of kinds that are not the package's."""

    file: str  # for messages
    arrays: Mapping[str, Array]
    trained_on: TrainedOn
    model: Mapping[str, Any]  # the parsed text

    @classmethod
    def read(cls, run: Path) -> Self:
        """Read a run folder, model.h5, a checkpoint or a folder of them. Raises DataError and OutputError."""
        place = network_of(run)
        arrays, attributes = read_network(place)
        if not arrays:
            raise DataError("holds no arrays; train again", file=str(run))
        trained_on = TrainedOn.read(attributes, str(run))
        return cls(str(run), arrays, trained_on, parsed_model(attributes.get(MODEL_TEXT), str(run)))

    def texts(self) -> dict[str, str]:
        """Return the texts that go into a file beside the arrays."""
        return {MODEL_TEXT: json.dumps(self.model), DATA_TEXT: self.trained_on.text()}


def parsed_model(text: Any, file: str) -> dict[str, Any]:
    """Parse the text of a network's layers and loss. Raises DataError."""
    try:
        found = parsed(text)
        if isinstance(found, dict) and isinstance(found["layers"], list) and "loss" in found:
            return found
    except (KeyError, TypeError, ValueError):
        pass
    raise DataError(f"does not say which layers it has ({MODEL_TEXT}): is it a file of nettorrent_mpi?", file=file)


@dataclass(frozen=True)
class SavedNetwork:
    """A SavedNetwork is a network with arrays that fit it."""

    network: Network
    loss: Spec
    saved: SavedArrays

    @classmethod
    def of(cls, saved: SavedArrays, *, for_others: bool = True) -> Self:
        """Make the network that the arrays belong to, `for_others` of the package's own layers alone. Raises UserError
        for other layers, and DataError if it cannot be read, or if the arrays are another network's."""
        network, loss = described_network(saved.model, saved.trained_on, saved.file, for_others=for_others)
        wanted = {key: parameter.shape for key, parameter in network.whole.parameters}
        found = {key: array.shape for key, array in saved.arrays.items()}
        if found != wanted:
            key = min(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
            text = f"array {key} has shape {found.get(key)}, and the network beside it wants {wanted.get(key)}"
            raise DataError(text.replace("has shape None", "is missing"), file=saved.file)
        return cls(network, loss, saved)


def described_network(
    model: Mapping[str, Any], trained_on: TrainedOn, file: str, *, for_others: bool = True
) -> tuple[Network, Spec]:
    """Make the network and the loss that the text of a file describes, `for_others` of the package's own layers alone.
    Raises UserError and DataError."""
    for kind in _kinds(model.get("layers")):
        if kind not in LAYERS and not for_others:
            raise UserError(f"{file}: nobody has registered its layer {kind}: import the module that does it, first")
        if for_others and (kind not in LAYERS or not LAYERS[kind].__module__.startswith(OWN)):
            raise UserError(
                f"{file}: its layer {kind} is not one of the package's, so its formulas are known to its author only: "
                "export the arrays to .npz or .h5, and write that layer anew where they are used"
            )
    try:
        read = section(Model, dict(model))
        return Network(read.layers, trained_on.shape), read.loss
    except UserError as error:
        raise DataError(f"its layers do not fit ({error}); restore a copy of it", file=file) from error
    except (ValueError, RecursionError) as error:  # of the configuration's checks
        raise DataError("its layers cannot be read; restore a copy of it", file=file) from error


def _kinds(layers: Any) -> Iterator[str]:
    """Yield the kinds of layers that are written, those inside of others included."""
    for layer in layers if isinstance(layers, list) else ():
        if isinstance(layer, str):
            yield layer
        for kind, options in layer.items() if isinstance(layer, dict) else ():
            yield str(kind)
            if isinstance(options, dict):
                yield from _kinds(options.get("layers"))
                yield from _kinds(options.get("shortcut"))
