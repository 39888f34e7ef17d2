"""Checks, and the choice of the backend."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lightning_obc.errors import BackendError, NonFiniteError, ShapeError
from lightning_obc.kernels.host import all_finite, all_positive, filled, zero_outside
from lightning_obc.kernels.obs_sweep.types import GridInput, NMGroups, SweepInput, SweepOutput, SweepPlan
from lightning_obc.kernels.row_pool import Tensors, by_rows, task
from lightning_obc.linalg import resolve_budget

# A backend is a module with ``sweep(plan)``.
BACKENDS = {
    "naive": "lightning_obc.kernels.obs_sweep.naive",
    "torch": "lightning_obc.kernels.obs_sweep.panels",
    "numba": "lightning_obc.kernels.obs_sweep.compiled",
    "triton": "lightning_obc.kernels.obs_sweep.triton_backend",
}
# Device types of a backend, all when absent. Triton's interpreter, for tests, takes its kernels to the CPU.
_TRITON_DEVICES = ("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)
_DEVICES = {"numba": ("cpu",), "triton": _TRITON_DEVICES}
# Triton goes first on CUDA as soon as its parity tests have passed on a device; so far only its interpreter has run.
_PREFERENCE = {"cpu": ("numba", "torch"), "cuda": ("torch", "triton")}


def resolve_backend(backend: str, device_type: str) -> str:
    """The backend that ``"auto"`` means on a device: the first registered and importable of its preference.

    Raises:
        BackendError: The name is unknown, or the backend cannot run on the device.
    """
    if backend == "auto":
        names = [name for name in _PREFERENCE.get(device_type, ("torch",)) if name in BACKENDS]
        return next(name for name in names if _importable(name))
    if backend not in BACKENDS:
        raise BackendError(
            "Unknown backend", got=repr(backend), expected=f"'auto' or one of {sorted(BACKENDS)}", remedy="use 'auto'"
        )
    if device_type not in _DEVICES.get(backend, (device_type,)):
        raise BackendError(
            "A backend cannot run on this device",
            got=f"{backend!r} on {device_type!r}",
            expected=f"{backend!r} on {' or '.join(_DEVICES[backend])}",
            remedy="use backend='auto', or move weights and Hessian",
        )
    if not _importable(backend):
        raise BackendError(
            "A backend cannot be imported here", got=repr(backend), remedy="install its package, or use backend='torch'"
        )
    return backend


def resolve_among(backend: str, device_type: str, allowed: tuple[str, ...], what: str) -> str:
    """:func:`resolve_backend` for a pattern that not every backend solves; ``"auto"`` goes to torch where it must.

    Args:
        backend: What was asked for.
        device_type: Where the weights are.
        allowed: Backends that solve the pattern, ``"torch"`` among them.
        what: The pattern, for the error.

    Raises:
        BackendError: Another backend was asked for by name, or see :func:`resolve_backend`.
    """
    if backend in BACKENDS and backend not in allowed:
        raise BackendError(
            "A backend cannot solve this pattern",
            got=f"{backend!r} for {what}",
            expected=f"'auto' or one of {allowed}",
            remedy="use backend='auto'",
        )
    name = resolve_backend(backend, device_type)
    return name if name in allowed else "torch"


def _importable(name: str) -> bool:
    try:
        importlib.import_module(BACKENDS[name])
    except ImportError:
        return False
    return True


def _load(name: str) -> ModuleType:
    return importlib.import_module(BACKENDS[name])


def sweep_prune(
    problem: SweepInput,
    *,
    groups: NMGroups | None = None,
    backend: str = "auto",
    memory_budget: int | None = None,
) -> SweepOutput:
    """Eliminate columns at target 0, smallest ``w_p²/(2 G_pp)`` first; ties go to the lower column.

    Without ``groups`` every column of every row is eliminated (``T = d``); with ``groups`` a row ends when every group
    has its quota (``T`` is the longest row's count).

    Args:
        problem: Weights, inverse and damped Hessian.
        groups: N:M groups; None prunes without a pattern.
        backend: ``"auto"`` or a key of :data:`BACKENDS`.
        memory_budget: Bytes of working memory above inputs and outputs; None takes a quarter of what is free.

    Raises:
        ShapeError: Tensors do not belong together, or ``keep`` is False at a weight that is not zero.
        NonFiniteError: NaN or Inf in the weights or the inverse.
        BackendError: See :func:`resolve_backend`.
    """
    check_problem(problem)
    if groups is not None:
        _check_groups(problem, groups)
    return _run(problem, groups, None, backend, memory_budget)


def sweep_quantize(
    problem: SweepInput,
    grid: GridInput,
    *,
    backend: str = "auto",
    memory_budget: int | None = None,
) -> SweepOutput:
    """Eliminate every column at its nearest grid point, smallest ``(w_p - q)²/(2 G_pp)`` first (``T = d``).

    Outlier rule: a clipped column whose error exceeds half a step by more than 1e-5 relative goes first, the largest
    squared error first. Columns of ``keep=False`` come before all others.

    Args, Raises: As :func:`sweep_prune`; a scale that is not positive is a NonFiniteError.
    """
    check_problem(problem)
    for name, value in (("scale", grid.scale), ("zero_point", grid.zero_point)):
        _check_like(f"grid.{name}", value, problem.weight, tuple(problem.weight.shape))
    if not (all_finite(grid.scale) and all_positive(grid.scale) and all_finite(grid.zero_point)):
        raise NonFiniteError("A grid has a scale or zero point that is not possible", expected="finite, scale > 0")
    return _run(problem, None, grid, backend, memory_budget)


def _run(
    problem: SweepInput, groups: NMGroups | None, grid: GridInput | None, backend: str, memory_budget: int | None
) -> SweepOutput:
    device = problem.weight.device
    name = resolve_backend(backend, device.type)
    steps = problem.weight.shape[2] if groups is None else _nm_steps(problem, groups)
    if problem.weight.shape[0] * problem.weight.shape[1] == 0 or steps == 0:
        return empty_output(SweepPlan(problem, groups, grid, steps, 0))
    shared = {"inverse": problem.inverse, "hessian": problem.hessian, "groups": None, "quota": None}
    rows = {"weight": problem.weight, "keep": problem.keep, "scale": None, "zero_point": None}
    options = {"backend": name, "steps": steps, "memory_budget": memory_budget, "max_code": 0}
    if groups is not None:
        shared |= {"groups": groups.column_group, "quota": groups.quota}
    if grid is not None:
        rows |= {"scale": grid.scale, "zero_point": grid.zero_point}
        options["max_code"] = grid.max_code
    problems, count, columns = problem.weight.shape
    return SweepOutput(**by_rows("obs_sweep", shared, rows, options, 2 / 3 * problems * count * columns**3))


@task("obs_sweep")
def _sweep_rows(shared: Tensors, rows: Tensors, options: Mapping[str, Any]) -> dict[str, Tensor]:
    """The sweep of some of a layer's rows."""
    problem = SweepInput(rows["weight"], shared["inverse"], shared["hessian"], rows["keep"])
    groups = None if shared["groups"] is None else NMGroups(shared["groups"], shared["quota"])
    grid = None if rows["scale"] is None else GridInput(rows["scale"], rows["zero_point"], options["max_code"])
    budget = resolve_budget(options["memory_budget"], problem.weight.device)
    return _load(options["backend"]).sweep(SweepPlan(problem, groups, grid, options["steps"], budget)).tensors()


def empty_output(plan: SweepPlan) -> SweepOutput:
    """The output before the first step: order -1, losses 0, codes 0."""
    weight = plan.problem.weight
    groups, rows, columns = weight.shape
    shape, device = (groups, rows, plan.steps), weight.device
    return SweepOutput(
        filled(shape, -1, torch.int32, device),
        filled(shape, 0, weight.dtype, device),
        filled(shape[:2], 0, torch.int32, device),
        filled(shape[:2], 0, torch.bool, device),
        None if plan.grid is None else filled((groups, rows, columns), 0, torch.uint8, device),
    )


def _nm_steps(problem: SweepInput, groups: NMGroups) -> int:
    """The longest row: every group makes its quota, or already has more zeros than that."""
    if problem.keep is None:
        return int(groups.quota.sum())
    flat = (~problem.keep).flatten(0, 1).to(torch.int64)
    zeros = flat.new_zeros(len(flat), len(groups.quota)).index_add_(1, groups.column_group, flat)
    return int(torch.maximum(zeros, groups.quota).sum(1).max()) if len(flat) else 0


def check_problem(problem: SweepInput) -> None:
    """Refuse tensors that do not belong together, and values that are not finite."""
    weight = problem.weight
    if weight.ndim != 3 or weight.dtype not in (torch.float32, torch.float64):
        raise ShapeError(
            "The weights of a sweep have the wrong shape or type",
            got=f"{list(weight.shape)} {weight.dtype}",
            expected="[g, R, d] float32 or float64",
            remedy="cast half precision weights to float32",
        )
    groups, rows, columns = weight.shape
    _check_like("inverse", problem.inverse, weight, (groups, columns, columns))
    _check_like("hessian", problem.hessian, weight, (groups, columns, columns), torch.float64)
    if problem.keep is not None:
        _check_like("keep", problem.keep, weight, (groups, rows, columns), torch.bool)
        if not zero_outside(weight, problem.keep):
            raise ShapeError(
                "keep is False at weights that are not zero",
                expected="weight == 0 wherever keep is False",
                remedy="refit the weights on the mask first",
            )
    for name, value in (("weights", weight), ("inverse Hessian", problem.inverse)):
        if not all_finite(value):
            raise NonFiniteError(f"The {name} of a sweep hold NaN or Inf", expected="finite values")


def _check_like(
    name: str, value: Tensor, weight: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None
) -> None:
    dtype = weight.dtype if dtype is None else dtype
    if tuple(value.shape) != shape or value.dtype != dtype or value.device != weight.device:
        raise ShapeError(
            f"{name} does not belong to the weights",
            got=f"{list(value.shape)} {value.dtype} on {value.device}",
            expected=f"{list(shape)} {dtype} on {weight.device}",
        )


def _check_groups(problem: SweepInput, groups: NMGroups) -> None:
    columns = problem.weight.shape[2]
    device = problem.weight.device
    _check_like("column_group", groups.column_group, problem.weight, (columns,), torch.int64)
    if groups.quota.ndim != 1 or groups.quota.dtype != torch.int64 or groups.quota.device != device:
        raise ShapeError("quota does not belong to the weights", got=f"{list(groups.quota.shape)} {groups.quota.dtype}")
    inside = (groups.column_group >= 0) & (groups.column_group < len(groups.quota))
    if not bool(inside.all()):
        raise ShapeError("column_group names groups without a quota", expected=f"groups 0 … {len(groups.quota) - 1}")
    members = torch.bincount(groups.column_group, minlength=len(groups.quota))
    if bool(((groups.quota > members) | (groups.quota < 0)).any()):
        raise ShapeError("A quota exceeds its group", expected="0 <= quota <= columns of the group")
