"""Nothing waits for the device in every step: counted on a CPU, by the operations that would make a host wait."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from triton_scenarios import Waits

from lightning_obc import obs
from lightning_obc.kernels import obs_sweep
from lightning_obc.obs.block_sweep import block_members
from lightning_obc.obs.prune import nm_groups
from lightning_obc.obs.structured import eliminate_channels
from lightning_obc.specs import NM

CPU = torch.device("cpu")


def prepared(columns: int) -> obs.Problem:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(columns, 3 * columns, generator=generator, dtype=torch.float64)
    return obs.prepare(torch.randn(4, columns, generator=generator), x @ x.T / columns, 0.01)


def quantization(problem: obs.Problem) -> object:
    grid = obs_sweep.GridInput(torch.full_like(problem.weight, 0.3), torch.full_like(problem.weight, 8.0), 15)
    return obs_sweep.sweep_quantize(problem.sweep_input(), grid, backend="torch", memory_budget=2**28)


def nm(problem: obs.Problem) -> object:
    columns = problem.weight.shape[-1]
    groups = nm_groups(columns, columns, NM(2, 4), CPU)
    return obs_sweep.sweep_prune(problem.sweep_input(), groups=groups, backend="torch", memory_budget=2**28)


def blocks(problem: obs.Problem) -> object:
    columns = problem.weight.shape[-1]
    swept = obs_sweep.SweepInput(problem.weight.double(), problem.inverse, problem.damped)
    members = obs_sweep.ColumnBlocks(block_members(columns, columns, 4, CPU))
    return obs_sweep.sweep_blocks(swept, members, backend="torch", memory_budget=2**28)


SWEEPS: dict[str, Callable[[obs.Problem], object]] = {
    "unstructured": lambda problem: obs_sweep.sweep_prune(problem.sweep_input(), backend="torch", memory_budget=2**28),
    "N:M": nm,
    "quantize": quantization,
    "blocks": blocks,
    "structured": lambda problem: eliminate_channels(problem, problem.weight.shape[-1], problem.weight.shape[-1] // 2),
}


@pytest.mark.parametrize("name", SWEEPS)
def test_the_host_does_not_wait_in_every_step(name: str) -> None:
    """A panel of 32 steps may wait once (are rows worn?), and a sweep a few times besides."""
    for columns in (64, 256):
        problem = prepared(columns)
        with Waits() as waits:
            SWEEPS[name](problem)
        assert len(waits.names) <= 8 + columns // 32
