"""Random states of the process, taken aside and put back."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class RandomState:
    """Python's, NumPy's (when imported), PyTorch's CPU and (when initialised) CUDA generators."""

    python: Any
    numpy: Any
    cpu: torch.Tensor
    cuda: list[torch.Tensor]

    @staticmethod
    def capture() -> RandomState:
        numpy = sys.modules.get("numpy")
        return RandomState(
            python=random.getstate(),
            numpy=None if numpy is None else numpy.random.get_state(),
            cpu=torch.get_rng_state(),
            cuda=torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        )

    def same_as(self, other: RandomState) -> bool:
        """True when nothing was drawn between the two."""
        plain = repr((self.python, self.numpy)) == repr((other.python, other.numpy))
        tensors = zip([self.cpu, *self.cuda], [other.cpu, *other.cuda], strict=False)
        return plain and all(torch.equal(a, b) for a, b in tensors)

    def restore(self) -> None:
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Whatever is drawn inside leaves the random states as they were before."""
    state = RandomState.capture()
    try:
        yield
    finally:
        state.restore()


def seed_everything(seed: int) -> None:
    """Seed the generators that :class:`RandomState` captures, and no others."""
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed % 2**32)
    # torch.manual_seed would also queue a seed for a CUDA that is not initialised, and disturb it later.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
