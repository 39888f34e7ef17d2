"""How fast this machine sweeps, from one small measurement."""

from __future__ import annotations

import time

import torch

from lightning_obc.obs.sweep import sweep

_COLUMNS = 256


def sweep_flops(groups: int, rows: int, columns: int) -> float:
    """⅔·R·d³ per problem, the cost of a full elimination."""
    return 2 / 3 * groups * rows * float(columns) ** 3


def measured_speed(device: torch.device | str = "cpu", backend: str = "auto") -> float:
    """Flop per second of a sweep of a few rows and 256 columns, the better of two runs after one to warm up.

    Wider layers, whose work is nearly all in matrix products, are usually faster than that.

    Args:
        device: Where to sweep.
        backend: ``"auto"``, ``"naive"``, ``"torch"``, ``"numba"`` or ``"triton"``.

    Raises:
        BackendError: The backend is unknown or cannot run there.
    """
    rows = max(16, 2 * torch.get_num_threads())
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, _COLUMNS, generator=generator).to(device)
    inputs = torch.randn(_COLUMNS, 2 * _COLUMNS, generator=generator, dtype=torch.float64).to(device)
    hessian = inputs @ inputs.T / _COLUMNS
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        # Reading a loss waits for the device.
        float(sweep(weight, hessian, backend=backend).losses.sum())
        seconds.append(time.perf_counter() - started)
    return sweep_flops(1, rows, _COLUMNS) / max(min(seconds[1:]), 1e-9)
