"""Layers of PyTorch models that are divided over ranks compute and train like the undivided ones."""

from __future__ import annotations

import copy
import itertools
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from torch import nn  # noqa: E402

from nettorrent_mpi.comm.world import World  # noqa: E402
from nettorrent_mpi.plan.errors import LaunchError, UserError  # noqa: E402
from nettorrent_mpi.torch import split_layers  # noqa: E402
from nettorrent_mpi.torch.split_layers import SplitConv2d, SplitLinear, split_parameters, whole  # noqa: E402
from nettorrent_mpi.torch.split_model import clip_grad_norm_, split, whole_state  # noqa: E402

NEAR = 1e-12  # of the norm, in float64
Divide = Callable[..., Any]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(5)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def divide(world: Any) -> Iterator[Divide]:
    """split(), over all ranks of the test; its communicators are freed after it."""
    made = []

    def divided(model: Any, layers: Mapping[str, str], **options: Any) -> Any:
        model = split(model, layers, comm=world, **options)
        made.append(model)
        return model

    yield divided
    for model in made:
        split_layers.close(model)


def near(found: Any, expected: Any) -> None:
    """Both are equal up to rounding, in the norm."""
    assert found.shape == expected.shape
    error = float((found - expected).detach().double().norm())
    assert error <= NEAR * max(float(expected.detach().double().norm()), 1e-30), error


def same_state(model: Any, serial: Any) -> None:
    """All parameters and buffers are equal up to rounding, and have the same names."""
    found, expected = model.state_dict(), serial.state_dict()
    assert list(found) == list(expected)
    for name, value in found.items():
        near(value, expected[name])


def same_gradients(model: Any, serial: Any) -> None:
    """This rank's gradients are its parts of the serial ones."""
    wholes, expected = split_parameters(model), dict(serial.named_parameters())
    for name, parameter in model.named_parameters():
        grad = expected[name].grad
        near(parameter.grad, wholes[name].part(grad) if name in wholes else grad)


class Mlp(nn.Module):
    def __init__(self, bias: bool = True):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(7, 11, bias), nn.Tanh(), nn.Linear(11, 5, bias), nn.GELU())
        self.fc1, self.fc2 = nn.Linear(5, 3, bias), nn.Linear(3, 4, bias)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Any) -> Any:
        return self.head(torch.tanh(self.fc2(torch.tanh(self.fc1(self.body(x))))))


class Cnn(nn.Module):
    def __init__(self, bias: bool = True):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 7, 3, stride=2, padding=(1, 2), bias=bias)
        self.norm = nn.BatchNorm2d(3)
        self.conv2 = nn.Conv2d(7, 5, (3, 2), padding="same", dilation=2, padding_mode="circular", bias=bias)
        self.conv3 = nn.Conv2d(5, 2, 2, padding=1, padding_mode="reflect", bias=bias)
        self.fc = nn.Linear(2 * 7 * 8, 3)

    def forward(self, x: Any) -> Any:
        x = torch.tanh(self.conv1(self.norm(x)))
        x = torch.tanh(self.conv3(torch.tanh(self.conv2(x))))
        return self.fc(x.flatten(1))


CASES = {
    "mlp": (Mlp, (7,), {"body.*": "out", "fc1": "in", "fc2": "out"}),
    "mlp the other way": (Mlp, (7,), {"body.0": "in", "body.2": "in", "fc*": "out", "head": "in"}),
    "cnn": (Cnn, (3, 11, 11), {"conv1": "out", "conv2": "in", "conv3": "out", "fc": "in"}),
    "cnn the other way": (Cnn, (3, 11, 11), {"conv1": "in", "conv2": "out", "conv3": "in", "fc": "out"}),
}
OPTIMIZERS = {
    "momentum": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda parameters: torch.optim.Adam(parameters, 0.01),
}


QUICK = [("mlp", "adam", True), ("cnn", "momentum", True), ("cnn the other way", "adam", False)]


