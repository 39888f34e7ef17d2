"""Layers whose weight is one matrix: one problem, one column per input feature; and the linear ones among them."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_obc.kernels.hessian_update import accumulate_cross_linear_, accumulate_linear_
from lightning_obc.layers.base import LayerAdapter, ProblemShape


class OneMatrix(LayerAdapter):
    """Base of the adapters whose weight is one matrix ``[R, d]`` already, a column per input feature."""

    def shape(self, module: nn.Module) -> ProblemShape:
        rows, columns = self.current(module).shape
        return ProblemShape(groups=1, rows=rows, columns=columns, channels=columns)

    def to_matrix_layout(self, module: nn.Module, tensor: Tensor) -> Tensor:
        return tensor.unsqueeze(0)

    def to_module_layout(self, module: nn.Module, matrix: Tensor) -> Tensor:
        return matrix.squeeze(0)


class OneProduct(OneMatrix):
    """Such a weight that multiplies the last dimension of its input."""

    def accumulate_(self, module: nn.Module, out: Tensor, x: Tensor) -> None:
        accumulate_linear_(out, x.reshape(-1, 1, x.shape[-1]))

    def accumulate_cross_(self, module: nn.Module, out: Tensor, a: Tensor, b: Tensor) -> None:
        accumulate_cross_linear_(out, a.reshape(-1, 1, a.shape[-1]), b.reshape(-1, 1, b.shape[-1]))


class LinearAdapter(OneProduct):
    """``nn.Linear``; inputs have any number of leading dimensions."""

    def normalise_inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        return x.unsqueeze(0) if x.dim() == 1 else x

    def without_padding(self, module: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
        """Tokens lie in the two leading dimensions, or folded into one."""
        if x.shape[:-1] != mask.shape and x.shape[:-1] != (mask.numel(),):
            return x
        return x.masked_fill(~mask.reshape(*x.shape[:-1], 1), 0)


class TransposedLinearAdapter(LinearAdapter):
    """The ``Conv1D`` of transformers: a linear layer whose weight is ``[inputs, outputs]``."""

    def shape(self, module: nn.Module) -> ProblemShape:
        columns, rows = self.current(module).shape
        return ProblemShape(groups=1, rows=rows, columns=columns, channels=columns)

    def to_matrix_layout(self, module: nn.Module, tensor: Tensor) -> Tensor:
        return tensor.T.unsqueeze(0)

    def to_module_layout(self, module: nn.Module, matrix: Tensor) -> Tensor:
        return matrix.squeeze(0).T
