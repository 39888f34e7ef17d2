"""Where the patches of a convolution lie."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from lightning_obc.errors import ShapeError


@dataclass(frozen=True)
class ConvGeometry:
    """Where a convolution's patches lie. All tuples run over the spatial dimensions, first to last.

    Attributes:
        kernel_size: Kernel positions per dimension.
        stride: Step between patches.
        dilation: Step between the positions of one patch.
        padding: (before, after) per dimension.
        padding_mode: ``"constant"`` (zeros), ``"reflect"``, ``"replicate"`` or ``"circular"``.
        groups: Number of problems; channels are split evenly among them.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    padding_mode: str = "constant"
    groups: int = 1

    @property
    def positions(self) -> int:
        """``K``, the number of kernel positions."""
        return math.prod(self.kernel_size)

    def pad(self, x: Tensor) -> Tensor:
        """``[N, C, *spatial]`` with the padding applied."""
        if not any(map(any, self.padding)):
            return x
        last_first = [side for pair in reversed(self.padding) for side in pair]
        return F.pad(x, last_first, mode=self.padding_mode)

    def padded_size(self, spatial: Sequence[int]) -> tuple[int, ...]:
        """Spatial sizes after padding."""
        return tuple(size + sum(pair) for size, pair in zip(spatial, self.padding, strict=True))

    def output_size(self, padded: Sequence[int]) -> tuple[int, ...]:
        """Patches per dimension of an input whose padded spatial sizes are given.

        Raises:
            ShapeError: The input is smaller than the kernel.
        """
        axes = zip(padded, self.kernel_size, self.stride, self.dilation, strict=True)
        sizes = tuple((size - dil * (k - 1) - 1) // step + 1 for size, k, step, dil in axes)
        if min(sizes) < 1:
            raise ShapeError(
                "An input is smaller than the kernel", got=tuple(padded), expected=f"at least {self.kernel_size}"
            )
        return sizes
