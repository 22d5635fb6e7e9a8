"""`split` in one process: what can be divided, what is refused and why, and that it stays plain without MPI."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from torch import nn  # noqa: E402

from nettorrent_mpi.plan.errors import UserError  # noqa: E402
from nettorrent_mpi.torch.split_layers import SplitConv2d, SplitLinear, split_parameters, whole  # noqa: E402
from nettorrent_mpi.torch.split_model import clip_grad_norm_, split, whole_state  # noqa: E402
from nettorrent_mpi.torch.split_tensors import _positions  # noqa: E402

PLAIN = """
import sys, torch
from torch import nn
from nettorrent_mpi.torch.split_model import split
from nettorrent_mpi.torch.split_layers import SplitLinear
model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
assert split(model, {"0": "out", "1": "in"}) is model
assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]
torch.manual_seed(1)
ours = SplitLinear(3, 4, split="in")
torch.manual_seed(1)
plain = nn.Linear(3, 4)
x = torch.rand(2, 3)
assert torch.equal(ours(x), plain(x)) and list(ours.state_dict()) == list(plain.state_dict())
assert "mpi4py.MPI" not in sys.modules
"""


def test_without_a_launcher_layers_stay_plain_and_mpi_does_not_start() -> None:
    subprocess.run([sys.executable, "-c", PLAIN], check=True, timeout=300)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.hidden = nn.Linear(4, 4)
        self.output = nn.Linear(4, 5)
        self.output.weight = self.embedding.weight


def used() -> Any:
    """A model of which a graph still lives, and that graph."""
    model = nn.Sequential(nn.Linear(3, 4))
    loss = model(torch.rand(2, 3)).sum()
    return model, loss


def trained() -> nn.Module:
    model, loss = used()
    loss.backward()
    return model


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4))
    model[0].weight.register_post_accumulate_grad_hook(lambda parameter: None)
    return model


def flattened() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4))
    flat = torch.zeros(16)
    model[0].weight.data, model[0].bias.data = flat[:12].view(4, 3), flat[12:]
    return model


PAIR = [nn.Linear(3, 4), nn.ReLU(), nn.Conv2d(1, 2, 3)]
REFUSED = {
    "a pattern that matches nothing": (
        lambda: nn.Sequential(*PAIR), {"fc*": "out"}, r"'fc\*' matches no module; layers that can be split: 0, 2"
    ),
    "a pattern that matches other layers": (
        lambda: nn.Sequential(*PAIR), {"1": "out"}, "'1' matches ReLU only; layers that can be split: 0, 2"
    ),
    "no layers at all": (lambda: nn.Sequential(nn.ReLU()), {"*": "out"}, "layers that can be split: none"),
    "another way": (lambda: nn.Sequential(*PAIR), {"0": "rows"}, "is to be split by 'rows': choose"),
    "two ways": (lambda: nn.Sequential(*PAIR), {"0": "out", "*": "in"}, "'0' is to be split by 'out' and by 'in'"),
    "groups": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), {"0": "out"}, "'0' has 2 groups, whose outputs"),
    "a subclass": (
        lambda: nn.MultiheadAttention(4, 2), {"out_proj": "in"}, "'out_proj' is a NonDynamicallyQuantizableLinear"
    ),
    "tied weights": (Tied, {"output": "out"}, "'output' shares memory of its weight: embedding.weight, output.weight"),
    "one memory": (flattened, {"0": "out"}, "'0' shares memory of its weight: 0.weight, 0.bias"),
    "gradients": (trained, {"0": "out"}, r"'0' has a gradient of its weight: call optimizer.zero_grad\(\)"),
    "hooks": (hooked, {"0": "out"}, "'0' has a weight that hooks or a living graph refer to"),
    "other numbers": (lambda: nn.Linear(3, 4, dtype=torch.complex64), {"": "out"}, "has a weight of torch.complex64"),
    "weight norm": (
        lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 4))), {"0": "out"}, "'0' has the parameters and buffers"
    ),
    "parametrizations": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))), {"0": "out"}, "ParametrizedLin"
    ),
    "no shape yet": (lambda: nn.Sequential(nn.LazyLinear(4)), {"0": "out"}, "0.weight has no shape yet: call"),
    "a wrapper": (lambda: nn.DataParallel(nn.Linear(3, 4)), {"*": "out"}, "the model is in a DataParallel"),
    "no memory": (lambda: nn.Sequential(nn.Linear(3, 4, device="meta")), {"0": "out"}, "has its weight on meta"),
    "a part without memory": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4, device="meta")), {"0": "out"}, "1.weight is on meta"
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_split_is_refused_with_a_reason(case: str) -> None:
    make, layers, told = REFUSED[case]
    with pytest.raises(UserError, match=told):
        split(make(), layers)


def test_a_living_graph_is_found_and_harmless_once_it_is_gone() -> None:
    model, loss = used()
    with pytest.raises(UserError, match="delete losses of earlier steps"):
        split(model, {"0": "out"})
    del loss
    assert split(model, {"0": "out"}) is model
    assert model[0].weight.shape == (4, 3)


def test_all_mistakes_are_told_at_once() -> None:
    layers: Mapping[str, str] = {"a": "out", "0": "both", "b*": "in"}
    with pytest.raises(UserError, match=r"'a' matches no module.*'0' is to be split by 'both'.*'b\*' matches"):
        split(nn.Sequential(*PAIR), layers)


def test_one_rank_has_all_of_the_layers_and_their_helpers() -> None:
    model = nn.Sequential(SplitLinear(3, 4), nn.Tanh(), SplitLinear(4, 2, split="in", bias=False))
    conv = SplitConv2d(2, 3, 2, stride=2, padding_mode="circular", padding=1, split="in")
    assert conv(torch.rand(2, 2, 5, 5)).shape == (2, 3, 3, 3)
    assert split_parameters(model) == {}
    optimizer = torch.optim.Adam(model.parameters())
    whole_state(optimizer, model)
    model(torch.rand(3, 3)).sum().backward()
    assert clip_grad_norm_(model, 0.01) > 0
    optimizer.step()
    assert len(optimizer.state_dict()["state"]) == 3
    with whole(model):
        model[0].reset_parameters()
    assert "split='in'" in repr(model)
    with pytest.raises(UserError, match="is split already"):
        split(model, {"0": "out"})


def test_samples_lie_in_all_columns() -> None:
    for shape in ((64, 784), (256, 3, 32, 32), (1, 1), (5,)):
        *_, column = _positions(shape)
        assert len(set(column.tolist())) >= min(shape[-1], 15)
        assert all(((at >= 0) & (at < size)).all() for at, size in zip(_positions(shape), shape, strict=True))
