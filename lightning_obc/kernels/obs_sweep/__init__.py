"""The OBS sweep: every backend behind three functions.

``naive`` is the oracle (float64, one weight at a time), ``torch`` runs panels in batched torch on any device,
``numba`` is the CPU default. Backends are imported when first used.
"""

from __future__ import annotations

from lightning_obc.kernels.obs_sweep.types import GridInput, NMGroups, SweepInput, SweepOutput

__all__ = ["GridInput", "NMGroups", "SweepInput", "SweepOutput", "sweep_prune", "sweep_quantize", "resolve_backend"]


def resolve_backend(backend: str, device_type: str) -> str:
    """The backend that ``"auto"`` means on a device.

    Raises:
        BackendError: The name is unknown, or the backend cannot run on the device.
    """
    raise NotImplementedError


def sweep_prune(
    problem: SweepInput,
    *,
    groups: NMGroups | None = None,
    backend: str = "auto",
    memory_budget: int | None = None,
) -> SweepOutput:
    """Eliminate columns at target 0, smallest ``w_p²/(2 G_pp)`` first; ties go to the lower column.

    Without ``groups`` every column of every row is eliminated (``T = d``); with ``groups`` a row ends when every group has
    its quota. ``memory_budget`` bounds the working memory in bytes above the inputs.
    """
    raise NotImplementedError


def sweep_quantize(
    problem: SweepInput,
    grid: GridInput,
    *,
    backend: str = "auto",
    memory_budget: int | None = None,
) -> SweepOutput:
    """Eliminate every column at its nearest grid point, smallest ``(w_p - q)²/(2 G_pp)`` first.

    Outlier rule: a column whose error exceeds half a step by more than 1e-5 relative goes first, largest squared error
    first. ``T = d``; columns of ``keep=False`` come first.
    """
    raise NotImplementedError
