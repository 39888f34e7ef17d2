"""Whole runs in the calibration modes and under a memory limit."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_obc as obc
from lightning_obc.calibration import Collector
from lightning_obc.calibration_spec import parse_bytes
from lightning_obc.errors import OBCError, SpecError
from lightning_obc.layers import blocks_of, select_layers
from lightning_obc.planning import plan_stage


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide, self.back = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.back(self.wide(x).relu())


class Residual(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.head = nn.Linear(width, 4)
        self.blocks = nn.Sequential(Block(width), Block(width), Block(width))
        self.stem = nn.Linear(8, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))


def setting(seed: int = 0) -> tuple[Residual, Tensor]:
    torch.manual_seed(seed)
    return Residual(), torch.randn(256, 8) @ (torch.randn(8, 8) * torch.logspace(0, -1, 8))


def compressed(stage: Any, seed: int = 0, **options: Any) -> tuple[float, obc.CompressionReport, nn.Module]:
    """Relative error of the network's output on the calibration data, the report, and the model."""
    model, x = setting(seed)
    with torch.no_grad():
        wanted = model(x)
        report = obc.compress(
            model, x, stage, calibration=obc.Calibration(batch_size=128, **options), on_failure="raise"
        )
        error = (model(x) - wanted).square().sum() / wanted.square().sum()
    return float(error), report, model


@pytest.mark.parametrize("stage", [obc.Prune("2:4"), obc.Quantize(3)], ids=str)
def test_asymmetric_calibration_lowers_the_error_of_the_output(stage: Any) -> None:
    errors: dict[str, list[float]] = {"independent": [], "asymmetric": []}
    for seed in range(3):
        for mode, found in errors.items():
            found.append(compressed(stage, seed, mode=mode)[0])
    for independent, asymmetric in zip(*errors.values(), strict=True):
        assert asymmetric < independent


def test_losses_are_those_of_the_output_against_the_model_before() -> None:
    """The last layer of the network sees every other layer's error: its loss is the network's."""
    model, x = setting()
    wanted = model(x).detach()
    for options in ({"mode": "sequential"}, {"mode": "asymmetric"}, {"mode": "asymmetric", "mixing": 0.5}):
        error, report, _ = compressed(obc.Prune("2:4"), **options)
        row = report.layers["head"]
        bias_free = wanted - model.head.bias.detach()
        assert row.loss == pytest.approx(error * float(wanted.square().sum()) / 256, rel=1e-4)
        assert row.relative_error == pytest.approx(row.loss / float(bias_free.square().sum() / 256), rel=1e-4)
        assert row.inherited is not None
        assert 0 < row.inherited < row.loss
        assert report.layers["stem"].inherited == 0
        assert "behind compressed layers" in report.table()
    assert compressed(obc.Prune("2:4"))[1].layers["head"].inherited is None


def test_all_at_once_is_independent_bit_for_bit() -> None:
    independent = compressed(obc.Quantize(3))[2].state_dict()
    together = compressed(obc.Quantize(3), mode="asymmetric", together="all")[2].state_dict()
    assert all(torch.equal(value, independent[key]) for key, value in together.items())


def test_blocks_start_from_the_same_inputs_as_independent_ones() -> None:
    """Within a block, and up to the first compressed one, nothing differs; behind it everything does."""
    independent = compressed(obc.Prune("2:4", exclude=["stem"]))[1].layers
    blocks = compressed(obc.Prune("2:4", exclude=["stem"]), mode="sequential", together="block")[1].layers
    assert blocks["blocks.0.back"].inherited == 0
    assert blocks["blocks.0.back"].loss == pytest.approx(independent["blocks.0.back"].loss, rel=1e-9)
    assert blocks["blocks.1.wide"].inherited > 0
    # The compressed neighbour within the block does not show.
    alone = obc.Prune("2:4", exclude=["stem", "blocks.1.wide"])
    beside = compressed(alone, mode="sequential", together="block")[1].layers["blocks.1.back"]
    assert blocks["blocks.1.back"].inherited == pytest.approx(beside.inherited, rel=1e-9)


def test_blocks_are_read_off_the_containers() -> None:
    model = Residual()
    found = blocks_of(model, ["stem", "blocks.0.wide", "blocks.0.back", "blocks.1.wide", "head"])
    assert found == [["stem"], ["blocks.0.wide", "blocks.0.back"], ["blocks.1.wide"], ["head"]]
    nested = nn.Sequential(nn.Sequential(nn.Linear(2, 2), Block(2)), nn.Linear(2, 2))
    assert blocks_of(nested, list(select_layers(nested))) == [["0.0"], ["0.1.wide", "0.1.back"], ["1"]]


