"""2:4 on CUDA: refusals and decisions with an injected timer on any machine, and the real thing on a GPU."""

from __future__ import annotations

import pytest
import torch
from compressed_models import compress_
from torch import nn

from lightning_obc.errors import BackendError, ExportError
from lightning_obc.export import semi_structured
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


@pytest.fixture(autouse=True)
def cutlass(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stricter of the two kernels, whatever this build of PyTorch has."""
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)


def test_each_layer_is_converted_only_where_it_pays():
    model = half_model()
    keys = list(model.state_dict())
    timer = Timer({128: 0.5, 64: 0.99})
    result = to_semi_structured(model, tokens=7, timer=timer, convert=lambda weight: weight.detach().clone())
    reasons = {layer.name: layer.reason for layer in result.layers}
    assert result.converted == ["0"]
    assert reasons["0"] == "2.00× faster"
    assert "1.01× is below 1.05×" in reasons["2"]
    assert "not 2:4" not in reasons["4"]
    assert "no multiple of 32×64" in reasons["3"]
    assert "no multiple of 32×64" in reasons["4"]
    assert timer.rows == [7] * 4
    original = half_model()
    assert torch.equal(model[0].weight, original[0].weight)
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


def test_a_layer_whose_outputs_would_change_stays_dense():
    model = half_model()
    result = to_semi_structured(model, timer=Timer({}), convert=lambda weight: weight.detach().roll(1, 0))
    assert not result.converted
    assert "its outputs would change by 1." in result.layers[0].reason
    broken = to_semi_structured(model, timer=Timer({}), convert=lambda weight: weight.detach() * float("nan"))
    assert "would change by inf" in broken.layers[0].reason
    assert torch.equal(model[0].weight, half_model()[0].weight)


def test_a_kernel_that_fails_when_it_runs_leaves_the_layer_dense():
    def timer(module: nn.Module, x: torch.Tensor) -> float:
        raise NotImplementedError("matmul: operation is not supported")

    result = to_semi_structured(half_model(), timer=timer, convert=lambda weight: weight.detach().clone())
    assert result.layers[0].reason == "left dense: matmul: operation is not supported"


def packed(weight: torch.Tensor) -> torch.Tensor:
    """PyTorch's own tensor class on the CPU, whose contents no kernel here reads."""
    half = weight.detach()[:, ::2].contiguous()
    return torch.sparse.SparseSemiStructuredTensorCUTLASS(weight.shape, half, half.clone(), None, None, None)


def test_layers_that_are_converted_already_are_left_alone():
    model = half_model()
    model[0].weight = nn.Parameter(packed(model[0].weight), requires_grad=False)
    assert list(model.state_dict()) == list(half_model().state_dict())
    result = to_semi_structured(model, timer=Timer({64: 0.5}), convert=lambda weight: weight.detach().clone())
    reasons = {layer.name: layer.reason for layer in result.layers}
    assert reasons["0"] == "it is a semi-structured tensor already"
    assert result.converted == ["2"]


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
    assert "multiple of 32×64" in (reason_against(weight.half()[:30]) or "")
    assert "multiple of 16×16" in (reason_against(weight.half()[:30], "cusparselt") or "")
    assert reason_against(weight.half()[:48, :32], "cusparselt") is None


def test_constraints_are_those_of_pytorch():
    """What PyTorch refuses by itself would only be found out on a GPU."""
    for backend, kind in (
        ("cusparselt", torch.sparse.SparseSemiStructuredTensorCUSPARSELT),
        ("cutlass", torch.sparse.SparseSemiStructuredTensorCUTLASS),
    ):
        for dtype in (torch.float16, torch.bfloat16):
            limits = kind._DTYPE_SHAPE_CONSTRAINTS[dtype]
            assert semi_structured._TILES[backend] == (limits.sparse_min_rows, limits.sparse_min_cols)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kernels", ["default", "cutlass"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_converted_layers_compute_the_same_on_a_gpu(dtype, kernels, monkeypatch):
    monkeypatch.undo() if kernels == "default" else None
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 4096, bias=False))
    compress_(model, None, "2:4")
    model = model.to("cuda", dtype)
    with torch.no_grad():
        inputs = [torch.randn(*shape, 4096, device="cuda", dtype=dtype) for shape in ((4096,), (3,), (2, 5))]
        expected = [model(x) for x in inputs]
        result = to_semi_structured(model, tokens=4096, min_speedup=0.0)
        assert result.converted == ["0", "2"], str(result)
        for x, y in zip(inputs, expected, strict=True):
            # Two layers, each within some roundings of the dense one; as a norm, for single outputs cancel.
            change = (model(x).float() - y.float()).norm() / y.float().norm()
            assert change < 8 * torch.finfo(dtype).eps
        with torch.inference_mode():
            assert model(inputs[2]).shape == (2, 5, 4096)
    assert to_semi_structured(model).converted == []
    assert list(model.state_dict()) == ["0.weight", "0.bias", "2.weight"]
