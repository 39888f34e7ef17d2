"""What a console shows of results."""

from __future__ import annotations

import torch

import lightning_obc as obc
from lightning_obc import obs
from lightning_obc.export.weights import CompressedWeight


def test_results_print_in_a_line_each() -> None:
    weight, matrix = torch.randn(8, 16), torch.eye(16).double()
    solution = obs.quantize(weight, matrix, 4)
    stored = CompressedWeight.from_solution(obs.quantize(weight[None], matrix[None], 4))
    hessian = obc.Hessian(matrix.expand(2, 1, 16, 16), (1, 1))
    for one in (solution, solution.grid, stored, hessian, obs.sweep(weight, matrix)):
        assert "tensor(" not in repr(one)
        assert len(repr(one)) < 700
    assert "weight=float32 [8, 16]" in repr(solution)
    assert "codes=uint8 [1, 8, 16]" in repr(stored)
    assert "halves=float64 [2, 1, 16, 16]" in repr(hessian)
    assert "bits=4" in repr(stored)