def test_stages_keep_what_earlier_ones_made() -> None:
    _, report, model = compressed([obc.Prune("2:4"), obc.Quantize(4)], mode="asymmetric")
    for name, module in select_layers(model).items():
        assert (module.weight.reshape(-1, 4) == 0).sum(1).ge(2).all(), name
        solution = report.solutions[name]
        assert solution.grid is not None
        assert torch.equal(solution.grid.dequantize(solution.codes)[0] * solution.mask[0], module.weight)


def live_statistics() -> int:
    """Bytes of all float64 tensors that are alive and can be statistics."""
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        if type(thing) is Tensor and thing.dtype == torch.float64 and thing.dim() >= 3:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("options", [{}, {"mode": "asymmetric", "together": "all"}], ids=["independent", "paired"])
def test_a_quarter_of_the_memory_gives_the_same_bits(options: dict[str, Any]) -> None:
    model, x = setting()
    stage = obc.Prune("2:4", exclude=["stem"])
    spec = obc.Calibration(batch_size=128, **options)
    whole = plan_stage(model, stage, spec).statistics_bytes
    limited = obc.Calibration(batch_size=128, memory=whole // 4, **options)
    plan = plan_stage(model, stage, limited)
    assert plan.statistics_bytes <= whole // 4
    assert len(plan.passes) >= 4
    assert f"{len(plan.passes)} calibration passes" in str(plan)
    results, peaks = [], []
    before = live_statistics()
    for calibration in (spec, limited):
        twin, watched = copy.deepcopy(model), []
        report = obc.compress(
            twin, x, stage, calibration=calibration, progress=lambda *_, into=watched: into.append(live_statistics())
        )
        results.append((twin.state_dict(), [(row.name, row.loss) for row in report.stages[0].layers]))
        peaks.append(max(watched) - before)
    (unlimited, losses), (bounded, bounded_losses) = results
    assert all(torch.equal(value, unlimited[key]) for key, value in bounded.items())
    assert bounded_losses == losses
    assert peaks[0] == whole
    assert peaks[1] <= whole // 4


def test_a_layer_above_the_limit_gets_its_own_pass_and_is_named() -> None:
    model, _ = setting()
    plan = plan_stage(model, obc.Quantize(4), obc.Calibration(memory="5 KiB"))
    assert "larger alone than the memory limit: blocks.0.back, blocks.1.back" in str(plan)
    assert [len(part) for part in plan.passes].count(1) >= 3
    assert sorted(layer.name for part in plan.passes for layer in part) == sorted(select_layers(model))


def test_a_failure_leaves_the_layers_of_its_group_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_obc import stage_run

    solve, calls = stage_run.solve_layer, []

    def failing(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise OBCError("the third layer fails")
        return solve(*args)

    model, x = setting()
    state = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(stage_run, "solve_layer", failing)
    with pytest.raises(OBCError, match="third"):
        obc.compress(model, x, obc.Quantize(3), on_failure="raise")
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("text", "size"), [(1, 1), ("12", 12), ("2 GiB", 2**31), ("1.5kb", 1500), ("3MiB", 3 * 2**20), (None, None)]
)
def test_amounts_of_memory(text: Any, size: int | None) -> None:
    assert parse_bytes(text) == size
    assert obc.Calibration(memory=text).memory_bytes == size


@pytest.mark.parametrize(
    "options",
    [
        {"memory": 0},
        {"memory": "much"},
        {"memory": "1 TB"},
        {"memory": True},
        {"mode": "backwards"},
        {"together": "head"},
        {"mode": "asymmetric", "mixing": 0},
        {"mode": "asymmetric", "mixing": 1.5},
        {"mode": "sequential", "mixing": 0.5},
    ],
)
def test_impossible_calibrations(options: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=r"Calibration\."):
        obc.Calibration(**options)


def test_asymmetric_blocks_make_up_for_what_came_before_only_once() -> None:
    """Deep blocks of layers in a row: each moved for all of the earlier error would add up to a multiple of it."""

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(16, 16) for _ in range(4))
            for parameter in (self.a.weight, self.b.weight, self.c.weight, self.d.weight):
                nn.init.kaiming_normal_(parameter)

        def forward(self, x: Tensor) -> Tensor:
            return self.d(self.c(self.b(self.a(x).relu()).relu()).relu())

    for seed in range(3):
        torch.manual_seed(seed)
        dense, x = nn.Sequential(Chain(), Chain(), Chain()), torch.randn(400, 16)
        errors = {}
        for mode in ("independent", "asymmetric"):
            model, spec = copy.deepcopy(dense), obc.Calibration(mode=mode, together="block")
            obc.compress(model, x, obc.Quantize(3), calibration=spec, on_failure="raise")
            with torch.no_grad():
                errors[mode] = float((model(x) - dense(x)).square().mean())
        assert errors["asymmetric"] < errors["independent"]


