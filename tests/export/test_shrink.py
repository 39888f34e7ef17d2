"""Channels that nothing reads leave, outputs stay, and what cannot be cut says why."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_obc as obc
from lightning_obc.errors import ExportError
from lightning_obc.export import export_onnx, open_session, shrink


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        nn.Conv2d(16, 24, 3, stride=2, padding=1),
        nn.GELU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(24 * 4, 32),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(32, 10),
    )


def unread_(model: nn.Module, name: str, channels: list[int], positions: int = 1) -> None:
    with torch.no_grad():
        weight = model.get_submodule(name).weight
        weight.reshape(weight.shape[0], weight.shape[1] // positions, -1)[:, channels] = 0


IMAGES = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def same(model: nn.Module, small: nn.Module, x: Tensor) -> bool:
    with torch.no_grad():
        return torch.allclose(copy.deepcopy(model).eval()(x), copy.deepcopy(small).eval()(x), rtol=1e-4, atol=1e-5)


def test_channels_leave_through_norms_activations_pooling_and_flattening() -> None:
    model = chain()
    model(IMAGES)  # running statistics that matter
    unread_(model, "1", [0, 3, 15])
    unread_(model, "5", [1, 2], positions=4)
    unread_(model, "9", list(range(20)))
    before = copy.deepcopy(model.state_dict())
    result = shrink(model, IMAGES)
    small: Any = result.model
    assert result.removed == {"1": 3, "5": 2, "9": 20}
    assert result.kept == {}
    shapes = [tuple(small.get_submodule(name).weight.shape) for name in ("0.0", "0.1", "1", "5", "6", "9")]
    assert shapes == [(13, 3, 3, 3), (13,), (22, 13, 3, 3), (12, 88), (12,), (10, 12)]
    assert (small[1].in_channels, small[1].out_channels, small[5].in_features, small[5].out_features) == (
        13,
        22,
        88,
        12,
    )
    assert same(model, small, IMAGES)
    assert list(small.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), "the model is untouched"
    assert small.training
    assert result.after == sum(p.numel() for p in small.parameters()) < result.before
    small(IMAGES).sum().backward()
    assert f"{result.before / result.after:.2f}× fewer" in str(result)


def test_structured_pruning_becomes_smaller_files(tmp_path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    assert runtime is not None
    model = chain().eval()
    obc.compress(model, torch.randn(64, 3, 8, 8), [obc.Prune(obc.Structured(0.5), exclude=["0.0"])])
    small = shrink(model, IMAGES).model
    assert small[0][0].out_channels == 8
    sizes = []
    for name, one in (("dense", model), ("small", small)):
        export_onnx(one, IMAGES, tmp_path / f"{name}.onnx")
        sizes.append((tmp_path / f"{name}.onnx").stat().st_size)
    assert sizes[1] < 0.6 * sizes[0]
    session = open_session(tmp_path / "small.onnx", threads=1)
    (found,) = session.run(None, {session.get_inputs()[0].name: IMAGES.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), model(IMAGES), rtol=1e-3, atol=1e-4)


def test_rows_that_leave_free_channels_before_them() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    unread_(model, "4", [0])
    with torch.no_grad():
        model[2].weight[1:, 5] = 0  # only the row that leaves reads channel 5
    assert shrink(model, torch.randn(3, 6)).removed == {"4": 1, "2": 1}
    unread_(model, "4", [0, 1, 2, 3])
    result = shrink(model, torch.randn(3, 2, 6))
    assert result.removed["4"] == 3, "one channel stays"
    assert same(model, result.model, torch.randn(7, 6))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x))
        return self.c(nn.functional.gelu(self.b(y)).contiguous()) + y


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(torch.relu(self.a(x)))))


class Softmaxed(Reused):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.softmax(self.a(x), -1))


def test_only_what_nothing_else_sees_is_cut() -> None:
    torch.manual_seed(0)
    model = Residual()
    for name in "abc":
        unread_(model, name, [2, 4])
    result = shrink(model, torch.randn(3, 8))
    assert result.removed == {"c": 2}
    assert result.kept == {"a": "its input comes from outside", "b": "relu is used elsewhere too"}
    assert "b: unread channels stay: relu is used elsewhere too" in str(result)
    assert same(model, result.model, torch.randn(3, 8))


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[4].weight = model[0].weight
    return model


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    return model


@pytest.mark.parametrize(
    ("make", "name", "reason"),
    [
        (Reused, "b", "a runs several times"),
        (Softmaxed, "b", "its input comes through softmax"),
        (tied, "2", "0 shares its weights"),
        (hooked, "2", "0 has hooks"),
        (lambda: nn.Sequential(nn.Linear(8, 5), nn.BatchNorm1d(5), nn.Linear(5, 8)), "2", "0 has its channels behind"),
        (lambda: nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)), "2", "its input comes through _1"),
    ],
)
def test_layers_that_must_stay_say_why(make: Any, name: str, reason: str) -> None:
    torch.manual_seed(0)
    model = make()
    unread_(model, name, [1])
    result = shrink(model, torch.randn(3, 5, 8))
    assert result.removed == {}
    assert reason in result.kept[name]
    assert result.after == result.before


def test_groups_stay() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Conv2d(4, 4, 3, groups=4))
    unread_(model, "2", [1])
    assert shrink(model, torch.randn(1, 4, 9, 9)).kept == {"2": "0 has groups"}


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_what_cannot_be_followed_is_refused_by_name() -> None:
    with pytest.raises(ExportError, match="cannot be traced"):
        shrink(Branching(), torch.ones(2))
    with pytest.raises(ExportError, match="cannot be traced"):
        shrink(nn.Sequential(nn.Linear(3, 3)), torch.ones(2, 4))


def test_a_copy_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison at the end, with a mistake put in."""
    from lightning_obc.export import shrink as function

    module = __import__(function.__module__, fromlist=["_Cut"])
    monkeypatch.setattr(module, "_by_channel", lambda node, kind: True)
    model = Softmaxed()
    unread_(model, "b", [1])
    with pytest.raises(ExportError, match="computes something else"):
        shrink(model, torch.randn(3, 8))
