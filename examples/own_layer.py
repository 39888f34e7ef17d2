"""An adapter for a layer of your own: one linear map per head, which no built-in adapter knows.

    python -m examples.own_layer

An adapter says how a layer's weight and its inputs become matrix problems: ``g`` weights ``[R, d]`` and, for each, the
sum of ``x xᵀ`` over the inputs. Everything else (masks, grids, reports, export) follows from that.
"""

from __future__ import annotations

import torch
from jsonargparse import auto_cli
from torch import Tensor, nn

import lightning_obc as obc
from lightning_obc.layers import LayerAdapter, ProblemShape, register_adapter


class PerHead(nn.Module):
    """``[batch, heads, inputs]`` to ``[batch, heads, outputs]``, every head by a matrix of its own."""

    def __init__(self, heads: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(heads, inputs, outputs) / inputs**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bhi,hio->bho", x, self.weight)


class PerHeadAdapter(LayerAdapter):
    """One problem per head: ``g`` heads, ``R`` outputs, ``d`` inputs."""

    def shape(self, module: nn.Module) -> ProblemShape:
        heads, inputs, outputs = module.weight.shape
        return ProblemShape(groups=heads, rows=outputs, columns=inputs, channels=inputs)

    def to_matrix_layout(self, module: nn.Module, tensor: Tensor) -> Tensor:
        return tensor.mT

    def to_module_layout(self, module: nn.Module, matrix: Tensor) -> Tensor:
        return matrix.mT

    def normalise_inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        return x

    def accumulate_(self, module: nn.Module, out: Tensor, x: Tensor) -> None:
        x = x.to(out.dtype)
        out += torch.einsum("bhi,bhj->hij", x, x)


def main() -> dict[str, float]:
    """Quantize a small model with such a layer, and compare with rounding every weight to the nearest point."""
    register_adapter(PerHead, PerHeadAdapter(), override=True)
    errors = {}
    for name, stage in (("OBC", obc.Quantize(3)), ("nearest", obc.Quantize(3, solver="rtn"))):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Unflatten(1, (4, 16)), PerHead(4, 16, 8))
        mixing = torch.randn(32, 32) / 32**0.5
        x = torch.randn(600, 32) @ mixing
        dense = model(x[500:]).detach()
        report = obc.compress(model, x[:500].split(50), stage)
        error = (model(x[500:]) - dense).square().sum() / dense.square().sum()
        errors[name] = float(error.detach())
        if name == "OBC":
            print(report.table())
    print(
        f"relative squared error of the outputs on unseen inputs, 3 bits: {100 * errors['OBC']:.2f} % "
        f"(nearest rounding: {100 * errors['nearest']:.2f} %)"
    )
    return errors


if __name__ == "__main__":
    auto_cli(main)
