"""Passes over batches that leave no trace of their own: modes, buffers and random states are put back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from lightning_obc.calibration import call_forward
from lightning_obc.calibration.batches import to_device
from lightning_obc.calibration.isolation import eager_forward, undisturbed
from lightning_obc.calibration.rng import preserved_rng
from lightning_obc.calibration.source import no_batches, numbered_part
from lightning_obc.distributed import Ranks

Forward = Callable[[nn.Module, Any], Any]
Progress = Callable[[str, float, float], None]


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; modes, buffers and random states as before afterwards, also after an error."""
    with ExitStack() as stack:
        for context in (preserved_rng(), undisturbed(model), eager_forward()):
            stack.enter_context(context)
        yield


def limited(batches: Iterable[Any], limit: int | None, ranks: Ranks | None = None) -> list[Any]:
    """This rank's share of the first ``limit`` batches, kept: corrections go over the same batches many times.

    Raises:
        EmptyCalibrationError: There are no batches.
    """
    with preserved_rng():
        return list(shared(batches, limit, ranks))


def shared(batches: Iterable[Any], limit: int | None, ranks: Ranks | None) -> Iterator[Any]:
    """This rank's share of the first ``limit`` batches.

    Raises:
        EmptyCalibrationError: There are no batches, on any rank.
    """
    rank, size = (0, 1) if ranks is None else (ranks.rank, ranks.size)
    found = False
    for numbered in islice(numbered_part(batches, rank, size), limit):
        found = True
        if numbered.index % size == rank:
            yield numbered.batch
    if not found:
        raise no_batches(batches, "The data for a correction yields no batch")


def run_batch(model: nn.Module, batch: Any, forward: Forward | None) -> Any:
    """One batch through a model: by ``forward``, or on the model's device as calibration does it."""
    if forward is not None:
        return forward(model, batch)
    parameter = next(model.parameters(), None)
    return call_forward(model, batch if parameter is None else to_device(batch, parameter.device))


def first_tensor(output: Any) -> Tensor | None:
    """The tensor that a module returns, or the first one of a tuple or list."""
    if isinstance(output, (tuple, list)):
        return next((found for found in map(first_tensor, output) if found is not None), None)
    return output if isinstance(output, Tensor) else None


def count_batches(batches: Iterable[Any], limit: int | None) -> float:
    """Number of batches that will be run, or 0 when it cannot be told."""
    try:
        size = len(batches)  # type: ignore[arg-type]
    except TypeError:
        return float(limit or 0)
    return float(size if limit is None else min(size, limit))


def finite(values: Iterable[Tensor]) -> bool:
    """True when no tensor holds NaN or Inf; one synchronisation for all of them."""
    flags = [value.isfinite().all() for value in values]
    return not flags or bool(torch.stack([flag.to(flags[0].device) for flag in flags]).all())
