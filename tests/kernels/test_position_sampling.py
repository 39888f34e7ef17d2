"""Sub-sampled positions: which are drawn, that their sum estimates the whole without bias, and how large copies get."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_obc.kernels.hessian_update import (
    ConvGeometry,
    PositionSample,
    accumulate_conv_,
    accumulate_linear_,
    naive_linear,
    sampled_positions,
    symmetrise_,
)
from lightning_obc.kernels.hessian_update.linear import CHUNK
from lightning_obc.kernels.hessian_update.naive import naive_unfold


def estimated(x: Tensor, positions: int, samples: int, seed: int = 0, geometry: ConvGeometry | None = None) -> Tensor:
    groups = 1 if geometry is None else geometry.groups
    columns = x.shape[-1] if geometry is None else geometry.positions * x.shape[1] // groups
    out = torch.zeros(groups, columns, columns, dtype=torch.float64)
    with sampled_positions(PositionSample(positions, seed), samples):
        if geometry is None:
            accumulate_linear_(out, x)
        else:
            accumulate_conv_(out, x, geometry)
    return symmetrise_(out)


def test_every_position_is_drawn_equally_often_and_the_weights_add_up() -> None:
    # Position i has a 1 in column i: the diagonal shows which are drawn. 2 of 5 positions of both samples.
    x, draws = torch.eye(10, dtype=torch.float64)[:, None], 400
    diagonals = torch.stack([estimated(x, 2, 2, seed)[0].diagonal() for seed in range(draws)])
    torch.testing.assert_close(diagonals.sum(1), torch.full((draws,), 10.0, dtype=torch.float64))
    assert bool(((diagonals > 0).reshape(draws, 2, 5).sum(-1) == 2).all())
    # Each position is in with probability 0.4: a binomial of 400 draws leaves six deviations in one case of 10⁸.
    spread = (0.4 * 0.6 / draws) ** 0.5 / 0.4
    assert bool(((diagonals.mean(0) - 1).abs() < 6 * spread).all())


@pytest.mark.parametrize(
    "geometry",
    [
        ConvGeometry((3, 2), (2, 1), (1, 2), ((1, 1), (0, 2)), groups=2),
        ConvGeometry((3, 3), (1, 1), (1, 1), ((1, 1), (1, 1))),
        ConvGeometry((5,), (1,), (1,), ((2, 2),)),
    ],
    ids=["strided groups", "3x3", "one dimension"],
)
@pytest.mark.parametrize("samples", [6, 7])
def test_the_patches_are_those_of_the_drawn_positions(geometry: ConvGeometry, samples: int) -> None:
    torch.manual_seed(0)
    sizes = (40, 37) if len(geometry.kernel_size) == 2 else (700,)
    x = torch.randn(6, 4, *sizes, dtype=torch.float64)
    unfolded = naive_unfold(x, geometry)
    # 7 samples do not divide the positions: then they are drawn from all together.
    drawn = PositionSample(300, 3)
    drawn.samples = samples
    index, scale = drawn.draw(len(unfolded)) or (None, 0.0)
    assert index is not None
    assert len(index) == (1800 if samples == 6 else 2100)
    got = estimated(x, 300, samples, 3, geometry)
    torch.testing.assert_close(got, naive_linear(unfolded[index] * scale), rtol=1e-12, atol=1e-9)


def test_few_positions_are_all_used() -> None:
    x = torch.randn(3 * CHUNK, 1, 5, dtype=torch.float64)
    sample = PositionSample(CHUNK, 0)
    out = torch.zeros(1, 5, 5, dtype=torch.float64)
    with sampled_positions(sample, 3):
        accumulate_linear_(out, x)
    assert not sample.dropped
    torch.testing.assert_close(symmetrise_(out), naive_linear(x))
    with sampled_positions(sample, 2):
        accumulate_linear_(out, x)
    assert sample.dropped


def test_the_same_seed_draws_the_same_positions() -> None:
    x = torch.randn(4 * 50, 1, 40)
    first, again, other = (estimated(x, 10, 4, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


class LargestStorage(TorchDispatchMode):
    """Bytes of the largest tensor that any operation inside returns."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("positions", [None, 100])
@pytest.mark.parametrize(
    ("geometry", "shape", "limit"),
    [
        (ConvGeometry((3, 3), (1, 1), (1, 1), ((1, 1), (1, 1))), (32, 32, 28, 28), 3.5),
        (ConvGeometry((3, 3), (2, 2), (1, 1), ((1, 1), (1, 1))), (32, 32, 40, 40), 1.2),
        (ConvGeometry((7, 7), (2, 2), (1, 1), ((3, 3), (3, 3))), (8, 3, 128, 128), 1.2),
        (ConvGeometry((3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)), groups=64), (16, 64, 28, 28), 1.2),
    ],
    ids=["stride 1", "stride 2", "stem", "depthwise"],
)
def test_no_unfolded_copy_of_the_input(
    geometry: ConvGeometry, shape: tuple[int, ...], limit: float, positions: int | None
) -> None:
    """The form for stride 1 takes the input once per column of the kernel, the others about the input."""
    x = torch.randn(shape)
    columns = geometry.positions * shape[1] // geometry.groups
    out = torch.zeros(geometry.groups, columns, columns, dtype=torch.float64)
    sample = None if positions is None else PositionSample(positions, 0)
    with LargestStorage() as seen, sampled_positions(sample, shape[0]):
        accumulate_conv_(out, x, geometry)
    assert seen.largest <= max(limit * x.nbytes, out.nbytes)