@pytest.mark.parametrize(
    ("case", "optimizer", "bias"),
    [
        pytest.param(*each, marks=() if each in QUICK else pytest.mark.slow)
        for each in itertools.product(CASES, OPTIMIZERS, (True, False))
    ],
)
def test_twenty_steps_are_those_of_the_undivided_model(divide: Divide, case: str, optimizer: str, bias: bool) -> None:
    network, shape, layers = CASES[case]
    serial = network(bias).double()
    model = divide(copy.deepcopy(serial), layers)
    ours, theirs = OPTIMIZERS[optimizer](model.parameters()), OPTIMIZERS[optimizer](serial.parameters())
    for step in range(20):
        x, y = torch.randn(6, *shape, dtype=torch.float64), torch.randint(3, (6,))
        losses = []
        for each, stepped in ((model, ours), (serial, theirs)):
            stepped.zero_grad()
            losses.append(nn.functional.cross_entropy(each(x), y))
            losses[-1].backward()
        if step == 0:
            same_gradients(model, serial)
        ours.step()
        theirs.step()
        near(*losses)
    same_state(model, serial)


@pytest.mark.parametrize("way", ["out", "in"])
@pytest.mark.parametrize("shape", [(7,), (4, 7), (0, 7), (2, 3, 7)])
def test_linear_takes_any_number_of_dimensions_and_rows(divide: Divide, way: str, shape: tuple[int, ...]) -> None:
    serial = nn.Linear(7, 5).double()
    model = divide(copy.deepcopy(serial), {"": way})
    same_passes(model, serial, torch.randn(*shape, dtype=torch.float64))


@pytest.mark.parametrize("way", ["out", "in"])
@pytest.mark.parametrize("shape", [(3, 9, 8), (2, 3, 9, 8), (0, 3, 9, 8)])
def test_conv_takes_one_image_or_none(divide: Divide, way: str, shape: tuple[int, ...]) -> None:
    serial = nn.Conv2d(3, 4, 3, stride=(1, 2), padding=1).double()
    model = divide(copy.deepcopy(serial), {"": way})
    same_passes(model, serial, torch.randn(*shape, dtype=torch.float64))
    if len(shape) == 4:
        x = torch.randn(*shape, dtype=torch.float64).to(memory_format=torch.channels_last)
        same_passes(model, serial, x)


def same_passes(model: Any, serial: Any, x: Any) -> None:
    outputs, gradients = [], []
    for each in (model, serial):
        given = x.clone().requires_grad_()
        outputs.append(each(given))
        each.zero_grad()
        outputs[-1].square().sum().backward()
        gradients.append(given.grad)
        with torch.no_grad():
            near(each(x), outputs[-1])
    near(*outputs)
    near(*gradients)
    same_gradients(model, serial)


@pytest.mark.parametrize("way", ["out", "in"])
def test_gradients_can_be_differentiated_again(divide: Divide, way: str) -> None:
    serial = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    model = divide(copy.deepcopy(serial), {"*": way})
    x = torch.randn(4, 5, dtype=torch.float64)
    for each in (model, serial):
        given = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(each(given).square().sum(), given, create_graph=True)
        (grad.square().sum() + each(given).sum()).backward()
    same_gradients(model, serial)


def test_all_ranks_start_with_those_of_rank_0_and_draw_its_random_numbers(divide: Divide, world: Any) -> None:
    torch.manual_seed(100 + world.rank)
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 6), nn.Dropout(0.5))
    model[1].running_mean.fill_(world.rank)
    serial = copy.deepcopy(model)
    for tensor in (*serial.parameters(), *serial.buffers()):
        world.Bcast(tensor.detach().numpy(), root=0)
    divide(model, {"0": "out", "3": "in"})
    same_state(model, serial)
    drawn = world.allgather(torch.rand(3).tolist())
    assert drawn == drawn[:1] * world.size
    x = torch.rand(5, 6)
    outputs = world.allgather(model(x).tolist())
    assert outputs == outputs[:1] * world.size


