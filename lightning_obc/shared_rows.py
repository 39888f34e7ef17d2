"""Rows of one layer shared over ranks: one rank drives, the others serve it until it is done."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_obc.distributed import Ranks, exchange
from lightning_obc.errors import RankError
from lightning_obc.kernels import masked_refit, obs_sweep  # noqa: F401 (they register their tasks)
from lightning_obc.kernels.row_pool import TASKS, Tensors, rows_shared

T = TypeVar("T")

# Flop below which sending matrices around takes longer than the work itself: some 50 ms of one core.
LEAST_FLOPS = 1e9

_DONE = ("done",)


def drive(ranks: Ranks, work: Callable[[], T]) -> T:
    """Run ``work`` while all other ranks :func:`serve`; large work on rows inside it is shared with them."""
    try:
        with rows_shared(_RankPool(ranks)):
            return work()
    finally:
        exchange(ranks, _DONE)


def serve(ranks: Ranks, driver: int, device: torch.device) -> None:
    """Do this rank's rows of whatever the driver asks for, on a device, until the driver is done.

    What fails here fails on the driver.
    """
    while (order := exchange(ranks)[driver]) != _DONE:
        task, specs, options = order
        parts = [{name: _incoming(ranks, driver, spec, device) for name, spec in part.items()} for part in specs]
        _share(ranks, driver, task, parts[0], parts[1], options)


class _RankPool:
    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def pays(self, flops: float) -> bool:
        return flops >= LEAST_FLOPS

    def run(self, task: str, shared: Tensors, rows: Tensors, options: Mapping[str, Any]) -> dict[str, Tensor]:
        ranks = self._ranks
        if next(t.shape[1] for t in rows.values() if t is not None) < ranks.size:
            return TASKS[task](shared, rows, options)
        exchange(ranks, (task, (_specs(shared), _specs(rows)), dict(options)))
        for tensor in (*shared.values(), *rows.values()):
            if tensor is not None:
                ranks.broadcast_(tensor.contiguous(), ranks.rank)
        return _share(ranks, ranks.rank, task, shared, rows, options)


def _specs(tensors: Tensors) -> dict[str, tuple[list[int], torch.dtype] | None]:
    return {name: None if tensor is None else (list(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def _incoming(
    ranks: Ranks, driver: int, spec: tuple[list[int], torch.dtype] | None, device: torch.device
) -> Tensor | None:
    if spec is None:
        return None
    return ranks.broadcast_(torch.empty(spec[0], dtype=spec[1], device=device), driver)


def _share(
    ranks: Ranks, driver: int, task: str, shared: Tensors, rows: Tensors, options: Mapping[str, Any]
) -> dict[str, Tensor]:
    """This rank's rows of a task; on the driver the results of all rows.

    Raises:
        RankError: On the driver, when another rank could not do its rows.
    """
    count = next(t.shape[1] for t in rows.values() if t is not None)
    bounds = [count * rank // ranks.size for rank in range(ranks.size + 1)]
    first, last = bounds[ranks.rank], bounds[ranks.rank + 1]
    own, error = {}, None
    try:
        mine = {name: None if t is None else t[:, first:last].contiguous() for name, t in rows.items()}
        own = TASKS[task](shared, mine, options)
    except Exception as caught:
        error = caught
    failed = [text for text in exchange(ranks, None if error is None else f"{type(error).__name__}: {error}") if text]
    if error is not None and ranks.rank == driver:
        raise error
    if failed:
        if ranks.rank == driver:
            raise RankError("Another rank failed on its rows of a layer", got=failed[0])
        return {}
    results = {name: t.new_zeros((t.shape[0], count, *t.shape[2:])) for name, t in own.items()}
    for name, whole in results.items():
        whole[:, first:last] = own[name]
        # All bytes but those of one rank are zero, so that their sum is the row itself, whatever its dtype.
        ranks.sum_to_(whole.view(-1).view(torch.uint8), driver)
    return results
