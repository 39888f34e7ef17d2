"""A backend that does not solve a pattern is refused by name, and passed over by ``"auto"``."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from lightning_obc import obs
from lightning_obc.errors import BackendError, SpecError
from lightning_obc.kernels.obs_sweep import block_backend, dispatch, resolve_among
from lightning_obc.specs import Block, Pattern, Prune, Structured

REFUSED = [(Block(4, 0.5), "triton"), *((Structured(0.5), name) for name in ("naive", "numba", "triton"))]


@pytest.mark.parametrize(("pattern", "backend"), REFUSED, ids=str)
def test_a_backend_without_the_pattern_is_refused_by_name(pattern: Pattern, backend: str) -> None:
    weight, hessian = torch.randn(3, 8), torch.eye(8, dtype=torch.float64)
    with pytest.raises(BackendError, match=f"cannot solve this pattern.*'{backend}'"):
        obs.prune(weight, hessian, pattern, backend=backend)
    with pytest.raises(SpecError, match=f"cannot solve this pattern.*'{backend}'"):
        Prune(pattern, backend=backend)
    if isinstance(pattern, Block):
        with pytest.raises(BackendError, match="blocks of 4"):
            obs.sweep_blocks(weight, hessian, 4, backend=backend)


@pytest.mark.parametrize("pattern", [Block(4, 0.5), Structured(0.5)], ids=str)
def test_the_others_solve_it(pattern: Pattern) -> None:
    weight, hessian = torch.randn(3, 8), torch.eye(8, dtype=torch.float64)
    for backend in ("auto", "torch"):
        Prune(pattern, backend=backend)
        assert obs.prune(weight, hessian, pattern, backend=backend).sparsity == 0.5


def test_auto_takes_torch_where_the_first_choice_lacks_the_pattern() -> None:
    with (
        mock.patch.dict(dispatch._PREFERENCE, {"cuda": ("triton", "torch")}),
        mock.patch.object(dispatch, "_importable", return_value=True),
    ):
        assert dispatch.resolve_backend("auto", "cuda") == "triton"
        assert block_backend("auto", "cuda", 4) == "torch"
        assert resolve_among("auto", "cuda", ("torch",), "structured") == "torch"
