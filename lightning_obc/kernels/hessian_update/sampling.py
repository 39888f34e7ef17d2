"""Random sub-sampling of positions: an unbiased estimate of ``Σ x xᵀ`` from some of the positions of every sample."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor


class PositionSample:
    """Draws positions without replacement, the same number from every sample where samples can be told apart.

    What was drawn is scaled by ``√(positions / drawn)``, so that the expectation of ``Σ x xᵀ`` is the sum over all.

    Args:
        positions: Positions of a sample that are used in one call of a layer, at most.
        seed: Seed of the draws.

    Attributes:
        samples: Samples in the current input.
        dropped: True once any position was left out.
    """

    def __init__(self, positions: int, seed: int) -> None:
        self.positions, self.samples, self.dropped = positions, 1, False
        # Drawn on the CPU: the same positions on every device.
        self._generator = torch.Generator().manual_seed(seed)

    def draw(self, total: int) -> tuple[Tensor, float] | None:
        """Indices ``[K]`` of an input's ``total`` positions, ascending, on the CPU, and their scale; None for all.

        Positions of one sample lie side by side.
        """
        samples = self.samples if self.samples > 0 and total % self.samples == 0 else 1
        each = total // samples
        wanted = self.positions * (self.samples if samples == 1 else 1)
        if wanted >= each:
            return None
        self.dropped = True
        ranks = torch.rand(samples, each, generator=self._generator, device="cpu").argsort(1)[:, :wanted]
        index = ranks.sort(1).values + each * torch.arange(samples, device="cpu")[:, None]
        return index.flatten(), float((each / wanted) ** 0.5)


_current: ContextVar[PositionSample | None] = ContextVar("position_sample", default=None)


@contextmanager
def sampled_positions(sample: PositionSample | None, samples: int) -> Iterator[None]:
    """Inside, the accumulations of ``Σ x xᵀ`` use only positions that ``sample`` draws; None uses all.

    Args:
        sample: What draws.
        samples: Samples in the inputs inside.
    """
    if sample is not None:
        sample.samples = samples
    token = _current.set(sample)
    try:
        yield
    finally:
        _current.reset(token)


def drawn_positions(total: int) -> tuple[Tensor, float] | None:
    """:meth:`PositionSample.draw` of the context, None outside."""
    sample = _current.get()
    return None if sample is None else sample.draw(total)
