"""Run a sweep kernel, and run it again with more precision or damping when a pivot breaks. Every retry is on record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from lightning_obc.errors import NotPositiveDefiniteError
from lightning_obc.obs.problem import Problem, prepare

RETRIES = 4


class Swept(Protocol):
    """What a sweep returns: among others, which rows (or eliminations of several rows) a bad pivot has stopped."""

    @property
    def broken(self) -> Tensor: ...


SweptT = TypeVar("SweptT", bound=Swept)


def run_with_retries(problem: Problem, kernel: Callable[[Problem], SweptT]) -> tuple[Problem, SweptT]:
    """Sweep; a row whose pivot is not finite or not positive sends the layer to float64, then to tenfold damping.

    Returns:
        The problem that was finally solved (its ``notes`` and ``damping`` tell what changed) and the kernel's output.

    Raises:
        NotPositiveDefiniteError: Pivots still break after all retries.
    """
    notes = problem.notes
    for _ in range(RETRIES):
        output = kernel(problem)
        rows = int(output.broken.sum())
        if rows == 0:
            return problem, output
        if problem.weight.dtype != torch.float64:
            notes = (*notes, f"{rows} rows broke in {problem.weight.dtype}; swept again in float64")
            problem = problem.with_dtype(torch.float64)
        else:
            damping = max(10 * problem.damping, 1e-8)
            notes = (*notes, f"{rows} rows broke in float64; damping raised to {damping:g}")
            problem = prepare(problem.original, problem.hessian, damping).with_dtype(torch.float64)
        problem = replace(problem, notes=notes)
    raise NotPositiveDefiniteError(
        "The sweep of a layer keeps breaking down",
        got="; ".join(notes),
        expected="a Hessian that damping makes positive definite",
        remedy="use more calibration samples or a larger damping",
    )
