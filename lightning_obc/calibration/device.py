"""What calibration takes of the device that computes, where the model itself stays on the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lightning_obc.calibration.memory import half_bytes, on_host, statistic_bytes
from lightning_obc.calibration.offload import execution_device, tensors_of, unit_bytes
from lightning_obc.errors import DeviceMemoryError
from lightning_obc.layers import ProblemShape, adapter_for
from lightning_obc.specs import Calibration


@dataclass(frozen=True)
class DeviceNeed:
    """Bytes of the device that a calibration pass takes, without the activations of a batch.

    Attributes:
        layers: Layers that the pass is for.
        weights: Parameters and buffers of the block around them, or of their own modules.
        statistics: Their statistics, as far as these are on the device, and the working copy of others.
        solving: What solving the largest of the layers takes beside the statistics, when the block is gone again.
    """

    layers: tuple[str, ...]
    weights: int
    statistics: int
    solving: int

    @property
    def total(self) -> int:
        return self.statistics + max(self.weights, self.solving)


def device_needs(
    model: nn.Module, passes: Sequence[Mapping[str, nn.Module]], spec: Calibration
) -> tuple[DeviceNeed, ...]:
    """What each pass takes of ``spec.execution_device``; nothing where the model is on it already.

    Raises:
        SpecError: There is no such device.
        DeviceMemoryError: One pass alone needs more than ``spec.device_memory``, or than is free on the device.
    """
    device = execution_device(spec.execution_device)
    if device is None or all(tensor.device == device for tensor in tensors_of(model)):
        return ()
    needs = tuple(_need(model, layers, spec) for layers in passes)
    limit = free_bytes(device) if spec.device_bytes is None else spec.device_bytes
    if limit is not None:
        _check(needs, limit, device)
    return needs


def _need(model: nn.Module, layers: Mapping[str, nn.Module], spec: Calibration) -> DeviceNeed:
    shapes = {name: adapter.shape(module) for name, module in layers.items() if (adapter := adapter_for(module))}
    weights = unit_bytes(model, layers)
    away = on_host(shapes, spec, weights)
    statistics = sum(statistic_bytes(shape, spec.paired) for name, shape in shapes.items() if name not in away)
    working = max((half_bytes(shapes[name]) for name in away), default=0)
    solving = max(_solving(shape) for shape in shapes.values())
    return DeviceNeed(tuple(layers), weights, statistics + working, solving)


def _solving(shape: ProblemShape) -> int:
    """Counted on runs of all solvers at 64×256 to 256×256: six matrices ``[d, d]`` in float64 (the mean Hessian, damped
    and factored, its inverse, temporary ones), and about six copies of the weights in float64. Chunks of rows of the
    OBS sweeps come on top, and keep to what is free."""
    return 6 * half_bytes(shape) + 6 * 8 * shape.groups * shape.rows * shape.columns


def _check(needs: Sequence[DeviceNeed], limit: int, device: torch.device) -> None:
    too_large = [need for need in needs if need.total > limit]
    if not too_large:
        return
    named = "; ".join(
        f"{', '.join(need.layers)}: {need.weights / 2**20:.1f} MiB of weights and buffers and "
        f"{need.statistics / 2**20:.1f} MiB of statistics, {need.solving / 2**20:.1f} MiB to solve the largest layer"
        for need in too_large
    )
    raise DeviceMemoryError(
        f"Not even one block fits the memory of {device}",
        got=named,
        expected=f"at most {limit / 2**20:.1f} MiB at once",
        remedy="raise device_memory; set it, so that statistics are kept in host memory; calibrate fewer layers of a "
        "block at once with memory; or exclude these layers",
    )


def free_bytes(device: torch.device) -> int | None:
    """Free memory of an accelerator; None where it cannot be told, and for the host."""
    ask: Callable[[torch.device], tuple[int, int]] | None = getattr(
        getattr(torch, device.type, None), "mem_get_info", None
    )
    return None if ask is None or device.type == "cpu" else ask(device)[0]
