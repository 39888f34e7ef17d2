"""One layer problem and one stage: the engine, or the solver that the stage names for comparison."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, singledispatch
from typing import Any

from torch import Tensor

from lightning_obc.baselines import adaprune, gptq, magnitude, round_to_nearest, sparsegpt
from lightning_obc.errors import SpecError
from lightning_obc.hessian import Hessian
from lightning_obc.obs import LayerSolution, prune, quantize
from lightning_obc.obs.lookup import solve_by_rows
from lightning_obc.obs.problem import measured_with
from lightning_obc.specs import Prune, Quantize, Stage

PRUNERS: dict[str, Callable[..., LayerSolution]] = {
    "sparsegpt": sparsegpt,
    "sparsegpt-act": partial(sparsegpt, act_order=True),
    "adaprune": adaprune,
    "magnitude": magnitude,
}
QUANTIZERS: dict[str, Callable[..., LayerSolution]] = {
    "gptq": gptq,
    "gptq-act": partial(gptq, act_order=True),
    "rtn": round_to_nearest,
}


def solve_layer(stage: Stage, weight: Tensor, hessian: Hessian, channels: int, pooled: bool = False) -> LayerSolution:
    """Run the engine on one layer, ``weight [g, R, d]``; ``pooled``: all its groups for their mean Hessian."""
    return _solve_problem(stage, weight, hessian, channels, pooled).marked(hessian)


def _solve_problem(stage: Stage, weight: Tensor, hessian: Hessian, channels: int, pooled: bool) -> LayerSolution:
    if pooled and hessian.groups > 1:
        return measured_with(hessian, _solve(stage, weight, hessian.pooled(), channels), weight)
    if not isinstance(hessian, Hessian) or hessian.rows is None:
        return _solve(stage, weight, hessian, channels)
    together = not isinstance(stage, Quantize) or stage.parsed.granularity == "tensor"
    return solve_by_rows(weight, hessian, lambda w, h: _solve(stage, w, h, channels), together=together)


@singledispatch
def _solve(stage: Stage, weight: Tensor, hessian: Hessian, channels: int) -> LayerSolution:
    """One implementation per stage type."""
    raise SpecError("This stage has no solver", got=type(stage).__name__, expected="Prune or Quantize")


@_solve.register
def _solve_prune(stage: Prune, weight: Tensor, hessian: Hessian, channels: int) -> LayerSolution:
    options: dict[str, Any] = {"channels": channels, "misfit": stage.misfit, "damping": stage.damping}
    if stage.solver != "obs":
        return PRUNERS[stage.solver](weight, hessian, stage.parsed, **options)
    options |= {"selection": stage.selection, "backend": stage.backend, "refine": stage.refine}
    return prune(weight, hessian, stage.parsed, **options)


@_solve.register
def _solve_quantize(stage: Quantize, weight: Tensor, hessian: Hessian, channels: int) -> LayerSolution:
    mask = weight != 0
    kept = None if bool(mask.all()) else mask
    options: dict[str, Any] = {"mask": kept, "channels": channels, "damping": stage.damping}
    if stage.solver != "obs":
        return QUANTIZERS[stage.solver](weight, hessian, stage.parsed, **options)
    options |= {"order": stage.order, "backend": stage.backend, "refine": stage.refine}
    return quantize(weight, hessian, stage.parsed, **options)