def test_state_dict_is_whole_and_loads_into_any_division(divide: Divide) -> None:
    serial = Cnn().double()
    model = divide(copy.deepcopy(serial), {"conv*": "out", "fc": "in"})
    Cnn().double().load_state_dict(model.state_dict())
    other = divide(Cnn().double(), {"conv1": "in", "conv3": "in", "fc": "out"})
    for assign in (False, True):
        assert not any(other.load_state_dict(model.state_dict(), assign=assign))
        same_state(other, serial)
    with pytest.raises(RuntimeError, match=r"Missing key.*conv1.weight"):
        other.load_state_dict({name: value for name, value in serial.state_dict().items() if name != "conv1.weight"})
    with pytest.raises(
        RuntimeError, match=r"size mismatch for fc.weight.*\[3, 5\].*shape in current model.*\[3, 112\]"
    ):
        other.load_state_dict(serial.state_dict() | {"fc.weight": torch.zeros(3, 5)})
    same_state(copy.deepcopy(other), serial)
    assert model.state_dict(prefix="net.")["net.fc.weight"].shape == (3, 112)


def test_each_rank_holds_its_part_only(divide: Divide, world: Any) -> None:
    model = divide(nn.Sequential(nn.Linear(100, 90), nn.Linear(90, 80)), {"0": "out", "1": "in"})
    held = [sum(p.untyped_storage().nbytes() for p in model.parameters())]
    assert max(held) <= 4 * (90 * 100 + 90 + 80 * 90) / world.size + 4 * (100 + 1 + 80 + 80)


def test_classes_are_drop_in(world: Any) -> None:
    everyone = split_layers.SplitRanks(world)
    torch.manual_seed(7)
    linear, conv = nn.Linear(5, 7), nn.Conv2d(3, 4, 3, padding=1, bias=False)
    torch.manual_seed(7 if world.rank == 0 else 8)
    ours = SplitLinear(5, 7, split="in", comm=everyone), SplitConv2d(3, 4, 3, padding=1, bias=False, comm=everyone)
    for layer, serial in zip(ours, (linear, conv), strict=True):
        same_state(layer, serial)
        assert isinstance(layer, type(serial))
        layer.reset_parameters()
        with layer.whole():
            assert layer.weight.shape == serial.weight.shape
            layer.weight.data.fill_(world.rank + 1)
        assert layer.state_dict()["weight"].unique().tolist() == [1]
    assert (f"split='in' over {world.size} ranks" if world.size > 1 else "split='in'") in repr(ours[0])
    with pytest.raises(UserError, match="2 groups"):
        SplitConv2d(4, 4, 3, groups=2, comm=everyone)
    with pytest.raises(UserError, match="rows"):
        SplitLinear(4, 4, split="rows", comm=everyone)
    everyone.close()


def test_a_whole_model_computes_alone(divide: Divide, world: Any) -> None:
    serial = Mlp()
    model = divide(copy.deepcopy(serial), {"body.*": "out", "fc1": "in"})
    x = torch.randn(3, 7)
    with whole(model):
        if world.rank == 0:
            assert torch.equal(model(x), serial(x))
        assert torch.equal(model.state_dict()["body.0.weight"], serial.body[0].weight)
        model.apply(lambda module: isinstance(module, nn.Linear) and nn.init.normal_(module.weight, world.rank, 0.1))
    assert abs(float(model.state_dict()["body.0.weight"].mean())) < 0.1
    same_state(model, model)


def test_an_optimizer_that_was_made_before_and_layers_of_two_names(divide: Divide) -> None:
    def made() -> tuple[Any, Any]:
        torch.manual_seed(3)
        layer = nn.Linear(6, 6)
        model = nn.Sequential(layer, nn.Tanh(), layer).double()
        return model, torch.optim.SGD(model.parameters(), 0.1)

    (model, ours), (serial, theirs) = made(), made()
    divide(model, {"2": "in"})
    x = torch.randn(4, 6, dtype=torch.float64)
    for each, optimizer in ((model, ours), (serial, theirs)):
        each(x).square().sum().backward()
        optimizer.step()
    same_state(model, serial)


