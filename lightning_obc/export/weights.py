"""What export knows of a compressed weight: mask, codes and grid, checked against the model that carries it.

Index legend: ``g`` problems of a layer, ``R`` rows, ``d`` columns (kernel position, input channel; channels fastest),
``C`` column groups of ``d / C`` consecutive columns (1 unless the grid has a scale per group).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Union

import torch
from torch import Tensor, nn

from lightning_obc.brief import Brief
from lightning_obc.errors import ExportError, LayerNotFoundError, ShapeError
from lightning_obc.grids import Grid
from lightning_obc.layers import LayerAdapter, adapter_for, normalise_name, parts_of
from lightning_obc.obs.solution import LayerSolution


@dataclass(frozen=True, repr=False)
class CompressedWeight(Brief):
    """One compressed weight in matrix layout, on the CPU.

    Attributes:
        mask: ``[g, R, d]`` bool, True = kept.
        codes: ``[g, R, d]`` uint8 codes in ``0 .. 2**bits - 1``; None when the weight is pruned only.
        scale: ``[g, R, C]`` positive floating point; value of a code ``(code - zero_point) * scale``.
        zero_point: ``[g, R, C]`` integers in ``0 .. 2**bits - 1``, in the dtype of ``scale``.
        bits: Bit width of the codes, 1 to 8.
        symmetric: True when the zero point is fixed in the middle of the codes.

    Raises:
        ShapeError: A tensor has the wrong shape or dtype.
    """

    mask: Tensor
    codes: Tensor | None = None
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    bits: int | None = None
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.mask.dim() != 3 or self.mask.dtype != torch.bool:
            raise ShapeError(
                "A mask has the wrong form", got=f"{self.mask.dtype} {list(self.mask.shape)}", expected="bool [g, R, d]"
            )
        if self.codes is not None:
            self._check_grid()

    def _check_grid(self) -> None:
        if self.scale is None or self.zero_point is None or self.bits is None:
            raise ShapeError("Codes come without their grid", expected="codes, scale, zero_point and bits together")
        assert self.codes is not None
        shape, scales = tuple(self.mask.shape), tuple(self.scale.shape)
        ok = tuple(self.codes.shape) == shape and self.codes.dtype == torch.uint8
        ok = ok and len(scales) == 3 and scales[:2] == shape[:2] and tuple(self.zero_point.shape) == scales
        if not ok or shape[2] % scales[2]:
            raise ShapeError(
                "Codes and grid of a weight do not belong together",
                got=f"mask {list(shape)}, codes {self.codes.dtype} {list(self.codes.shape)}, scale {list(scales)}",
                expected="uint8 codes [g, R, d] and scales [g, R, C] with C a divisor of d",
            )
        zero = self.expand(self.zero_point)
        # Compared as Python integers: 2**8 does not fit the codes' own type.
        if int(self.codes.max()) >= 2**self.bits or bool((self.codes != zero)[~self.mask].any()):
            raise ShapeError(
                "Codes leave their grid",
                got=f"largest code {int(self.codes.max())} of {self.bits} bits, or a pruned weight off the zero point",
                expected="codes below 2**bits, and the zero point wherever the mask is False",
            )

    @classmethod
    def from_solution(cls, solution: LayerSolution) -> CompressedWeight:
        """Take over what the engine returned; nothing is derived again."""
        if solution.grid is None or solution.codes is None:
            return cls(solution.mask.detach().cpu())
        return cls._on_grid(solution.mask, solution.codes, solution.grid)

    @classmethod
    def from_weight(cls, weight: Tensor, mask: Tensor | None = None, grid: Grid | None = None) -> CompressedWeight:
        """From a weight ``[g, R, d]`` that lies on its grid and its mask, as a callback holds them.

        Raises:
            ExportError: A weight is not on the grid.
        """
        mask = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask
        if grid is None:
            return cls(mask.detach().cpu())
        codes = grid.encode(weight.detach().to(grid.scale))
        if not torch.equal(grid.dequantize(codes).to(weight.dtype), weight.detach()):
            raise ExportError(
                "A weight is off its grid", expected="weights that the grid represents exactly", remedy="quantize again"
            )
        return cls._on_grid(mask, codes, grid)

    @classmethod
    def _on_grid(cls, mask: Tensor, codes: Tensor, grid: Grid) -> CompressedWeight:
        scale, zero = grid.scale.detach().cpu(), grid.zero_point.detach().cpu()
        weight = cls(mask.detach().cpu(), codes.detach().cpu(), scale, zero, grid.spec.bits, grid.spec.symmetric)
        if not torch.equal(weight.expand(scale), grid.expand(grid.scale, codes.shape[-1]).cpu()):
            raise ShapeError(
                "The column groups of a grid are not runs of equal length",
                got=f"{scale.shape[-1]} groups over {codes.shape[-1]} columns",
                expected="group i holding columns i·S to (i+1)·S",
            )
        return weight

    def expand(self, tensor: Tensor) -> Tensor:
        """Spread ``[g, R, C]`` over the columns, ``[g, R, d]``."""
        return tensor.repeat_interleave(self.mask.shape[-1] // tensor.shape[-1], dim=-1)

    def dequantize(self) -> Tensor:
        """Values ``[g, R, d]`` of the codes in the dtype of ``scale``; zeros are ``+0.0``.

        Raises:
            ExportError: The weight is not quantized.
        """
        if self.codes is None or self.scale is None or self.zero_point is None:
            raise ExportError("A weight without codes has nothing to dequantize", expected="a quantized weight")
        zero, scale = self.expand(self.zero_point), self.expand(self.scale)
        return (self.codes.to(scale.dtype) - zero) * scale + 0.0


Solutions = Mapping[str, Union[LayerSolution, CompressedWeight]]


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """All modules and parts by the names that solutions use (without the ``_orig_mod`` of compiled modules)."""
    named: dict[str, nn.Module] = {}
    for full_name, module in model.named_modules(remove_duplicate=False):
        name = normalise_name(full_name)
        named[name] = module
        named |= {f"{name}.{label}" if name else label: part for label, part in parts_of(module).items()}
    return named


def weight_keys(model: nn.Module, names: Iterable[str]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The parameters that each layer's weight is: one, or several names of the same one when weights are tied.

    Returns:
        Names of parameters by layer, and the layers whose weight is no parameter of its own, with the reason.
    """
    modules = named_layers(model)
    owners: dict[int, list[str]] = {}
    for key, parameter in getattr(model, "_orig_mod", model).named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(normalise_name(key))
    keys: dict[str, list[str]] = {}
    left: dict[str, str] = {}
    for name in names:
        module, adapter = layer_adapter(name, modules)
        weight = adapter.current(module)
        if id(weight) in owners:
            keys[name] = owners[id(weight)]
        else:
            left[name] = "its weight is computed from other parameters; stored as they are"
    return keys, left


