"""A network that was trained answers alone as it does in a training, whatever its layers and its loss."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nettorrent_mpi as nt
from nettorrent_mpi.engine.saved_network import SavedNetwork
from nettorrent_mpi.engine.trained_network import TrainedNetwork
from nettorrent_mpi.plan import specs
from tests.networks import EVERY, case

RANDOM = np.random.default_rng(0)


def loaded(folder: Path, layers: Any, data: Any, x: Any, **how: Any) -> tuple[TrainedNetwork, Any]:
    """Train a little; return the network as it is loaded, and the outputs of the trainer for x."""
    with nt.Trainer(layers, data, batch_size=8, steps=6, kernels="numpy", **how) as trainer:
        list(trainer.train())
        trainer.save(folder / "model.h5")
        return nt.load(folder), trainer.predict(x)


@pytest.mark.parametrize("name", EVERY)
def test_each_layer_computes_the_same(name: str) -> None:
    made = case(*EVERY[name], np.float32)
    np.testing.assert_array_equal(TrainedNetwork(made.saved).outputs(made.x), made.y.reshape(len(made.y), -1))


def test_images_of_bytes(tmp_path: Path) -> None:
    """Blocks of any size, a grey image without its axis of channels, floats on the scale of bytes: the same answers."""
    x, y = RANDOM.integers(0, 256, (300, 6, 5, 1), np.uint8), np.arange(300) % 3
    data = nt.from_arrays(x, y, classes=("ant", "bee", "cat"), mean=0.4, std=0.3)
    layers = [nt.Conv2d(3), nt.BatchNorm(), nt.Relu(), nt.Flatten(), nt.Dropout(0.3), nt.Linear(3)]
    network, wanted = loaded(tmp_path, layers, data, x, dtype="float64")
    assert (network.classes, network.shape) == (("ant", "bee", "cat"), (6, 5, 1))
    for given in (x, x[..., 0], x / 255):
        np.testing.assert_allclose(network.outputs(given), wanted, rtol=1e-12, atol=1e-12)
        np.testing.assert_array_equal(network.predict(given), wanted.argmax(axis=1))
    np.testing.assert_allclose(network.outputs(x[:1]), wanted[:1], rtol=1e-12, atol=1e-12)
    assert network.outputs(x[:0]).shape == (0, 3)
    probabilities = np.exp(wanted) / np.exp(wanted).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(network.probabilities(x), probabilities, rtol=1e-12)
    for wrong, told in (
        (x[0], r"rows of \(6, 5, 1\); write x\[np.newaxis\] for a single row"),
        (x.astype(int), "x holds int64; make it uint8 or floating"),
        (x[:, 1:], r"x has shape \(300, 5, 5, 1\)"),
        (np.where(x > 250, np.nan, 0.5), "is nan; correct it"),
    ):
        with pytest.raises(nt.DataError, match=told):
            network.predict(wrong)


def test_each_loss_has_answers_of_its_own(tmp_path: Path) -> None:
    x = RANDOM.normal(size=(40, 4)).astype(np.float32)
    two, three = np.arange(40) % 2, np.arange(40) % 3

    def trained(units: int, y: Any, loss: Any) -> tuple[TrainedNetwork, Any]:
        return loaded(tmp_path, [nt.Linear(units)], (x, y), x, loss=loss)

    one, outputs = trained(1, two, nt.BinaryCrossEntropy())
    assert one.classes == ("0", "1")
    np.testing.assert_array_equal(one.predict(x), outputs[:, 0] > 0)
    of_second = 1 / (1 + np.exp(-outputs[:, 0]))
    np.testing.assert_allclose(one.probabilities(x), np.stack([1 - of_second, of_second], 1), atol=1e-6)
    several, outputs = trained(3, three, nt.BinaryCrossEntropy())
    np.testing.assert_array_equal(several.predict(x), outputs.argmax(axis=1))
    np.testing.assert_allclose(several.probabilities(x), 1 / (1 + np.exp(-outputs)), atol=1e-6)
    soft, outputs = trained(2, RANDOM.uniform(size=(40, 2)).astype(np.float32), nt.BinaryCrossEntropy())
    assert soft.classes == ()
    np.testing.assert_array_equal(soft.predict(x), outputs)
    squared, outputs = trained(3, three, nt.MeanSquaredError())
    np.testing.assert_array_equal(squared.predict(x), outputs.argmax(axis=1))
    with pytest.raises(nt.UserError, match=r"trained with mean_squared_error, .* take outputs\(\)"):
        squared.probabilities(x)
    numbers, outputs = trained(2, x[:, :2], nt.MeanSquaredError())
    np.testing.assert_array_equal(numbers.predict(x), outputs)
    assert numbers.classes == ()


def test_a_network_that_diverged_is_named() -> None:
    made = case((4,), [specs.Linear(3)], np.float32)
    saved = replace(made.saved.saved, arrays={k: np.full_like(v, np.nan) for k, v in made.saved.saved.arrays.items()})
    with pytest.raises(nt.DataError, match=r"^test: its outputs are not finite, though the rows are"):
        TrainedNetwork(SavedNetwork.of(saved)).predict(np.zeros((2, 4)))


OWN = """
from dataclasses import dataclass
import numpy as np
import nettorrent_mpi as nt
from nettorrent_mpi.nn.layers.activations import Activation

@dataclass(frozen=True)
class Halved(nt.LayerSpec):
    kind = "halved"

def register():
    @nt.register_layer(Halved)
    class HalvedLayer(Activation):
        def apply(self, x, y, ctx):
            np.multiply(x, 0.5, out=y)
            return y

        def differentiate(self, saved, dy, ctx):
            dy *= 0.5
"""


def test_layers_of_your_own(tmp_path: Path) -> None:
    """They are loaded where they are registered."""
    scope: dict[str, Any] = {"__name__": "somebodys"}
    exec(OWN, scope)
    x, y = RANDOM.normal(size=(20, 3)).astype(np.float32), np.arange(20) % 2
    try:
        scope["register"]()
        network, wanted = loaded(tmp_path, [nt.Linear(4), scope["Halved"](), nt.Linear(2)], (x, y), x)
        np.testing.assert_allclose(network.outputs(x), wanted, rtol=1e-6)
    finally:
        specs.LAYERS.pop("halved", None)
    with pytest.raises(nt.UserError, match="nobody has registered its layer halved: import the module that does"):
        nt.load(tmp_path)


def test_it_needs_no_mpi_under_a_launcher_either(tmp_path: Path) -> None:
    """A process that a launcher started loads and computes alone."""
    x, y = RANDOM.normal(size=(20, 3)).astype(np.float32), np.arange(20) % 2
    loaded(tmp_path, [nt.Linear(2)], (x, y), x)
    script = (
        "import sys, numpy as np, nettorrent_mpi as nt\n"
        f"print(nt.load({str(tmp_path)!r}).predict(np.zeros((3, 3))).shape, 'mpi4py.MPI' in sys.modules)"
    )
    command = ["env", "OMPI_COMM_WORLD_RANK=1", "OMPI_COMM_WORLD_SIZE=2", sys.executable, "-c", script]
    root = str(Path(__file__).parents[2])
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.stdout == "(3,) False\n", done.stderr
