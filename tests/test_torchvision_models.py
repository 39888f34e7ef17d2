"""Networks as people use them: torchvision's models, random weights, random images at the least resolution.

The plan is checked on every layer. Solved are, of each kind of layer, the cheapest one, and then as many further layers
as fit a budget of sweep operations, the cheapest first: a full sweep of all of ResNet-50 takes 1.3e14 of them. A kind
whose cheapest layer alone exceeds the limit (classifiers; everything in the vision transformer, with 768 inputs or
more) is solved by the column-order solvers. What was left out is in the tests' output (``pytest -s``).
"""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_obc as obc
from lightning_obc.layers import select_layers, unsupported_layers
from lightning_obc.layers.parts import LayerPart
from lightning_obc.planning import LayerPlan, StagePlan, plan_stage

pytest.importorskip("torchvision")

LIMIT = 5e9  # Most operations of a single OBS sweep.


def _benchmark() -> Any:
    """The benchmark runs whole networks, minutes each; the networks and its checks are used here too."""
    path = Path(__file__).parent.parent / "benchmarks" / "torchvision_networks.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


benchmark = _benchmark()
CASES: dict[str, Any] = benchmark.cases()
QUICK = ("resnet18", "mobilenet_v3_small", "vit_b_16")


def _model(name: str) -> nn.Module:
    return CASES[name].model()


@pytest.mark.parametrize("name", CASES)
def test_the_plan_accounts_for_every_weight(name: str) -> None:
    model = _model(name)
    stages = (obc.Quantize(4), obc.Prune("2:4", misfit="skip"))
    quantize, prune = (plan_stage(model, stage) for stage in stages)
    weights = {id(layer.module.weight) for layer in quantize.layers}
    rest = [key for key, p in model.named_parameters() if p.dim() > 1 and id(p) not in weights]
    assert [key for key in rest if key.rpartition(".")[2] not in benchmark.NO_LAYERS] == []
    assert len(weights) == sum(p.dim() > 1 for p in model.parameters()) - len(rest)
    owners = {key.rpartition(".")[0] for key in rest}
    assert set(unsupported_layers(model)) == owners
    promised = {layer.name: layer for layer in quantize.layers}
    for name_, layer in promised.items():
        assert (name_ in prune.skipped) == (layer.shape.channels % 4 != 0)
    assert {layer.name for layer in prune.layers} | set(prune.skipped) == set(promised)
    assert quantize.skipped == {}


def _kind(layer: LayerPlan) -> tuple[Any, ...]:
    module: Any = layer.module
    if isinstance(module, LayerPart):
        return type(module.owner), module.parameter
    return type(module), getattr(module, "kernel_size", None) == (1, 1), layer.shape.groups > 1


def _cheapest(plan: StagePlan) -> dict[Any, LayerPlan]:
    """The cheapest layer of each kind."""
    ordered = sorted(plan.layers, key=lambda layer: -layer.sweep_flops)
    return {_kind(layer): layer for layer in ordered}


def _chosen(plan: StagePlan, budget: float) -> list[str]:
    """The cheapest layer of each kind below the limit, then the cheapest of all while they fit the budget."""
    cheapest = [layer for layer in _cheapest(plan).values() if layer.sweep_flops <= LIMIT]
    chosen = {layer.name: layer.sweep_flops for layer in cheapest}
    for layer in sorted(plan.layers, key=lambda layer: layer.sweep_flops):
        if layer.name not in chosen and sum(chosen.values()) + layer.sweep_flops <= budget:
            chosen[layer.name] = layer.sweep_flops
    left = [layer.name for layer in plan.layers if layer.name not in chosen]
    print(f"solved {len(chosen)} of {len(plan.layers)}; left out: {', '.join(left)}")
    return list(chosen)


def _wide(plan: StagePlan) -> list[str]:
    """The cheapest layer of each kind above the limit."""
    return [layer.name for layer in _cheapest(plan).values() if layer.sweep_flops > LIMIT]


def _rows(weight: Tensor) -> Tensor:
    """``[rows, …, channels]``, runs of channels at one kernel position last."""
    return weight.detach().movedim(1, -1)