def layer_adapter(name: str, modules: Mapping[str, nn.Module]) -> tuple[nn.Module, LayerAdapter]:
    """A compressed layer's module and adapter.

    Raises:
        LayerNotFoundError: The model has no such layer.
        ExportError: No adapter handles it.
    """
    module = modules.get(name)
    if module is None:
        raise LayerNotFoundError(
            "A compressed layer is not in the model",
            got=repr(name),
            expected=f"one of {', '.join(list(modules)[1:6])}, …",
            remedy="pass the model that was compressed",
        )
    adapter = adapter_for(module)
    if adapter is None:
        raise ExportError(
            f"Layer {name!r} has no adapter", got=type(module).__name__, remedy="register the adapter that solved it"
        )
    return module, adapter


def compressed_state(model: nn.Module, solutions: Solutions) -> dict[str, CompressedWeight]:
    """The compressed weights of a model, checked against the weights it carries now.

    Args:
        model: The compressed model; not changed.
        solutions: By layer name, such as ``CompressionReport.solutions``, or already :class:`CompressedWeight`.

    Raises:
        LayerNotFoundError, ShapeError: The solutions belong to another model.
        ExportError: A weight is no longer what its solution says; every such layer is named.
    """
    modules = named_layers(model)
    state: dict[str, CompressedWeight] = {}
    stale: dict[str, str] = {}
    for name, solution in solutions.items():
        weight = solution if isinstance(solution, CompressedWeight) else CompressedWeight.from_solution(solution)
        module, adapter = layer_adapter(name, modules)
        adapter.check_matrix(module, weight.mask)
        if difference := _difference(weight, adapter.weight_matrix(module).cpu()):
            stale[name] = difference
        state[name] = weight
    if stale:
        raise ExportError(
            "The model's weights are not the compressed ones",
            got="; ".join(f"{name}: {what}" for name, what in stale.items()),
            expected="the weights that the solutions describe",
            remedy="export right after compression, keep the masks during training, and quantize again after training",
        )
    return state


def _difference(weight: CompressedWeight, current: Tensor) -> str | None:
    """How the model's weight ``[g, R, d]`` departs from its record, or None."""
    grown = int(torch.count_nonzero(current[~weight.mask]))
    if grown:
        return f"{grown} pruned weights are not zero"
    if weight.codes is not None:
        expected = weight.dequantize().to(current.dtype)
        moved = int((expected != current).sum())
        if moved:
            return f"{moved} of {current.numel()} weights are off their grid points"
    return None


def as_tensor_state(weight: CompressedWeight) -> dict[str, Any]:
    """Only primitives and tensors, as checkpoints keep it; ``CompressedWeight(**state)`` is the way back."""
    return {
        "mask": weight.mask,
        "codes": weight.codes,
        "scale": weight.scale,
        "zero_point": weight.zero_point,
        "bits": weight.bits,
        "symmetric": weight.symmetric,
    }
