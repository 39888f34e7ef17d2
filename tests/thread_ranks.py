"""Ranks in threads of one process, one running at a time: fast, and the same every time.

A rank runs until it waits for the others. What is sent goes through pickle, as between processes.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
_PATIENCE = 60.0


class _Meeting:
    def __init__(self, size: int) -> None:
        self.size, self.turn = size, threading.Condition()
        self.brought: dict[int, Any] = {}
        self.results: list[list[Any]] = []

    def __call__(self, rank: int, value: Any) -> list[Any]:
        """What all ranks have brought; called with the turn taken."""
        number = len(self.results)
        self.brought[rank] = value
        if len(self.brought) == self.size:
            self.results.append([self.brought[r] for r in range(self.size)])
            self.brought = {}
            self.turn.notify_all()
        elif not self.turn.wait_for(lambda: len(self.results) > number, timeout=_PATIENCE):
            raise TimeoutError(f"rank {rank} waited in vain for the others")
        return self.results[number]


class ThreadRanks:
    """See :class:`lightning_obc.distributed.Ranks`."""

    def __init__(self, rank: int, meeting: _Meeting) -> None:
        self.rank, self.size, self._meet = rank, meeting.size, meeting

    def gather(self, value: Any) -> list[Any]:
        return [pickle.loads(text) for text in self._same_call("gather", pickle.dumps(value))]

    def sum_to_(self, tensor: Tensor, owner: int) -> Tensor:
        parts = self._same_call(f"sum to {owner} {tuple(tensor.shape)} {tensor.dtype}", tensor.detach().clone())
        # Anything may be left elsewhere.
        tensor.detach().copy_(sum(parts[1:], parts[0]) if self.rank == owner else torch.full_like(tensor, -7))
        return tensor

    def sum_(self, tensor: Tensor) -> Tensor:
        return self.broadcast_(self.sum_to_(tensor, 0), 0)

    def broadcast_(self, tensor: Tensor, source: int) -> Tensor:
        parts = self._same_call(f"from {source} {tuple(tensor.shape)} {tensor.dtype}", tensor.detach().clone())
        tensor.detach().copy_(parts[source])
        return tensor

    def _same_call(self, name: str, value: Any) -> list[Any]:
        found = self._meet(self.rank, (name, value))
        names = {other for other, _ in found}
        if len(names) > 1:
            raise AssertionError(f"ranks meet in different calls: {names}")
        return [theirs for _, theirs in found]


def run_ranks(size: int, work: Callable[[Any], T]) -> list[T | BaseException]:
    """``work(ranks)`` on every rank; what each returned, or raised."""
    meeting = _Meeting(size)

    def one(rank: int) -> Any:
        with meeting.turn:
            try:
                return work(ThreadRanks(rank, meeting))
            except BaseException as error:
                return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))
