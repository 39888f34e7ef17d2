"""``solver`` and ``refine`` of the stages: what is refused, and what the pipeline runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_obc import baselines, compress, obs
from lightning_obc.calibration import collect_hessians
from lightning_obc.errors import SpecError
from lightning_obc.layers import adapter_for
from lightning_obc.solvers import Refine
from lightning_obc.specs import Block, Prune, Quantize


@pytest.mark.parametrize(
    ("stage", "options", "message"),
    [
        (Prune, {"solver": "gptq"}, "only quantizes"),
        (Prune, {"solver": "obc"}, "cannot use"),
        (Quantize, {"solver": "sparsegpt"}, "only prunes"),
        (Quantize, {"solver": "rtn", "refine": True}, "Refinement"),
        (Prune, {"solver": "adaprune", "refine": Refine()}, "Refinement"),
        (Prune, {"refine": "yes"}, "refine"),
        (Prune, {"pattern": Block(4, 0.5), "refine": True}, "cannot be refined"),
    ],
)
def test_stages_that_cannot_be_meant(stage: Any, options: dict[str, Any], message: str) -> None:
    first = {} if stage is Quantize or "pattern" in options else {"pattern": 0.5}
    with pytest.raises(SpecError, match=message):
        stage(**first, **options)


def test_stages_accept_their_solvers() -> None:
    for solver in ("obs", "sparsegpt", "sparsegpt-act", "adaprune", "magnitude"):
        Prune("2:4", solver=solver)
    for solver in ("obs", "gptq", "gptq-act", "rtn"):
        Quantize(4, solver=solver)
    assert Prune("2:4", refine=True).refine is True
    assert Quantize(4, refine=Refine(sweeps=3)).refine == Refine(sweeps=3)


CASES = [
    (Prune(0.5, solver="magnitude"), lambda w, h: baselines.magnitude(w, h, 0.5)),
    (Prune(0.5, solver="sparsegpt"), lambda w, h: baselines.sparsegpt(w, h, 0.5)),
    (Prune(0.5, solver="sparsegpt-act"), lambda w, h: baselines.sparsegpt(w, h, 0.5, act_order=True)),
    (Prune("2:4", solver="adaprune"), lambda w, h: baselines.adaprune(w, h, "2:4")),
    (Prune("2:4", refine=True), lambda w, h: obs.prune(w, h, "2:4", refine=True)),
    (Quantize(3, solver="rtn"), lambda w, h: baselines.round_to_nearest(w, h, 3)),
    (Quantize(3, solver="gptq"), lambda w, h: baselines.gptq(w, h, 3)),
    (Quantize(3, solver="gptq-act"), lambda w, h: baselines.gptq(w, h, 3, act_order=True)),
    (Quantize(3, order="greedy"), lambda w, h: obs.quantize(w, h, 3, order="greedy")),
    (Quantize(3, refine=True), lambda w, h: obs.quantize(w, h, 3, refine=True)),
]


@pytest.mark.parametrize(("stage", "expected"), CASES, ids=lambda case: str(case) if isinstance(case, Prune) else "")
def test_the_pipeline_runs_the_solver_of_the_stage(stage: Prune | Quantize, expected: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    batches = [torch.randn(16, 8) for _ in range(4)]
    hessians = collect_hessians(model, {"0": model[0]}, batches)
    adapter = adapter_for(model[0])
    assert adapter is not None
    wanted = expected(adapter.weight_matrix(model[0]), hessians["0"])
    report = compress(model, batches, type(stage)(**{**stage.__dict__, "layers": ["0"]}))
    assert torch.equal(adapter.weight_matrix(model[0]), wanted.weight)
    assert report.solutions["0"].loss == pytest.approx(wanted.loss)
    assert (report.solutions["0"].refinement is not None) == bool(stage.refine)
