"""Ranges of a layer's input, observed over several batches.

Index legend: ``C`` ranges, 1 per tensor or one per input channel; ``N`` observed values of each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_obc.activation_spec import ActivationGrid
from lightning_obc.distributed import Ranks, exchange
from lightning_obc.errors import CalibrationError, NonFiniteError
from lightning_obc.grid_fitting import fit_grid
from lightning_obc.grids import Grid
from lightning_obc.specs import IntGrid, RangeSearch

VALUES_PER_BATCH = 2**14
MOST_VALUES = 2**18


class RangeObserver:
    """Exact extremes and a random sample of the values a layer's input took.

    Args:
        granularity: ``"tensor"`` or ``"channel"``.
        name: Name of the layer in errors.
        seed: Seed of the sample; the process's own random states are not touched.
    """

    def __init__(self, granularity: str, *, name: str = "", seed: int = 0) -> None:
        self.name, self._granularity = name, granularity
        self._generator = torch.Generator().manual_seed(seed)
        self._low: Tensor | None = None
        self._high: Tensor | None = None
        self._sample: list[Tensor] = []
        self._per_batch = VALUES_PER_BATCH

    @property
    def seen(self) -> bool:
        return self._low is not None

    @torch.no_grad()
    def update(self, x: Tensor, axis: int) -> None:
        """Add an input; ``axis`` is its channel dimension. No value is looked at by the host."""
        values = x.detach().float()
        if self._granularity == "channel":
            values = values.movedim(axis, 0).flatten(1)
        else:
            values = values.reshape(1, -1)
        if values.shape[1] == 0:
            return
        low, high = values.amin(1), values.amax(1)
        self._low = low if self._low is None else torch.minimum(self._low, low)
        self._high = high if self._high is None else torch.maximum(self._high, high)
        wanted = max(1, self._per_batch // values.shape[0])
        if values.shape[1] > wanted:
            chosen = torch.randint(values.shape[1], (wanted,), generator=self._generator)
            values = values[:, chosen.to(values.device)]
        self._sample.append(values.clone())
        self._thin()

    def _thin(self) -> None:
        """Halve the sample, and what later batches may add, when it has become too large."""
        if sum(part.numel() for part in self._sample) > MOST_VALUES and self._per_batch > 1:
            self._sample = [part[:, ::2] for part in self._sample]
            self._per_batch //= 2

    def share_(self, ranks: Ranks) -> None:
        """Put together what the ranks observed, in their order; afterwards every rank fits the same grid."""
        if ranks.size == 1:
            return
        mine = None
        if self._low is not None and self._high is not None:
            # On the host: a rank that observed nothing may not know the device.
            mine = torch.cat([self._low[:, None], self._high[:, None], *self._sample], 1).cpu()
        shapes = exchange(ranks, None if mine is None else tuple(mine.shape))
        parts: list[Tensor] = []
        for source, shape in enumerate(shapes):
            if shape is not None:
                part = mine if source == ranks.rank and mine is not None else torch.empty(shape)
                parts.append(ranks.broadcast_(part, source))
        if parts:
            self._low = torch.stack([part[:, 0] for part in parts]).amin(0)
            self._high = torch.stack([part[:, 1] for part in parts]).amax(0)
            self._sample = [part[:, 2:] for part in parts]

    def fit(self, spec: ActivationGrid) -> Grid:
        """The grid of the observed values: ``scale`` and ``zero_point`` are ``[1, C, 1]`` float32.

        Raises:
            CalibrationError: Nothing was observed.
            NonFiniteError: NaN or Inf was observed.
        """
        if self._low is None or self._high is None:
            raise CalibrationError(
                f"No batch passed through layer {self.name!r}, so that its activation range is unknown",
                expected="at least one batch",
                remedy="observe batches that reach the layer, or leave the layer out",
            )
        ends = torch.stack([self._low, self._high], 1)
        if not bool(torch.isfinite(ends).all()):
            raise NonFiniteError(f"The inputs of layer {self.name!r} hold NaN or Inf", expected="finite activations")
        values = torch.cat([*self._sample, ends], 1)
        if spec.range == "percentile":
            values = _clipped(values, spec.percentile / 100)
        search: RangeSearch = "mse" if spec.range == "mse" else "minmax"
        # A matrix of one row per range: the fit of a weight's channels does the same.
        return fit_grid(values[None], IntGrid(spec.bits, symmetric=spec.symmetric, scale=search))


def _clipped(values: Tensor, share: float) -> Tensor:
    """Only values between the two quantiles; those outside become the quantiles."""
    ordered = values.sort(1).values
    last = ordered.shape[1] - 1
    outside = round((1 - share) / 2 * last)
    return values.clamp(ordered[:, outside, None], ordered[:, last - outside, None])
