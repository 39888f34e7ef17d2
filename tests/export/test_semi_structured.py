"""2:4 on CUDA: refusals and decisions with an injected timer on any machine, and the real thing on a GPU."""

from __future__ import annotations

import pytest
import torch
from compressed_models import compress_
from torch import nn

from lightning_obc.errors import BackendError, ExportError
from lightning_obc.export.semi_structured import is_two_four, reason_against, to_semi_structured


def half_model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 96), nn.Linear(96, 64), nn.Linear(64, 30))
    compress_(model, None, "2:4", layers=["0", "2", "4"])
    return model.half()


class Timer:
    """Times by layer: the dense layer takes one second, the converted one what the table says."""

    def __init__(self, sparse: dict[int, float]) -> None:
        self.sparse, self.seen = sparse, 0
        self.rows: list[int] = []

    def __call__(self, module: nn.Module, x: torch.Tensor) -> float:
        self.rows.append(x.shape[0])
        self.seen += 1
        return 1.0 if self.seen % 2 else self.sparse[module.in_features]


def test_each_layer_is_converted_only_where_it_pays():
    model = half_model()
    keys = list(model.state_dict())
    timer = Timer({128: 0.5, 64: 0.99})
    result = to_semi_structured(model, tokens=7, timer=timer, convert=lambda weight: weight.detach() * 2)
    reasons = {layer.name: layer.reason for layer in result.layers}
    assert result.converted == ["0"]
    assert reasons["0"] == "2.00× faster"
    assert "1.01× is below 1.05×" in reasons["2"]
    assert "not 2:4" not in reasons["4"]
    assert "no multiple of 32×64" in reasons["3"]
    assert "no multiple of 32×64" in reasons["4"]
    assert timer.rows == [7] * 4
    original = half_model()
    assert torch.equal(model[0].weight, original[0].weight * 2)
    assert not model[0].weight.requires_grad
    assert torch.equal(model[2].weight, original[2].weight)
    assert list(model.state_dict()) == keys
    assert "1 of 4 linear layers" in str(result)


def test_a_kernel_that_refuses_leaves_the_layer_dense():
    def fail(weight: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no kernel for this shape\nmore")

    result = to_semi_structured(half_model(), timer=Timer({}), convert=fail)
    assert not result.converted
    assert result.layers[0].reason == "left dense: no kernel for this shape"


def test_machines_without_cuda_are_refused_with_a_reason():
    with pytest.raises(BackendError, match=r"CUDA devices only.*export_onnx") as error:
        to_semi_structured(half_model())
    assert "cpu" in str(error.value)


def test_a_model_without_two_four_layers_is_refused():
    with pytest.raises(ExportError, match="no 2:4 linear layer"):
        to_semi_structured(nn.Sequential(nn.Linear(64, 64)).half(), timer=Timer({}))


def test_reasons():
    weight = torch.randn(64, 64)
    assert not is_two_four(weight)
    weight[:, ::2] = 0
    assert is_two_four(weight)
    assert not is_two_four(weight[:, :6])
    assert "float32" in (reason_against(weight) or "")
    assert reason_against(weight.half()) is None
    assert "multiple" in (reason_against(weight.half()[:30]) or "")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_converted_layers_compute_the_same_on_a_gpu():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 4096))
    compress_(model, None, "2:4")
    model = model.half().cuda()
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.float16)
    with torch.no_grad():
        expected = model(x)
        result = to_semi_structured(model, tokens=4096, min_speedup=0.0)
        assert result.converted == ["0", "2"]
        torch.testing.assert_close(model(x), expected, rtol=1e-2, atol=1e-2)