def test_clipping_and_the_optimizers_state_are_those_of_the_whole_model(divide: Divide) -> None:
    serial = Mlp().double()
    layers = {"body.*": "out", "fc*": "in"}
    model = divide(copy.deepcopy(serial), layers)
    for norm_type in (2.0, 1.0, float("inf")):
        x = torch.randn(4, 7, dtype=torch.float64)
        for each in (model, serial):
            each.zero_grad()
            each(x).square().sum().backward()
        found = clip_grad_norm_(model, 0.1, norm_type)
        near(found, nn.utils.clip_grad_norm_(serial.parameters(), 0.1, norm_type).to(found.dtype))
        same_gradients(model, serial)
    ours, theirs = (torch.optim.Adam(each.parameters(), 0.01) for each in (model, serial))
    whole_state(ours, model)
    ours.step()
    theirs.step()
    found, expected = ours.state_dict(), theirs.state_dict()
    assert found["param_groups"] == expected["param_groups"]
    for number, values in expected["state"].items():
        assert list(found["state"][number]) == list(values)
        for key, value in values.items():
            near(found["state"][number][key], value)
    again = divide(copy.deepcopy(serial), {"body.*": "in"})
    other = torch.optim.Adam(again.parameters(), 0.01)
    whole_state(other, again)
    other.load_state_dict(found)
    x = torch.randn(4, 7, dtype=torch.float64)
    for each, optimizer in ((again, other), (serial, theirs)):
        optimizer.zero_grad()
        each(x).square().sum().backward()
        optimizer.step()
    same_state(again, serial)


def test_a_part_of_the_ranks(world: Any) -> None:
    half = world.Split(world.rank % 2, world.rank)
    group = World(half)
    serial = Mlp().double()
    model = split(copy.deepcopy(serial), {"body.*": "out"}, comm=group)
    x = torch.randn(2 + world.rank % 2, 7, dtype=torch.float64)
    for each in (model, serial):
        each(x).sum().backward()
    same_gradients(model, serial)
    split_layers.close(model)
    group.free()
    half.Free()


