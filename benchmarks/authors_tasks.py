"""The layers and tasks of :mod:`benchmarks.authors`: how either code is asked for the same result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.upstream import Upstream
from lightning_obc import obs
from lightning_obc.baselines import gptq, sparsegpt
from lightning_obc.obs import LayerSolution
from lightning_obc.specs import IntGrid

DAMPING = 0.01
LEVELS = (0.5, 0.75, 0.9)
BLOCK = 128
# Of the same mask OBS has the best weights, of the same codes both have the same weights: then rounding changes a loss
# in second order only, and ours is never above theirs by more. SparseGPT's weights are no minimum: d steps round each
# of them, and the loss follows in first order, by up to d·eps.
EXCESS = 1e-6
EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Layer:
    """One layer: ``weight [R, d]`` float32 and undamped ``hessian [d, d]`` float64; what it is, in words."""

    name: str
    weight: Tensor
    hessian: Tensor


@dataclass(frozen=True)
class Case:
    """One task for both codes.

    Attributes:
        code: Option of the checkout that is compared with.
        theirs: Calls it (see :func:`benchmarks.upstream.run`).
        ours: Solves a weight under a Hessian, one solution for every level.
        codes: True when weights are quantized, False when they are pruned.
        by_row: True when no row's result depends on another row.
    """

    code: str
    theirs: Callable[[Upstream, Any, nn.Linear], list[Tensor] | None]
    ours: Callable[[Tensor, Tensor], list[LayerSolution]]
    codes: bool = False
    by_row: bool = True

    def excess(self, columns: int) -> float:
        """By how much a row of ours may be worse than theirs with the same mask or codes."""
        return columns * EPS if self.code == "sparsegpt" else EXCESS


def _grid(upstream: Upstream, bits: int, symmetric: bool = False) -> Any:
    made = upstream.quantizer()
    made.configure(bits, perchannel=True, sym=symmetric, mse=True)
    return made


def _unstructured(levels: tuple[float, ...]) -> Case:
    def theirs(upstream: Upstream, solver: Any, layer: nn.Linear) -> list[Tensor]:
        solver.prepare_unstr()
        return list(solver.prune_unstr(list(levels)))

    def ours(weight: Tensor, hessian: Tensor) -> list[LayerSolution]:
        return obs.sweep(weight, hessian, damping=DAMPING).solutions(levels, "sorted")

    return Case("checkout", theirs, ours, by_row=False)


def _blocks(levels: tuple[float, ...], size: int = 4) -> Case:
    def theirs(upstream: Upstream, solver: Any, layer: nn.Linear) -> list[Tensor]:
        solver.prepare_blocked(size)
        return list(solver.prune_blocked(list(levels)))

    def ours(weight: Tensor, hessian: Tensor) -> list[LayerSolution]:
        swept = obs.sweep_blocks(weight, hessian, size, damping=DAMPING)
        return [swept.solution(level, "sorted") for level in levels]

    return Case("checkout", theirs, ours, by_row=False)


def _nm(n: int, m: int) -> Case:
    def theirs(upstream: Upstream, solver: Any, layer: nn.Linear) -> None:
        solver.nmprune(m - n, m)

    return Case("checkout", theirs, lambda weight, hessian: [obs.prune(weight, hessian, f"{n}:{m}", damping=DAMPING)])


def _codes(bits: int, symmetric: bool = False, order: Any = "greedy") -> Case:
    def theirs(upstream: Upstream, solver: Any, layer: nn.Linear) -> None:
        solver.quantizer = _grid(upstream, bits, symmetric)
        solver.quantize()

    def ours(weight: Tensor, hessian: Tensor) -> list[LayerSolution]:
        grid = IntGrid(bits, symmetric=symmetric)
        return [obs.quantize(weight, hessian, grid, mask=weight != 0, damping=DAMPING, order=order)]

    return Case("checkout", theirs, ours, codes=True)


def _gptq(bits: int, act_order: bool) -> Case:
    def theirs(upstream: Upstream, solver: Any, layer: nn.Linear) -> None:
        solver.quantizer = _grid(upstream, bits)
        solver.fasterquant(blocksize=BLOCK, percdamp=DAMPING, actorder=act_order)

    def ours(weight: Tensor, hessian: Tensor) -> list[LayerSolution]:
        return [gptq(weight, hessian, bits, damping=DAMPING, act_order=act_order, block=BLOCK)]

    return Case("gptq", theirs, ours, codes=True)


def _sparsegpt(pattern: str | float) -> Case:
    def theirs(upstream: Upstream, solver: Any, layer: nn.Linear) -> None:
        if isinstance(pattern, str):
            n, m = map(int, pattern.split(":"))
            solver.fasterprune(0, prunen=m - n, prunem=m, blocksize=BLOCK, percdamp=DAMPING)
        else:
            # It removes one weight more in every block of columns than the level asks for.
            block = layer.out_features * min(BLOCK, layer.in_features)
            solver.fasterprune(pattern - 0.5 / block, blocksize=BLOCK, percdamp=DAMPING)

    def ours(weight: Tensor, hessian: Tensor) -> list[LayerSolution]:
        return [sparsegpt(weight, hessian, pattern, damping=DAMPING, block=BLOCK)]

    return Case("sparsegpt", theirs, ours, by_row=isinstance(pattern, str))


CASES: dict[str, Case] = {
    "unstructured 50, 75, 90 %": _unstructured(LEVELS),
    "2:4": _nm(2, 4),
    "blocks of 4, 50, 75, 90 %": _blocks(LEVELS),
    "4 bits": _codes(4),
    "2 bits": _codes(2),
    "4 bits symmetric": _codes(4, symmetric=True),
    "4 bits after 2:4": _codes(4),
    "GPTQ 4 bits": _gptq(4, act_order=False),
    "GPTQ 4 bits, act order": _gptq(4, act_order=True),
    "SparseGPT 50 %": _sparsegpt(0.5),
    "SparseGPT 2:4": _sparsegpt("2:4"),
}


def random_layers(rows: int = 64, columns: int = 576) -> Iterator[Layer]:
    """Rectified, correlated inputs, two samples per column."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(columns, 2 * columns, generator=generator)
    x = (x + mix @ x).clamp(min=0)
    weight = torch.randn(rows, columns, generator=generator) / columns**0.5
    yield Layer("random", weight, (x @ x.mT).double() / columns)


def digits_layers() -> Iterator[Layer]:
    """The stem, a small and the largest convolution and the output layer of the trained digits CNN."""
    from benchmarks.networks import digits

    for layer in digits().layers:
        if layer.name in ("stem.0", "stages.0.conv1", "stages.2.conv2", "head"):
            yield Layer(f"digits {layer.name}", layer.weight[0], layer.calibration.full()[0])


def encoder_layers() -> Iterator[Layer]:
    """Rows of two layers of the sentence encoder, 384 and 1536 inputs."""
    from benchmarks.networks import encoder

    names = ("encoder.layer.0.attention.self.query", "encoder.layer.5.output.dense")
    for layer in encoder(names, sequences=96, weights=48 * 384).layers:
        weight = layer.weight[0][: 4 if layer.weight.shape[2] > 1000 else 48]
        yield Layer(f"encoder {layer.name.removeprefix('encoder.')}", weight.contiguous(), layer.calibration.full()[0])


NETWORKS = {"random": random_layers, "digits": digits_layers, "encoder": encoder_layers}
