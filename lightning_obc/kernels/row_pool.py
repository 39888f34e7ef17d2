"""Rows of one layer given to several workers, where the work on every row is independent of the others.

Kernels hand such work to :func:`by_rows` as a *task*: a named function of tensors that all rows share and of tensors
with one entry per row. Who else works on it, another process for instance, is not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

from torch import Tensor

# Tensors by name; None where an optional one is not given.
Tensors = Mapping[str, Any]
# ``task(shared, rows, options)``; the row dimension of ``rows`` and of what is returned is the second one.
Task = Callable[[Tensors, Tensors, Mapping[str, Any]], dict[str, Tensor]]

TASKS: dict[str, Task] = {}


class RowPool(Protocol):
    """Workers that share rows."""

    def pays(self, flops: float) -> bool:
        """True when work of this size is worth sending around."""

    def run(self, task: str, shared: Tensors, rows: Tensors, options: Mapping[str, Any]) -> dict[str, Tensor]:
        """The result of a task for all rows, the parts of all workers joined."""


_POOL: ContextVar[RowPool | None] = ContextVar("lightning_obc_row_pool", default=None)


@contextmanager
def rows_shared(pool: RowPool) -> Iterator[None]:
    """Inside, tasks of this thread go to the pool."""
    token = _POOL.set(pool)
    try:
        yield
    finally:
        _POOL.reset(token)


def task(name: str) -> Callable[[Task], Task]:
    """Register a function as a task."""

    def register(function: Task) -> Task:
        TASKS[name] = function
        return function

    return register


def by_rows(name: str, shared: Tensors, rows: Tensors, options: Mapping[str, Any], flops: float) -> dict[str, Tensor]:
    """Run a task here, or in the pool when there is one and the work is large enough for it."""
    pool = _POOL.get()
    if pool is None or not pool.pays(flops):
        return TASKS[name](shared, rows, options)
    return pool.run(name, shared, rows, options)