def test_half_precision_and_autocast(divide: Divide) -> None:
    serial = Mlp()
    model = divide(copy.deepcopy(serial), {"body.*": "out", "fc*": "in"})
    x = torch.randn(4, 7)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = model(x), serial(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert torch.allclose(found, expected, atol=0.05)
    found.sum().backward()
    for kind in (torch.bfloat16, torch.float16):
        model.to(kind), serial.to(kind)
        assert torch.allclose(model(x.to(kind)), serial(x.to(kind)), atol=0.05)
        assert {value.dtype for value in model.state_dict().values()} == {kind}


@pytest.mark.parametrize("training", [True, False])
def test_a_transformers_layer(divide: Divide, training: bool) -> None:
    serial = nn.TransformerEncoderLayer(6, 2, 10, dropout=0.0, batch_first=True, dtype=torch.float64).train(training)
    model = divide(copy.deepcopy(serial), {"linear1": "out", "linear2": "in"})
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    with torch.set_grad_enabled(training):
        near(model(x), serial(x))
    encoder = nn.TransformerEncoder(serial, 2).train(training)
    deep = divide(copy.deepcopy(encoder), {"*.linear1": "out", "*.linear2": "in"})
    with torch.set_grad_enabled(training):
        near(deep(x), encoder(x))
    with pytest.raises(UserError, match=r"self_attn.out_proj.*NonDynamicallyQuantizableLinear"):
        divide(serial, {"*": "out"})


@pytest.mark.slow
def test_a_compiled_model(divide: Divide) -> None:
    serial = Mlp().double()
    model = divide(copy.deepcopy(serial), {"body.*": "out", "fc*": "in"})
    compiled = torch.compile(model, backend="aot_eager")
    ours, theirs = (torch.optim.SGD(each.parameters(), 0.1) for each in (model, serial))
    for rows in (4, 4, 3):
        x = torch.randn(rows, 7, dtype=torch.float64)
        for each, optimizer in ((compiled, ours), (serial, theirs)):
            optimizer.zero_grad()
            each(x).square().sum().backward()
            optimizer.step()
    same_state(model, serial)


@pytest.mark.ranks(2, 3, 5)
def test_ranks_that_do_not_do_the_same_raise_an_error_on_all(divide: Divide, world: Any) -> None:
    last = world.rank == world.size - 1
    model = divide(Mlp(), {"body.*": "out", "fc*": "in"})
    x = torch.rand(4, 7)

    def refused(do: Callable[[], object], told: str) -> None:
        with pytest.raises(LaunchError, match=told) as error:
            do()
        assert len(set(world.allgather(str(error.value)))) == 1
        assert error.value.agreed

    number = world.size - 1
    told = rf"rank 0 is at the forward pass.*\[4, 7\].*rank {number} is at the forward pass.*body.0 .*\[3, 7\]"
    refused(lambda: model(x[:3] if last else x), told)
    refused(lambda: model(x.double() if last else x), f"rank {number} is at.*float64")
    refused(lambda: model(x + 0.01 if last else x), f"rank {number} has other values than rank 0")
    refused(lambda: model(x * float("nan") if last else x), f"rank {number} has other values")
    refused(lambda: model.state_dict() if last else model(x), f"rank {number} is at the state_dict of body.0")
    loss = model(x).square().mean()
    refused((loss * 2 if last else loss).backward, "backward pass of fc2.*has other values")

    def evaluated() -> None:
        with torch.set_grad_enabled(not last):
            model(x)

    refused(evaluated, "for gradients of nothing")
    assert model(x).isfinite().all()
    with pytest.raises(RuntimeError):
        model(torch.rand(4, 8))
    with pytest.raises(ValueError, match=r"body.0 \(Linear\) has 7 inputs.*\[4, 8\]"):
        divide(Mlp(), {"body.0": "in"})(torch.rand(4, 8))
    assert model(x * float("nan")).isnan().all()


@pytest.mark.ranks(2)
def test_a_closed_model_and_a_pickled_one_say_so(world: Any) -> None:
    model = split(Mlp(), {"body.*": "out"}, comm=world)
    with pytest.raises(TypeError, match=r"save its state_dict\(\)"):
        pickle.dumps(model)
    split_layers.close(model)
    split_layers.close(model)
    with pytest.raises(UserError, match=r"was freed by close: forward pass.*body.0"):
        model(torch.rand(2, 7))


@pytest.mark.ranks(2, 3)
def test_models_that_differ_are_refused_on_all(divide: Divide, world: Any) -> None:
    last = world.rank == world.size - 1
    number = world.size - 1

    def refused(model: Any, layers: Mapping[str, str], told: str, **options: Any) -> None:
        kept = copy.deepcopy(model)
        with pytest.raises(UserError, match=told) as error:
            divide(model, layers, **options)
        assert len(set(world.allgather(str(error.value)))) == 1
        assert {name: type(m) for name, m in model.named_modules()} == {n: type(m) for n, m in kept.named_modules()}

    refused(nn.Sequential(nn.Linear(3, 4 + last)), {"0": "out"}, rf"rank {number} has another model.*0.weight \[5, 3\]")
    refused(nn.Sequential(nn.Linear(3, 4).double() if last else nn.Linear(3, 4)), {"0": "out"}, "torch.float64")
    refused(nn.Sequential(nn.Linear(3, 4), *([nn.Linear(4, 4)] if last else [])), {"0": "out"}, "1.weight.*rank 0 has")
    refused(nn.Sequential(nn.Linear(3, 4)), {"0": "out" if last else "in"}, "0: out, where rank 0 has 0: in")
    refused(nn.Sequential(nn.Linear(3, 4)), {"1" if last else "0": "out"}, rf"'1' matches.*on rank {number}")
    frozen = nn.Sequential(nn.Linear(3, 4))
    frozen[0].weight.requires_grad_(not last)
    refused(frozen, {"0": "out"}, "requires_grad=False")
    everyone = split_layers.SplitRanks(world)
    with pytest.raises(LaunchError, match=re.escape("Linear(in_features=3, out_features=5")):
        SplitLinear(3, 4 + last, comm=everyone)
    everyone.close()


def test_frozen_layers(divide: Divide) -> None:
    serial = Mlp().double()
    serial.body[0].requires_grad_(False)
    serial.fc1.weight.requires_grad_(False)
    model = divide(copy.deepcopy(serial), {"body.*": "out", "fc*": "in"})
    x = torch.randn(4, 7, dtype=torch.float64)
    for each in (model, serial):
        each(x).square().sum().backward()
    wholes = split_parameters(model)
    for (name, ours), theirs in zip(model.named_parameters(), serial.parameters(), strict=True):
        if theirs.grad is None:
            assert ours.grad is None
        else:
            near(ours.grad, wholes[name].part(theirs.grad) if name in wholes else theirs.grad)
