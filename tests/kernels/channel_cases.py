"""Problems and comparisons for the sweep over input channels, shared by its tests on every backend."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sweep_cases import make_problem

from lightning_obc.kernels.obs_sweep import ChannelOutput, SweepInput, sweep_channels


@dataclass(frozen=True)
class Case:
    """Shape of a problem, and which of its weights are zero already: none, the same in all rows, or others in each."""

    groups: int
    rows: int
    channels: int
    positions: int = 1
    zeros: str = "none"
    dtype: torch.dtype = torch.float64

    def __str__(self) -> str:
        shape = f"{self.groups}x{self.rows}x{self.channels}x{self.positions}"
        return f"{shape} {self.zeros} {str(self.dtype).removeprefix('torch.')}"

    def problem(self) -> SweepInput:
        """Weights as they come out of a model of this type, in the float64 of the sweep."""
        plain = make_problem(self.groups, self.rows, self.channels * self.positions)
        weight, keep = plain.weight.to(self.dtype).double(), None
        if self.zeros != "none":
            generator = torch.Generator().manual_seed(1)
            shape = weight.shape if self.zeros == "weights" else (len(weight), 1, weight.shape[2])
            keep = (torch.rand(shape, generator=generator) < 0.7).expand(weight.shape).contiguous()
            weight = weight * keep
        return SweepInput(weight, plain.inverse, plain.hessian, keep)

    def run(self, backend: str, device: str = "cpu", steps: int | None = None) -> ChannelOutput:
        problem = SweepInput(*(None if t is None else t.to(device) for t in vars(self.problem()).values()))
        own = self.zeros == "weights"
        steps = self.channels if steps is None else steps
        out = sweep_channels(problem, self.channels, steps, own_inverses=own, backend=backend)
        return ChannelOutput(*(tensor.cpu() for tensor in vars(out).values()))


SHAPES = [
    (1, 1, 1, 1),
    (1, 3, 63, 1),
    (2, 5, 65, 1),
    (1, 4, 65, 2),
    (1, 2, 21, 9),
    (3, 2, 4, 3),
    (40, 1, 1, 9),
    (1, 9, 3, 49),
]
CASES = [Case(*shape, zeros=zeros) for shape in SHAPES for zeros in ("none", "columns", "weights")]
CASES += [Case(1, 3, 63, 1, zeros, dtype) for zeros in ("none", "weights") for dtype in (torch.float32, torch.bfloat16)]


def assert_parity(got: ChannelOutput, oracle: ChannelOutput) -> None:
    """The same channels at the same cost, step by step; channels that cost nothing may come in any order."""
    assert not bool(got.broken.any())
    torch.testing.assert_close(got.losses, oracle.losses, rtol=1e-8, atol=1e-13)
    free = (oracle.losses.abs() < 1e-13).sum(1)
    for here, there, count in zip(got.order, oracle.order, free.tolist(), strict=True):
        assert sorted(here[:count].tolist()) == sorted(there[:count].tolist())
        assert here[count:].tolist() == there[count:].tolist()
