"""What a level costs: FLOPs, BOPs and bytes. The baseline of every relative figure is the dense float32 model.

Conventions, per sample (an image or a sequence, whose tokens are counted):

* FLOPs: positions × kept weights. One multiplication with its addition counts once; biases are free.
* BOPs: positions × kept weights × weight bits × activation bits; floating point counts as 32 bits. With ``mask_cost``
  every weight under a pattern of zeros adds one bit operation a position, the test of its mask bit.
* bytes: 4 for a floating-point weight. A quantized weight needs its bits, 4 bytes per scale and its bits per zero
  point. N:M stores n of m values and ``ceil(log2 C(m, n))`` bits a group; other zeros one bit per weight (or block),
  unless storing all values is smaller. This is the convention of the metrics, too. A search counts all other
  parameters of the model (embeddings, norms, biases) with 4 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_obc.allocation.levels import FLOAT_BITS, Level
from lightning_obc.calibration import batch_size_of, call_forward
from lightning_obc.calibration.collect import eager_forward, undisturbed
from lightning_obc.calibration.rng import preserved_rng
from lightning_obc.errors import LayerNotReachedError, SpecError
from lightning_obc.layers import adapter_for
from lightning_obc.layers.parts import LayerPart
from lightning_obc.specs import NM, Block

BASELINE = "the dense float32 model"
CostName = Literal["flops", "bops", "bytes"]
CostTable = dict[str, dict[str, float]]


@dataclass(frozen=True)
class LevelSize:
    """What is left of a weight at a level.

    Attributes:
        level: The level.
        weights: Weights of the layer, zeros included.
        kept: Weights that are not pruned.
        scales: Scales of the grid, 0 without one.
    """

    level: Level
    weights: int
    kept: int
    scales: int = 0

    @classmethod
    def dense(cls, weights: int) -> LevelSize:
        return cls(Level(), weights, weights)


def flops(size: LevelSize, positions: float) -> float:
    """Multiply-accumulates per sample."""
    return positions * size.kept


def bops(size: LevelSize, positions: float, *, mask_cost: bool = False) -> float:
    """Bit operations per sample."""
    level = size.level
    total = positions * size.kept * level.weight_bits * level.activation_bits
    return total + (positions * size.weights if mask_cost and level.pattern is not None else 0.0)


def stored_bytes(size: LevelSize) -> float:
    """Bytes of the weight on disk."""
    level, bits = size.level, size.level.weight_bits
    grid = size.scales * (FLOAT_BITS + bits)
    if isinstance(level.pattern, NM):
        groups = size.weights / level.pattern.m
        index = groups * math.ceil(math.log2(math.comb(level.pattern.m, level.pattern.n)))
        return (groups * level.pattern.n * bits + index + grid) / 8
    block = level.pattern.size if isinstance(level.pattern, Block) else 1
    sparse = size.kept * bits + size.weights / block
    return (min(sparse, size.weights * bits) + grid) / 8


def level_cost(name: CostName, size: LevelSize, positions: float, *, mask_cost: bool = False) -> float:
    """One of the costs by its name.

    Raises:
        SpecError: The name is unknown.
    """
    if name == "flops":
        return flops(size, positions)
    if name == "bops":
        return bops(size, positions, mask_cost=mask_cost)
    if name == "bytes":
        return stored_bytes(size)
    raise SpecError(
        "Unknown cost", got=repr(name), expected='"flops", "bops", "bytes", or a LatencyTable for measured time'
    )


def cost_table(
    name: CostName,
    sizes: Mapping[str, Mapping[str, LevelSize]],
    positions: Mapping[str, float],
    *,
    mask_cost: bool = False,
) -> CostTable:
    """Costs ``{layer: {level: cost}}`` of every level in ``sizes``."""
    return {
        layer: {
            level: level_cost(name, size, positions[layer], mask_cost=mask_cost) for level, size in by_level.items()
        }
        for layer, by_level in sizes.items()
    }


def count_positions(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batch: Any,
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    skip_unreached: bool = False,
) -> dict[str, float]:
    """How often each weight of a layer is used per sample, counted by hooks on one batch.

    A linear layer counts its tokens (padded ones too), a convolution its output pixels, a transposed one its input
    pixels.

    Raises:
        LayerNotReachedError: The batch does not pass through a layer, unless ``skip_unreached`` leaves it out.

    Args:
        model: Run once, in evaluation mode; modes are as before afterwards.
        layers: Layers to count, by name.
        batch: One calibration batch.
        forward: ``forward(model, batch)``; None means the default of calibration.
        skip_unreached: Leave out layers that the batch does not reach, instead of raising.

    Returns:
        Uses per sample by layer name.
    """
    totals = dict.fromkeys(layers, 0.0)
    handles = []
    with preserved_rng(), undisturbed(model), eager_forward(), torch.no_grad():
        try:
            for name, module in layers.items():
                adapter = adapter_for(module)
                owner = module if adapter is None else adapter.owner(module)
                handles.append(owner.register_forward_hook(_counter(totals, name, module), with_kwargs=True))
            (forward or call_forward)(model, batch)
        finally:
            for handle in handles:
                handle.remove()
    missing = [name for name, total in totals.items() if total == 0]
    if missing and not skip_unreached:
        raise LayerNotReachedError(
            "The batch does not pass through some layers, so that their cost is unknown",
            got=", ".join(missing),
            expected="every layer to be called",
            remedy="exclude the layers, or pass another batch",
        )
    samples = batch_size_of(batch)
    return {name: total / samples for name, total in totals.items() if total > 0}


def _counter(totals: dict[str, float], name: str, module: nn.Module) -> Callable[..., None]:
    def hook(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        totals[name] += _positions(module, args, kwargs, output)

    return hook


def _positions(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> float:
    if isinstance(module, nn.modules.conv._ConvNd) and not getattr(module, "transposed", False):
        return output.numel() / module.out_channels
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        tensor = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        return tensor.numel() / module.in_channels
    adapter = adapter_for(module)
    if adapter is None:
        return 0.0
    inputs = adapter.inputs(module, args, kwargs)
    if isinstance(module, LayerPart):
        return inputs.shape[0] * inputs.shape[1]
    shape = adapter.shape(module)
    return inputs.numel() / (shape.groups * shape.columns)
