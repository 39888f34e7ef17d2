"""2:4 linear layers on CUDA through PyTorch's own semi-structured tensors, where they are faster on this machine."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_obc.errors import BackendError, ExportError
from lightning_obc.layers import select_layers

Timer = Callable[[nn.Module, Tensor], float]

_DTYPES = (torch.float16, torch.bfloat16)
# Both layers add in float32 and round once to the weight's dtype; a wrong kernel is off by the outputs' own size.
_ROUNDING = 4
# Rows and columns of a weight that PyTorch's kernels take in these dtypes: multiples of
# ``torch.sparse.SparseSemiStructuredTensor…._DTYPE_SHAPE_CONSTRAINTS``. Inputs with any number of rows are padded.
_TILES = {"cusparselt": (16, 16), "cutlass": (32, 64)}


@dataclass(frozen=True)
class Conversion:
    """What was decided for one layer.

    Attributes:
        name: Dotted name.
        converted: True when its weight is a semi-structured tensor now.
        reason: Why, or why not.
        dense: Seconds of the dense layer on ``tokens`` rows; None when it was not measured.
        sparse: Seconds of the semi-structured layer.
    """

    name: str
    converted: bool
    reason: str
    dense: float | None = None
    sparse: float | None = None


@dataclass(frozen=True)
class Conversions:
    """Decisions for all linear layers.

    Attributes:
        layers: In module order.
        tokens: Rows of the inputs that were measured.
    """

    layers: list[Conversion] = field(default_factory=list)
    tokens: int = 0

    @property
    def converted(self) -> list[str]:
        return [layer.name for layer in self.layers if layer.converted]

    def __str__(self) -> str:
        lines = [f"{len(self.converted)} of {len(self.layers)} linear layers converted, {self.tokens} rows of input"]
        return "\n".join([*lines, *(f"{layer.name}: {layer.reason}" for layer in self.layers)])


def kernels() -> str:
    """The kernels that convert here: those of cuSPARSELt, PyTorch's default, or of CUTLASS in builds without it."""
    return "cusparselt" if torch.backends.cusparselt.is_available() else "cutlass"


def is_two_four(weight: Tensor) -> bool:
    """True when every 4 consecutive entries of a row ``[R, d]`` hold at most 2 non-zeros."""
    if is_converted(weight) or weight.shape[-1] % 4:
        return False
    return bool((weight.detach().reshape(-1, 4).count_nonzero(-1) <= 2).all())


def is_converted(weight: Tensor) -> bool:
    """True for a weight that is a semi-structured tensor already, which few operations can read."""
    return isinstance(weight, torch.sparse.SparseSemiStructuredTensor)


def reason_against(weight: Tensor, backend: str | None = None) -> str | None:
    """Why PyTorch's semi-structured tensors cannot hold a weight ``[R, d]``, or None.

    Args:
        weight: The weight.
        backend: ``"cusparselt"`` or ``"cutlass"``; default :func:`kernels`.
    """
    if is_converted(weight):
        return "it is a semi-structured tensor already"
    if weight.dtype not in _DTYPES:
        return f"its weight is {weight.dtype}; float16 or bfloat16 is needed"
    rows, columns = _TILES[backend or kernels()]
    if weight.shape[0] % rows or weight.shape[1] % columns:
        return f"its shape {tuple(weight.shape)} is no multiple of {rows}×{columns}"
    if not is_two_four(weight):
        return "its zeros are not 2:4"
    return None


def cuda_timer(repeats: int = 20, rounds: int = 7) -> Timer:
    """Median seconds of a module's forward on the GPU, by CUDA events around several runs."""

    def time(module: nn.Module, x: Tensor) -> float:
        samples = []
        for _ in range(rounds + 2):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(repeats):
                module(x)
            end.record()
            end.synchronize()
            samples.append(begin.elapsed_time(end) / 1e3 / repeats)
        return statistics.median(samples[2:])

    return time


def to_sparse(weight: Tensor) -> Tensor:
    """A weight as PyTorch's semi-structured tensor."""
    from torch.sparse import SparseSemiStructuredTensorCUTLASS, to_sparse_semi_structured

    dense = weight.detach().contiguous()
    if kernels() == "cutlass":
        # PyTorch asks for cuSPARSELt whether its build has it or not.
        found: Tensor = SparseSemiStructuredTensorCUTLASS.from_dense(dense)
        return found
    sparse: Tensor = to_sparse_semi_structured(dense)
    return sparse