def _run_and_check(name: str, layers: list[str], solvers: tuple[Any, Any], wide: Collection[str] = ()) -> None:
    """2:4 and then 4 bits on these layers; ``wide`` ones among them are pruned by magnitude and rounded to nearest."""
    case, model = CASES[name], _model(name)
    before = copy.deepcopy(model.state_dict())
    plain, nearest = ({key: {"solver": solver} for key in wide} for solver in ("magnitude", "rtn"))
    prune = obc.Prune("2:4", layers=layers, misfit="skip", solver=solvers[0], overrides=plain)
    quantize = obc.Quantize(4, layers=layers, solver=solvers[1], overrides=nearest)
    plans = [plan_stage(model, stage) for stage in (prune, quantize)]
    report = obc.compress(model, case.batches(), [prune, quantize], on_failure="raise")
    for plan, stage in zip(plans, report.stages, strict=True):
        assert [row.name for row in stage.layers] == [layer.name for layer in plan.layers]
        assert all(row.compressed for row in stage.layers)
    weights = {key: module.weight for key, module in select_layers(model, layers).items()}
    pruned = {layer.name for layer in plans[0].layers}
    assert set(weights) == set(layers)
    for key, weight in weights.items():
        rows = _rows(weight)
        assert bool(rows.isfinite().all())
        for row in rows:
            assert len(row.unique()) <= 16, key
        if key in pruned:
            assert int((rows.reshape(-1, 4) != 0).sum(1).max()) <= 2, key
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    ids = {id(weight) for weight in weights.values()}
    assert changed == {key for key, parameter in model.named_parameters() if id(parameter) in ids}
    with torch.no_grad():
        batch = case.batches()[0]
        output = model(batch[0] if case.detects else batch)
    assert len(output) == 2 if case.detects else bool(output.isfinite().all())


def _slow(names: Any) -> list[Any]:
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", _slow(name for name in CASES if name != "vit_b_16"))
def test_stages_hold_on_every_promised_layer(name: str) -> None:
    budget = 2e9 if name in QUICK else 4e9
    _run_and_check(name, _chosen(plan_stage(_model(name), obc.Quantize(4)), budget), ("obs", "obs"))


@pytest.mark.parametrize("name", _slow(("resnet18", "mobilenet_v3_small", "vit_b_16", "resnet50", "efficientnet_b0")))
def test_kinds_of_layers_that_are_always_wide(name: str) -> None:
    layers = _wide(plan_stage(_model(name), obc.Quantize(4)))
    assert layers
    _run_and_check(name, layers, ("sparsegpt", "gptq"))


@pytest.mark.slow
def test_a_whole_network() -> None:
    """Every layer at once: by OBS up to the limit, the few wider ones in column order, as the benchmark does it."""
    found = benchmark.run("mobilenet_v3_small", CASES["mobilenet_v3_small"], LIMIT, 4608)
    solvers = [layer["quantize"]["solver"] for layer in found["layers"]]
    assert 0 < solvers.count("gptq") < len(solvers) // 4
    assert len(solvers) == 54


class Stub(nn.Module):
    """A network with a layer of each solver, one that 2:4 does not fit, and one that nothing handles."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = nn.Linear(3, 8), nn.Linear(8, 16)
        self.widest, self.norm = nn.Linear(16, 4), nn.BatchNorm1d(4)
        self.layer_scale = nn.Parameter(torch.ones(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.mean((2, 3))).relu()
        return self.norm(self.widest(self.wide(x).relu())) * self.layer_scale.T


def test_the_benchmark_of_whole_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(benchmark, "FOLDER", tmp_path)
    monkeypatch.setattr(benchmark, "cases", lambda: {"stub": benchmark.Case(Stub, 4)})
    monkeypatch.setitem(sys.modules, "machine", SimpleNamespace(describe=lambda: "some machine"))
    limits = ["--limit", "1000", "--widest", "10", "--name", "nets"]
    assert benchmark.main(limits) == 0
    text = (tmp_path / "nets.md").read_text()
    assert "| stub | 3 | 0 / 1 / 1 | 1 | 1 / 1 / 1 |" in text
    assert "stem of stub" in text
    # What does not hold gives no figures.
    monkeypatch.setattr(benchmark, "check_state", lambda *_: benchmark.check(False, "made to fail"))
    assert benchmark.main([*limits[:4], "--name", "red"]) == 1
    assert "a check is red, no figures: made to fail" in capsys.readouterr().err
    assert not (tmp_path / "red.md").exists()


def test_the_checks_of_the_benchmark_can_fail() -> None:
    model = nn.Sequential(nn.Linear(32, 2), nn.Linear(2, 2))
    quantize = plan_stage(model, obc.Quantize(4))
    prune = plan_stage(model, obc.Prune("2:4", misfit="skip"))
    with pytest.raises(benchmark.CheckError, match="0 has more than 16 values"):
        benchmark.check_layers(model, prune, quantize)
    nn.init.ones_(model[0].weight)
    with pytest.raises(benchmark.CheckError, match="0 is not 2:4"):
        benchmark.check_layers(model, prune, quantize)
    model[0].weight.data[:, ::2] = 0
    benchmark.check_layers(model, prune, quantize)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(benchmark.CheckError, match=r"changed, or not: \['0.weight', '1.weight'\]"):
        benchmark.check_state(model, before, quantize.modules)
    assert benchmark.left_over(model, {"0": model[0], "1": model[1]}) == []
    model.extra = nn.Parameter(torch.zeros(2, 2))
    assert benchmark.left_over(model, {"0": model[0], "1": model[1]}) == ["extra"]