def test_which_layers_of_a_group_its_inputs_reach_first() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.value, self.out, self.skip = (nn.Linear(6, 6) for _ in range(4))
            self.norm = nn.LayerNorm(6)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x)
            return self.skip(x) + self.out(self.query(x).softmax(-1) * self.value(x))

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 6), Attention()), torch.randn(5, 6)
    before = copy.deepcopy(model.state_dict())
    collect = Collector(model, [x], obc.Calibration())
    inside = select_layers(model, ["1"])
    assert collect.fed_from_outside(inside) == {"1.query", "1.value", "1.skip"}
    assert collect.fed_from_outside(select_layers(model)) == {"0"}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def means(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda _, args, out, name=name: found.update({name: out.double().mean(0)}))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize(
    ("mode", "together"), [("independent", "layer"), ("asymmetric", "layer"), ("sequential", "block")]
)
def test_biases_are_corrected_with_their_layers(mode: Any, together: Any) -> None:
    model, x = setting()
    x = x + 1.0
    wanted = means(model, x)
    spec = obc.Calibration(mode=mode, together=together, bias=True, batch_size=100)
    keys = list(model.state_dict())
    obc.compress(model, x, obc.Quantize(3), calibration=spec, on_failure="raise")
    found = means(model, x)
    for name, mean in wanted.items():
        torch.testing.assert_close(found[name], mean, rtol=1e-4, atol=1e-5)
    assert list(model.state_dict()) == keys
    assert "biases corrected" in str(plan_stage(model, obc.Quantize(3), spec))
    plain = setting()[0]
    obc.compress(plain, x, obc.Quantize(3), calibration=obc.Calibration(mode=mode, together=together))
    assert any(not torch.allclose(means(plain, x)[name], mean, rtol=1e-2) for name, mean in wanted.items())


def test_biases_are_no_matter_where_there_are_none() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8, bias=False), nn.LSTM(8, 8)), torch.randn(20, 4, 8)
    report = obc.compress(model, x, obc.Quantize(3), calibration=obc.Calibration(bias=True, mode="sequential"))
    assert all(row.compressed for row in report.stages[0].layers)


@pytest.mark.parametrize("mode", ["independent", "asymmetric"])
def test_groups_solved_for_one_hessian(mode: Any) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(6, 12, 3, groups=6), nn.ReLU(), nn.Conv2d(12, 12, 3, groups=12))
    scale = torch.logspace(-1, 1, 6)[:, None, None]
    x = torch.randn(40, 6, 9, 9).cumsum(2) * scale
    results = {}
    for pooled in (False, True):
        model = copy.deepcopy(dense)
        spec = obc.Calibration(pooled=pooled, mode=mode)
        report = obc.compress(model, x, obc.Quantize(3), calibration=spec, on_failure="raise")
        results[pooled] = model[0].weight.detach().clone()
        with torch.no_grad():
            error = (model[0](x) - dense[0](x)).double().square().sum() / len(x)
        # Also solved for another Hessian, the loss is the error of the output.
        assert report.layers["0"].loss == pytest.approx(float(error), rel=1e-5)
        last = report.layers["2"]
    assert not torch.equal(results[True], results[False])
    assert last.loss > 0
    repeated = copy.deepcopy(dense[:1])
    same = torch.randn(40, 1, 9, 9).cumsum(2).repeat(1, 6, 1, 1)
    for pooled in (False, True):
        model = copy.deepcopy(repeated)
        obc.compress(model, same, obc.Quantize(3), calibration=obc.Calibration(pooled=pooled))
        results[pooled] = model[0].weight.detach().clone()
    assert torch.equal(results[True], results[False])