def to_semi_structured(
    model: nn.Module,
    *,
    tokens: int = 1024,
    min_speedup: float = 1.05,
    layers: list[str] | None = None,
    timer: Timer | None = None,
    convert: Callable[[Tensor], Tensor] | None = None,
) -> Conversions:
    """Convert the 2:4 linear layers of a model in place, for inference, where that is faster.

    State-dict keys stay; converted weights are semi-structured tensors that take no gradient. A layer is converted only
    after its outputs were compared with the dense layer's, for inputs with two and with three dimensions. Inputs must
    have the weight's dtype and, with three dimensions, be contiguous. Layers that are converted already are left alone.

    Args:
        model: On a CUDA device, in float16 or bfloat16.
        tokens: Rows of the input that each layer is measured with (batch times tokens).
        min_speedup: Dense time over sparse time from which a layer is converted.
        layers: Names, globs or type names; default all linear layers.
        timer: ``timer(module, x)`` in seconds; default CUDA events.
        convert: Makes the semi-structured tensor; default PyTorch's.

    Raises:
        BackendError: The model is not on a CUDA device that has 2:4 kernels.
        ExportError: It has no 2:4 linear layer at all.
    """
    linear = {name: m for name, m in select_layers(model, layers).items() if type(m) is nn.Linear}
    if timer is None:
        _check_device(linear)
    if not any(is_converted(module.weight) or is_two_four(module.weight) for module in linear.values()):
        raise ExportError(
            "The model has no 2:4 linear layer",
            got=f"{len(linear)} linear layers",
            expected="at least one whose zeros are 2:4",
            remedy='prune with Prune("2:4") first',
        )
    time, make = timer or cuda_timer(), convert or to_sparse
    return Conversions([_decide(n, m, tokens, min_speedup, time, make) for n, m in linear.items()], tokens)


def _check_device(linear: Mapping[str, nn.Linear]) -> None:
    devices = {module.weight.device for module in linear.values()}
    if any(device.type != "cuda" for device in devices) or not devices:
        raise BackendError(
            "2:4 kernels run on CUDA devices only",
            got=f"weights on {', '.join(sorted(map(str, devices))) or 'no device'}",
            expected="a model on a CUDA device of compute capability 8.0 or higher",
            remedy="move the model with model.cuda(); on CPUs export_onnx makes int8 files that are faster",
        )
    for device in devices:
        if torch.cuda.get_device_capability(device) < (8, 0):
            raise BackendError(
                "The GPU has no 2:4 kernels",
                got=f"compute capability {torch.cuda.get_device_capability(device)}",
                expected="8.0 or higher",
            )


@torch.no_grad()
def _decide(
    name: str, module: nn.Linear, tokens: int, min_speedup: float, timer: Timer, convert: Callable[[Tensor], Tensor]
) -> Conversion:
    weight = module.weight
    if reason := reason_against(weight):
        return Conversion(name, False, reason if is_converted(weight) else f"left dense: {reason}")
    x = torch.randn(tokens, weight.shape[1], dtype=weight.dtype, device=weight.device)
    try:
        sparse = nn.Parameter(convert(weight), requires_grad=False)
        candidate: Any = copy.copy(module)
        candidate._parameters = {**module._parameters, "weight": sparse}
        if (error := _difference(module, candidate, x)) > _ROUNDING * torch.finfo(weight.dtype).eps:
            return Conversion(name, False, f"left dense: its outputs would change by {error:.2g}")
        dense_time, sparse_time = timer(module, x), timer(candidate, x)
    except RuntimeError as failure:  # also NotImplementedError, and memory that is not there
        return Conversion(name, False, f"left dense: {str(failure).splitlines()[0]}")
    speedup = dense_time / sparse_time
    if speedup < min_speedup:
        reason = f"left dense: {speedup:.2f}× is below {min_speedup}×"
        return Conversion(name, False, reason, dense_time, sparse_time)
    module.weight = sparse
    return Conversion(name, True, f"{speedup:.2f}× faster", dense_time, sparse_time)


def _difference(dense: nn.Module, sparse: nn.Module, x: Tensor) -> float:
    """Largest relative difference of outputs: of all rows, of an odd number of them, and of a batch of sequences."""
    found = [0.0]
    for part in (x, x[:3], x[:6].reshape(2, -1, x.shape[-1]) if len(x) > 5 else x[:1, None]):
        expected = dense(part).float()
        change = (sparse(part).float() - expected).norm() / expected.norm().clamp(min=1e-30)
        found.append(float(change) if bool(torch.isfinite(change)) else float("inf"))
    return max(found)
