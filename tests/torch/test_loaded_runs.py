"""Networks of the package as PyTorch modules: they compute the same, and are what a PyTorch user expects."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if importlib.util.find_spec("torch") is None:
    pytest.skip("PyTorch is not installed (the extra `torch`)", allow_module_level=True)

import torch

import nettorrent_mpi as nt
from nettorrent_mpi.engine.saved_network import SavedArrays, SavedNetwork
from nettorrent_mpi.plan import specs as s
from nettorrent_mpi.torch import load_run
from nettorrent_mpi.torch.loaded_runs import loaded, write_pt
from tests.networks import EVERY, case, random_layers

LIMITS = {np.float32: 1e-5, np.float64: 1e-12}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def outputs(module: Any, x: Any) -> Any:
    with torch.no_grad():
        return module(torch.as_tensor(x)).numpy()


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("name", EVERY)
def test_each_layer_computes_the_same(name: str, dtype: Any) -> None:
    made = case(*EVERY[name], dtype)
    module = loaded(made.saved)
    assert not module.training
    assert {tensor.dtype for tensor in module.parameters()} == {torch.as_tensor(made.y).dtype}
    assert made.off(outputs(module, made.x_first)) <= LIMITS[dtype]
    arrays = module.arrays()
    assert arrays.keys() == made.saved.saved.arrays.keys()
    for key, array in made.saved.saved.arrays.items():
        np.testing.assert_array_equal(arrays[key], array)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("seeds", [range(25), pytest.param(range(25, 300), marks=pytest.mark.slow)])
def test_random_networks_compute_the_same(seeds: range, dtype: Any, tmp_path: Path) -> None:
    for seed in seeds:
        made = case(*random_layers(seed), dtype, seed, stored=bool(seed % 2))
        module = loaded(made.saved)
        assert made.off(outputs(module, made.x_first)) <= LIMITS[dtype], (seed, module)
        if seed % 5 == 0:
            write_pt(made.saved, tmp_path / "model.pt")
            again = load_run(tmp_path / "model.pt")
            np.testing.assert_array_equal(outputs(again, made.x_first), outputs(module, made.x_first))


def test_a_flatten_is_pytorchs_own() -> None:
    """So that the features before the first linear layer are those of any other module."""
    made = case((4, 5, 2), [s.Conv2d(3, 2), s.Flatten(), s.BatchNorm(), s.Relu(), s.Linear(3)])
    module = loaded(made.saved)
    assert [type(child) for child in list(module.children())[1:]] == [
        torch.nn.Conv2d, torch.nn.Flatten, torch.nn.BatchNorm1d, torch.nn.ReLU, torch.nn.Linear,
    ]  # fmt: skip
    plain = torch.nn.Sequential(*list(module.children())[1:])
    assert made.off(outputs(plain, made.x_first)) <= 1e-12
    conv, flat = made.saved.saved.arrays["conv2d1/weight"], made.saved.saved.arrays["linear1/weight"]
    np.testing.assert_array_equal(module.conv2d1.weight.detach().numpy(), conv.transpose(3, 2, 0, 1))
    columns = flat.reshape(3, 4, 3, 3).transpose(3, 2, 0, 1).reshape(3, -1)  # (height, width, channel, out)
    np.testing.assert_array_equal(module.linear1.weight.detach().numpy(), columns)


def test_keys_are_the_names_of_the_layers() -> None:
    layers = [
        s.Residual((s.Conv2d(3, 1, activation="relu"), s.BatchNorm()), (s.Conv2d(3, 1),)), s.GlobalAvgPool2d(),
        s.Linear(2, bias=False, name="last"),
    ]  # fmt: skip
    module = loaded(case((4, 3, 2), layers).saved)
    norm = [f"residual1.batch_norm1.{each}" for each in ("weight", "bias", "running_mean", "running_var")]
    convolutions = [f"residual1.conv2d{i}.{each}" for i in (1, 2) for each in ("weight", "bias")]
    others = ["residual1.batch_norm1.num_batches_tracked", "last.weight"]
    assert sorted(module.state_dict()) == sorted([*convolutions, *norm, *others])
    assert isinstance(module.residual1.conv2d1_relu, torch.nn.ReLU)
    assert int(module.residual1.batch_norm1.num_batches_tracked) == 0
    assert [name for name, _ in module.named_children()] == ["scaling", "residual1", "global_avg_pool2d1", "last"]


def test_names_that_a_module_cannot_have() -> None:
    module = loaded(case(*EVERY["names"]).saved)
    assert [name for name, _ in module.named_children()] == [
        "scaling", "forward_", "forward_relu", "scaling_", "input", "class_names_", "class_names_tanh",
        "class_names_tanh_", "output",
    ]  # fmt: skip
    assert [name for name, _ in module.scaling_.named_children()] == ["conv-1", "_body_"]
    assert module.class_names == ("a", "b", "c")


@pytest.mark.parametrize("shape", [(4, 3, 2), (5,)])
def test_rows_are_prepared_as_by_the_run(shape: tuple[int, ...]) -> None:
    made = case(shape, [s.Flatten(), s.Linear(3)], np.float32, stored=True)
    module = loaded(made.saved)
    assert made.off(outputs(module, made.x_first)) <= 1e-6
    assert made.off(outputs(module, made.x_first / np.float32(255))) <= 1e-6  # as PyTorch's ToTensor gives them
    assert made.off(outputs(module, made.x_first / 255.0)) <= 1e-6  # float64 becomes the type of the module
    wide = copy.deepcopy(module).half().double()
    for name, tensor in module.state_dict().items():
        wide.get_parameter(name).data = tensor.double()
    exact = case(shape, [s.Flatten(), s.Linear(3)], stored=True)
    arrays = {key: array.astype(np.float32).astype(float) for key, array in exact.saved.saved.arrays.items()}
    saved = SavedArrays("x", arrays, exact.saved.saved.trained_on, made.saved.saved.model)
    exact_module = loaded(SavedNetwork.of(saved))
    np.testing.assert_allclose(outputs(wide, made.x_first), outputs(exact_module, made.x_first), rtol=1e-13, atol=1e-13)
    assert all(not key.startswith("scaling") for key in module.state_dict())
    for wrong in (made.x, made.x_first[0], made.x_first.astype(int)):
        if wrong is made.x and len(shape) == 1:
            continue
        with pytest.raises(nt.DataError, match=r"the input (has shape|holds)"):
            outputs(module, wrong)
    floats = loaded(case(shape, [s.Flatten(), s.Linear(3)]).saved)
    with pytest.raises(nt.DataError, match="make it floating"):
        outputs(floats, made.x_first)


def test_loading_draws_no_random_numbers() -> None:
    made = case(*EVERY["residual"])
    torch.manual_seed(3)
    before = torch.get_rng_state()
    loaded(made.saved)
    assert torch.equal(torch.get_rng_state(), before)


def test_it_can_be_trained_and_copied() -> None:
    made = case((6, 5, 3), [*EVERY["residual"][1], s.Flatten(), s.Linear(4)], np.float32, stored=True)
    module = loaded(made.saved)
    module.linear1 = torch.nn.Linear(module.linear1.in_features, 2)
    module.train()
    optimizer = torch.optim.Adam(module.parameters(), 0.01)
    x, y = torch.as_tensor(made.x_first), torch.tensor([0, 1, 0, 1, 1])
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(module(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    module.eval()
    again = copy.deepcopy(module)
    np.testing.assert_array_equal(outputs(again, x), outputs(module, x))


@pytest.mark.slow
def test_it_is_traced_whole() -> None:
    """So that torch.compile and torch.export take it."""
    made = case(*EVERY["residual"], np.float32, stored=True)
    module, x = loaded(made.saved), torch.as_tensor(made.x_first)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},)).module()
    np.testing.assert_allclose(outputs(program, x[:3]), outputs(module, x[:3]), rtol=1e-5, atol=1e-6)


def test_damaged_and_other_files_are_refused(tmp_path: Path) -> None:
    made = case((4, 3, 2), [s.Conv2d(3, 2), s.BatchNorm(), s.Flatten(), s.Linear(5)], np.float32, stored=True)
    path, wanted = tmp_path / "model.pt", outputs(loaded(made.saved), made.x_first)
    write_pt(made.saved, path)
    data, random = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for place in random.integers(0, len(data), 60):
        flipped = bytearray(data)
        flipped[place] ^= 1 << int(random.integers(8))
        path.write_bytes(flipped)
        try:
            np.testing.assert_array_equal(outputs(load_run(path), made.x_first), wanted)
        except nt.DataError:
            refused += 1
    assert refused > 5
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(nt.DataError, match=r"model\.pt: is not a whole file"):
        load_run(path)
    torch.save(torch.nn.Linear(2, 3).state_dict(), path)
    with pytest.raises(
        nt.DataError, match=r"model\.pt: does not say which network its tensors belong to: make the mod"
    ):
        load_run(path)
    torch.save(torch.nn.Linear(2, 3), path)  # a pickled module, which weights_only refuses
    with pytest.raises(nt.DataError, match=r"model\.pt: is not a whole file"):
        load_run(path)
    with pytest.raises(nt.DataError, match=r"missing does not exist: name the folder of a run"):
        load_run(tmp_path / "missing")
    path.write_bytes(data)
    found = torch.load(path, weights_only=True)
    found["state_dict"]["linear1.bias"] += 1
    torch.save(found, path)
    with pytest.raises(nt.DataError, match="its checksum is another"):
        load_run(path)
    torch.save({key: value for key, value in found.items() if key != "sha256"}, path)
    np.testing.assert_allclose(outputs(load_run(path), made.x_first), wanted + 1, rtol=1e-5)
    found["state_dict"]["linear1.bias"] = torch.zeros(4)
    torch.save(found, path)
    with pytest.raises(nt.DataError, match=r"tensor linear1\.bias is \(4,\), and the network beside it wants \(5,\)"):
        load_run(path)
    del found["state_dict"]["linear1.bias"]
    torch.save(found, path)
    with pytest.raises(nt.DataError, match=r"tensor linear1\.bias is missing, and"):
        load_run(path)


def test_arrays_of_another_network_are_refused() -> None:
    made = case((4,), [s.Linear(5)]).saved.saved
    for key, array in (("linear1/bias", np.zeros(4)), ("linear2/bias", np.zeros(4))):
        with pytest.raises(nt.DataError, match=rf"test: array {key} has shape \(4,\), and the network beside it wants"):
            SavedNetwork.of(SavedArrays("test", {**made.arrays, key: array}, made.trained_on, made.model))
    arrays = {"linear1/weight": made.arrays["linear1/weight"]}
    with pytest.raises(nt.DataError, match=r"array linear1/bias is missing"):
        SavedNetwork.of(SavedArrays("test", arrays, made.trained_on, made.model))
    for layers in ([{"linear": {"units": -1}}], [{"linear": 5}, {"conv2d": 3}], [], [3], "x"):
        with pytest.raises(nt.DataError, match="test: its layers"):
            SavedNetwork.of(SavedArrays("test", made.arrays, made.trained_on, {**made.model, "layers": layers}))
