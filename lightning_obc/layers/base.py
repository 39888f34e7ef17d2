"""What an adapter does: one module's weight and inputs, seen as matrix problems."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_obc.errors import ShapeError, UnsupportedLayerError
from lightning_obc.layers.parametrized import parametrized_value, write_parametrized_


@dataclass(frozen=True)
class ProblemShape:
    """Shape of the matrix problems of one layer.

    Attributes:
        groups: ``g`` independent problems, each with its own Hessian.
        rows: ``R`` output channels of one problem.
        columns: ``d`` inputs of one problem: kernel positions times ``channels``, channels fastest.
        channels: Input channels of one problem; patterns and grids group runs of them at one kernel position.
    """

    groups: int
    rows: int
    columns: int
    channels: int

    @property
    def positions(self) -> int:
        """Kernel positions, ``columns / channels``."""
        return self.columns // self.channels


class LayerAdapter(ABC):
    """Owner of both the flattening of a layer's weight and the unfolding of its input.

    An adapter has no state: one instance serves all modules of its type. The order of columns is (kernel position,
    input channel), channels fastest, everywhere. To support another type of layer, write the abstract methods and call
    :func:`~lightning_obc.layers.register_adapter`.

    Attributes:
        lookup: True for layers whose rows are looked up by index, not multiplied. They are quantized only, have no
            activations to quantize, and implement :meth:`count_rows_`.
    """

    lookup = False

    def weight(self, module: nn.Module) -> Tensor:
        """The live weight, in the layout of the module. In-place changes of it change the module.

        Raises:
            UnsupportedLayerError: The weight is parametrized, so that there is no tensor to change in place.
        """
        if is_parametrized(module, "weight"):
            raise UnsupportedLayerError(
                f"The weight of a {type(module).__name__} is computed by its parametrization",
                expected="a weight that can be changed in place, for masks that hold while training",
                remedy="compress after training, or call torch.nn.utils.parametrize.remove_parametrizations first",
            )
        return self.current(module)

    def current(self, module: nn.Module) -> Tensor:
        """The weight's value, in the layout of the module; may be a computed tensor, so never write to it."""
        return parametrized_value(module) if is_parametrized(module, "weight") else cast(Tensor, module.weight)

    def owner(self, module: nn.Module) -> nn.Module:
        """The module whose forward pass receives the inputs; hooks go there."""
        return module

    @abstractmethod
    def shape(self, module: nn.Module) -> ProblemShape:
        """The matrix problems of the module."""

    @abstractmethod
    def to_matrix_layout(self, module: nn.Module, tensor: Tensor) -> Tensor:
        """A tensor in the shape of the weight (weights, masks, codes) as ``[g, R, d]``; may share memory."""

    @abstractmethod
    def to_module_layout(self, module: nn.Module, matrix: Tensor) -> Tensor:
        """``[g, R, d]`` (weights, masks, codes) in the shape of the module's weight; may share memory."""

    @abstractmethod
    def normalise_inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        """The layer's input with exactly one leading dimension of samples (or windows, or tokens)."""

    @abstractmethod
    def accumulate_(self, module: nn.Module, out: Tensor, x: Tensor) -> None:
        """Add ``Σ x xᵀ`` of a normalised input to the upper triangle of ``out`` ``[g, d, d]`` float64."""

    def accumulate_cross_(self, module: nn.Module, out: Tensor, a: Tensor, b: Tensor) -> None:
        """Add ``Σ a bᵀ`` of two normalised inputs to ``out`` ``[g, d, d]`` float64, all of it.

        Raises:
            UnsupportedLayerError: The adapter does not implement it; only calibration modes that compare a layer's
                inputs before and after compression need it.
        """
        raise UnsupportedLayerError(
            f"The adapter of a {type(module).__name__} cannot compare its inputs before and after compression",
            got=f"{type(self).__name__} without accumulate_cross_",
            expected="an adapter that implements it",
            remedy='use Calibration(mode="independent"), exclude the layer, or implement accumulate_cross_',
        )

    def count_rows_(self, module: nn.Module, out: Tensor, x: Tensor) -> None:
        """Add how often each row is looked up by a normalised input to ``out`` ``[g, R]`` float64."""
        raise UnsupportedLayerError(
            f"The adapter of a {type(module).__name__} does not count its rows",
            got=f"{type(self).__name__} with lookup=True",
            expected="an adapter that implements count_rows_",
        )

    def inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The layer's input tensor among the arguments of its forward pass, normalised.

        Raises:
            UnsupportedLayerError: The layer was called without a tensor.
        """
        found = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if not found:
            raise UnsupportedLayerError(
                f"A {type(module).__name__} was called without a tensor",
                got=[type(value).__name__ for value in (*args, *kwargs.values())],
                expected="one input tensor",
                remedy="exclude the layer, or register an adapter that finds its input",
            )
        return self.normalise_inputs(module, found[0].detach())

    def without_padding(self, module: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
        """A normalised input with zeros where ``mask`` (bool ``[samples, tokens]``) says that a token is padding.

        Layers that do not see tokens, and inputs that do not have the mask's shape, are left as they are.
        """
        return x

    def weight_matrix(self, module: nn.Module) -> Tensor:
        """A detached, contiguous copy of the weight, ``[g, R, d]``, in its own dtype and on its device."""
        matrix = self.to_matrix_layout(module, _gathered(self.current(module).detach()))
        return matrix.clone(memory_format=torch.contiguous_format)

    def write_weight_(self, module: nn.Module, matrix: Tensor) -> None:
        """Write ``[g, R, d]`` into the module's weight in place; the parameter object stays the same.

        A parametrized weight is written through the right inverse of its parametrization, up to rounding.

        Raises:
            ShapeError: The matrix does not have the shape of the module's problems.
            UnsupportedLayerError: The parametrization cannot hold this weight; nothing is changed then.
        """
        self.check_matrix(module, matrix)
        if is_parametrized(module, "weight"):
            write_parametrized_(module, self.to_module_layout(module, matrix))
            return
        weight = self.weight(module)
        with torch.no_grad():
            weight.copy_(_placed_like(self.to_module_layout(module, matrix), weight))

    def check_matrix(self, module: nn.Module, matrix: Tensor) -> None:
        """Raise ShapeError unless ``matrix`` is ``[g, R, d]`` of this module."""
        shape = self.shape(module)
        expected = (shape.groups, shape.rows, shape.columns)
        if tuple(matrix.shape) != expected:
            raise ShapeError(
                f"A matrix does not fit its {type(module).__name__}",
                got=tuple(matrix.shape),
                expected=f"[g, R, d] = {list(expected)}",
            )


def _gathered(weight: Tensor) -> Tensor:
    """The whole weight, also of a sharded (DTensor) parameter."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def _placed_like(value: Tensor, weight: Any) -> Tensor:
    """``value`` in the dtype, and sharded like, ``weight``."""
    value = value.to(weight.device, weight.dtype)
    if not hasattr(weight, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, weight.device_mesh, weight.placements)
