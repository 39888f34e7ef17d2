"""The whole search on a small network: budgets kept, the model given back, results that can be made again."""

from __future__ import annotations

import builtins
import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from lightning_obc.activations import ActivationGrid
from lightning_obc.allocation.latency import LatencyTable
from lightning_obc.allocation.levels import Level, product, unstructured_ladder
from lightning_obc.allocation.output_error import OutputError
from lightning_obc.allocation.recipe import read_recipe, run_recipe
from lightning_obc.allocation.spdy import SPDY
from lightning_obc.allocation.tradeoff import default_levels, search
from lightning_obc.correction_spec import Correct
from lightning_obc.errors import (
    BudgetError,
    CalibrationError,
    ExportError,
    FingerprintError,
    MissingExtraError,
    SpecError,
)
from lightning_obc.specs import Calibration, IntGrid

SMALL = SPDY(starts=4, tries=4, evaluations=8)


def agreement(model: nn.Module, batches: list[Tensor]) -> Any:
    """A metric without labels: how often the compressed model decides like the dense one."""
    with torch.no_grad():
        expected = [model(batch).argmax(1) for batch in batches]

    def metric(other: nn.Module) -> float:
        with torch.no_grad():
            hits = [(other(b).argmax(1) == e).float().mean() for b, e in zip(batches, expected, strict=True)]
        return float(torch.stack(hits).mean())

    return metric


def run(model: nn.Module, batches: list[Tensor], budgets: list[float], **options: Any) -> Any:
    options = {"spdy": SMALL} | options
    return search(model, batches, budgets, agreement(model, batches), **options)


@pytest.mark.parametrize("cost", ["flops", "bops", "bytes"])
def test_every_point_keeps_its_budget_and_the_model_is_dense_again(
    cost: Any, model: Any, batches: list[Tensor], tmp_path: Path
) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    levels = unstructured_ladder(0.1, 0.7) if cost == "flops" else None
    result = run(model, batches, [0.5, 0.3], cost=cost, levels=levels, directory=tmp_path / "db")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert [p.method for p in result.points].count("dp") == 2
    for point in result.points:
        assert 0 < point.cost <= point.budget * (1 + 1e-9)
        assert set(point.profile) == {"stem", "mix", "head"}
    for budget in (0.5, 0.3):
        spdy = result.point(budget, "spdy")
        others = [p for p in result.points if p.budget == spdy.budget]
        assert spdy.loss <= min(p.loss for p in others)
        assert 0 < spdy.evaluations <= 8
    assert result.dense_metric == 1.0


def test_points_can_be_applied_and_written(model: Any, batches: list[Tensor], tmp_path: Path) -> None:
    metric = agreement(model, batches)
    result = run(model, batches, [0.1])
    point = result.point(0.1)
    solutions = result.apply_(model, point)
    assert set(solutions) == set(point.profile)
    assert metric(model) == point.metric
    result.write(tmp_path / "out")
    content = json.loads((tmp_path / "out" / "curve.json").read_text())
    assert content["baseline"] == "the dense float32 model"
    assert len(content["points"]) == len(result.points)
    recipe = read_recipe(tmp_path / "out" / "spdy-0.1.yaml")
    assert {name: level.name for name, level in recipe.levels.items()} == result.point(0.1, "spdy").profile
    assert recipe.calibration["samples"] == 1024
    assert "dense float32 model" in result.table()
    assert "| budget" in (tmp_path / "out" / "curve.md").read_text()
    with pytest.raises(BudgetError, match="no such point"):
        result.point(0.2)


def test_a_recipe_file_makes_the_same_model_of_the_dense_one(model: Any, batches: list[Tensor], tmp_path: Path) -> None:
    """Weights, correction and quantized inputs, from the file, the dense model and the data."""
    spec, stage = ActivationGrid(range="percentile", percentile=99.0), Correct("batch_norm", batches=2)
    dense = copy.deepcopy(model)
    result = run(model, batches, [0.03], methods=["dp"], correct=stage, activations=spec)
    result.write(tmp_path)
    result.apply_(model, result.point(0.03))
    again = run_recipe(dense, tmp_path / "dp-0.03.yaml", batches)
    assert again.recipe.activations == spec
    assert again.recipe.correct == stage
    assert again.quantizer is not None
    assert not torch.equal(model.norm.running_mean, torch.zeros(8))
    for key, value in model.state_dict().items():
        assert torch.equal(value, dense.state_dict()[key]), key
    assert torch.equal(dense(batches[0]), model(batches[0]))


def test_flops_of_a_profile_are_those_of_the_stitched_model(model: Any, batches: list[Tensor]) -> None:
    levels = unstructured_ladder(0.2, 0.6)
    result = run(model, batches, [0.5], cost="flops", levels=levels, methods=["dp"], exclude=["head"])
    point = result.point(0.5)
    result.apply_(model, point)
    positions = {"stem": 36, "mix": 36, "head": 1}
    counted = sum(n * int((getattr(model, name).weight != 0).sum()) for name, n in positions.items())
    dense = sum(n * getattr(model, name).weight.numel() for name, n in positions.items())
    assert result.dense_cost == dense
    assert point.cost == pytest.approx(counted / dense)
    assert "head" not in point.profile


def test_latency_budgets(model: Any, batches: list[Tensor]) -> None:
    levels = product([None], [(None, None), (8, 8)])
    seconds = {name: {"dense": 4.0, "w8+a8": 1.0} for name in ("stem", "mix", "head")}
    table = LatencyTable(seconds, overhead=2.0)
    result = run(model, batches, [0.58], cost=table, levels=levels, methods=["dp"])
    point = result.point(0.58)
    assert result.cost_name == "seconds"
    assert result.dense_cost == 14.0
    assert point.cost * 14.0 == pytest.approx(8.0)
    assert sorted(point.profile.values()) == ["dense", "w8+a8", "w8+a8"]
    with pytest.raises(SpecError, match="costs nothing"):
        run(model, batches, [0.5], cost=LatencyTable({n: {"dense": 0.0} for n in seconds}), levels=[Level()])
    with pytest.raises(SpecError, match=r"stem at w8\+a8"):
        run(model, batches, [0.5], cost=LatencyTable({n: {"dense": 1.0} for n in seconds}), levels=levels)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (0.0, "(?s)not a positive number.*a number above 0"),
        (-1.0, "not a positive"),
        (1.5, "larger than the cost of the dense model"),
    ],
)
def test_impossible_budgets_fail_before_any_work(
    budget: float, message: str, model: Any, batches: list[Tensor], tmp_path: Path
) -> None:
    with pytest.raises(BudgetError, match=message):
        run(model, batches, [0.5, budget], directory=tmp_path / "db")
    assert not (tmp_path / "db").exists()


def test_budgets_below_the_minimum_name_the_best_reachable_and_lose_nothing(
    model: Any, batches: list[Tensor], tmp_path: Path
) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(BudgetError, match=r"Got: 0.001.*best reachable budget") as refused:
        run(model, batches, [0.001], directory=tmp_path / "db")
    # The budget that is named is a share too, and can be met.
    (least,) = re.findall(r"at least ([0-9.e-]+)", str(refused.value))
    assert 0.001 < float(least) < 0.05
    assert run(model, batches, [1.001 * float(least)], directory=tmp_path / "db", methods=["dp"]).points
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert len(list((tmp_path / "db" / "levels").iterdir())) == 3


@pytest.mark.parametrize("cost", ["bops", "bytes"])
def test_an_unreachable_budget_names_layers_and_what_is_left_out(
    cost: Any, model: Any, batches: list[Tensor], tmp_path: Path
) -> None:
    levels = product([None], [(None, None), (8, 8), (2, 8)])
    options: dict[str, Any] = {"levels": levels, "cost": cost, "exclude": ["mix"], "edges_at_8": True}
    with pytest.raises(BudgetError) as refused:
        run(model, batches, [0.01], directory=tmp_path / "db", **options)
    text = str(refused.value)
    parts = re.findall(r"(stem|mix|head|other parameters) ([0-9.e-]+) \(([0-9.]+) %", text)
    shares = {name: (float(cost), float(share)) for name, cost, share in parts}
    assert set(shares) == {"mix", "stem", "head"} | ({"other parameters"} if cost == "bytes" else set())
    assert sum(share for _, share in shares.values()) == pytest.approx(100, abs=1)
    (least,) = re.findall(r"at least ([0-9.e-]+)", text)
    assert sum(part for part, _ in shares.values()) == pytest.approx(float(least), rel=0.01)
    assert "no choice, layers= or exclude= leaves it out of the search" in text
    assert text.count("edges_at_8 keeps it at 8 bits or more") == 2
    if cost == "bytes":
        everything = sum(parameter.numel() for parameter in model.parameters())
        assert shares["mix"][0] == pytest.approx(model.mix.weight.numel() / everything, rel=0.01)


def test_edges_keep_eight_bits(model: Any, batches: list[Tensor]) -> None:
    result = run(model, batches, [0.05], edges_at_8=True, methods=["dp"])
    profile = result.point(0.05).profile
    for name in ("stem", "head"):
        level = result.database.level(name, profile[name])
        assert level.weight_bits >= 8
        assert level.activation_bits >= 8


def test_corrections_start_from_the_dense_state_each_time(model: Any, batches: list[Tensor]) -> None:
    seen: list[float] = []

    def correct(other: Any) -> None:
        seen.append(other.norm.bias[0].item())
        with torch.no_grad():
            other.norm.bias.add_(1.0)

    result = run(model, batches, [0.3], correct=correct)
    assert set(seen) == {model.norm.bias[0].item()}
    result.apply_(model, result.point(0.3))
    assert model.norm.bias[0].item() == seen[0] + 1


def test_scores_by_loss_and_losses_of_ones_own(model: Any, batches: list[Tensor]) -> None:
    calls: list[int] = []

    def loss(other: nn.Module) -> float:
        calls.append(1)
        return float((other.stem.weight == 0).sum())  # type: ignore[union-attr]

    levels = unstructured_ladder(0.3, 0.6)
    result = run(model, batches, [0.6], cost="flops", levels=levels, scores="loss", loss=loss, methods=["dp"])
    assert len(calls) > 3 * (len(levels) - 1)
    assert result.point(0.6).loss == 0, "a loss that sees only one layer leaves that layer dense"


def test_budgets_that_no_single_level_meets_are_noted(model: Any, batches: list[Tensor]) -> None:
    """All levels that fit everywhere miss the budget; a layer that lacks 2:4 falls back to the level without zeros."""
    levels = product([None, "2:4"], [(None, None), (8, 8)])
    everywhere = run(model, batches, [0.9], levels=levels, methods=["uniform"]).point(0.9)
    assert everywhere.profile == {"stem": "w8+a8", "mix": "w8+a8", "head": "w8+a8"}
    seconds = {name: {"dense": 4.0, "w8+a8": 5.0} for name in ("stem", "mix")} | {"head": {"dense": 4.0, "w8+a8": 1.0}}
    table, levels = LatencyTable(seconds), product([None], [(None, None), (8, 8)])
    result = run(model, batches, [0.8], cost=table, levels=levels, methods=["uniform", "dp"])
    assert result.notes == ["no single level meets the budget of 0.8"]
    assert [p.profile for p in result.points] == [{"stem": "dense", "mix": "dense", "head": "w8+a8"}]


def test_output_errors_are_relative(model: Any, batches: list[Tensor]) -> None:
    error = OutputError(model, batches)
    assert error(model) == 0
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.zero_()
    assert error(model) == pytest.approx(1)
    with pytest.raises(CalibrationError, match="returns no tensor"):
        OutputError(model, batches, lambda m, b: "text")


def test_plots(model: Any, batches: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(model, batches, [0.3], methods=["uniform", "dp"])
    real = builtins.__import__

    def without(name: str, *rest: Any, **options: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", without)
        with pytest.raises(MissingExtraError, match="pip install matplotlib"):
            result.plot(tmp_path / "curve.png")
    pytest.importorskip("matplotlib")
    result.plot(tmp_path / "curve.png")
    drawn = (tmp_path / "curve.png").read_bytes()
    assert drawn.startswith(b"\x89PNG")

    def full(figure: Any, file: Any, **options: Any) -> None:
        Path(file).write_bytes(drawn[:100])
        raise OSError("no space left")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(ExportError, match="no space left"):
        result.plot(tmp_path / "curve.png")
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [drawn]


def test_options_that_cannot_be_meant(model: Any, batches: list[Tensor]) -> None:
    with pytest.raises(SpecError, match="greedy"):
        run(model, batches, [0.5], methods=["greedy"])
    with pytest.raises(SpecError, match="Unknown cost"):
        run(model, batches, [0.5], cost="energy", levels=[Level(grid=IntGrid(8))])
    with pytest.raises(SpecError, match="dense model's inputs"):
        run(model, batches, [0.5], calibration=Calibration(mode="sequential"))
    with pytest.raises(SpecError, match="Unknown scores"):
        run(model, batches, [0.5], scores="taste")


def test_spdy_that_would_search_nothing_is_refused_before_a_level_is_solved(
    model: Any, batches: list[Tensor], tmp_path: Path
) -> None:
    with pytest.raises(SpecError, match="leaves nothing to search"):
        run(model, batches, [0.5], spdy=SPDY(evaluations=2), directory=tmp_path / "db")
    assert not (tmp_path / "db").exists()


def test_default_levels_suit_the_cost() -> None:
    assert len(default_levels("flops")) > 30
    assert {level.weight_bits for level in default_levels("bytes")} == {32, 8, 6, 4, 3, 2}
    assert any(level.activations for level in default_levels("bops"))


def test_sampled_positions_belong_to_recipe_and_database(model: Any, batches: list[Tensor], tmp_path: Path) -> None:
    dense, again = copy.deepcopy(model), copy.deepcopy(model)
    levels = [Level(), *product([0.5], [(None, None)])]
    options: dict[str, Any] = {"cost": "flops", "levels": levels, "methods": ["dp"], "directory": tmp_path / "db"}
    result = run(model, batches, [0.6], calibration=Calibration(positions=5, seed=3), **options)
    result.write(tmp_path)
    result.apply_(model, result.point(0.6))
    run_recipe(dense, tmp_path / "dp-0.6.yaml", batches)
    for key, value in model.state_dict().items():
        assert torch.equal(value, dense.state_dict()[key]), key
    with pytest.raises(FingerprintError, match="positions: None instead of 5"):
        run(again, batches, [0.6], **options)


def test_levels_of_an_older_search_in_the_directory_are_not_chosen(
    model: Any, batches: list[Tensor], tmp_path: Path
) -> None:
    few = product([None], [(None, None), (2, None)])
    more = product([None], [(None, None), (8, None), (2, None)])
    budgets, options = [0.5], {"cost": "bytes", "directory": tmp_path / "db"}
    alone = run(model, batches, budgets, levels=few, cost="bytes", scores="loss")
    better = run(model, batches, budgets, levels=more, **options)
    assert "w8" in better.point(0.5).profile.values()
    after = run(model, batches, budgets, levels=few, scores="loss", **options)
    assert [p.profile for p in after.points] == [p.profile for p in alone.points]
    assert {level for p in after.points for level in p.profile.values()} <= {"dense", "w2"}


def test_a_uniform_model_takes_eight_bits_where_edges_do(model: Any, batches: list[Tensor]) -> None:
    """Not the float layer: the baseline would look worse than it is."""
    levels = product([None], [(None, None), (8, 8), (4, 4)])
    result = run(model, batches, [0.05], levels=levels, edges_at_8=True, methods=["uniform"])
    assert result.point(0.05).profile == {"stem": "w8+a8", "mix": "w4+a4", "head": "w8+a8"}


def test_layers_that_are_not_searched_keep_their_time(model: Any, batches: list[Tensor]) -> None:
    levels = product([None], [(None, None), (8, 8)])
    table = LatencyTable({name: {"dense": 4.0, "w8+a8": 1.0} for name in ("stem", "mix", "head")}, overhead=2.0)
    result = run(model, batches, [0.58], cost=table, levels=levels, methods=["dp"], exclude=["head"])
    assert result.dense_cost == 14.0
    assert result.point(0.58).cost * 14.0 == pytest.approx(8.0)


def test_bytes_count_every_parameter() -> None:
    """An embedding, biases and norms are on disk too, and are not searched."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(50, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Flatten(), nn.Linear(24, 4)).eval()
    tokens = torch.randint(50, (32, 3))
    levels = product([None], [(None, None), (4, None)])
    result = search(net, [tokens], [0.8], lambda _: 0.0, cost="bytes", levels=levels, methods=["dp"])
    assert result.dense_cost == 4 * sum(parameter.numel() for parameter in net.parameters())
    point = result.point(0.8)
    quantized = {name: module for name, module in (("2", net[2]), ("4", net[4])) if point.profile[name] == "w4"}
    assert quantized
    # 28 bits less per weight; each row pays 32 bits of scale and 4 of zero point.
    saved = sum(28 * module.weight.numel() - 36 * len(module.weight) for module in quantized.values()) / 8
    assert point.cost * result.dense_cost == pytest.approx(result.dense_cost - saved)


def test_points_follow_each_other_as_if_from_the_dense_model(model: Any, batches: list[Tensor]) -> None:
    def correct(other: Any) -> None:
        with torch.no_grad():
            other.norm.bias.add_(1.0)

    result = run(model, batches, [0.3, 0.1], correct=correct, methods=["dp"])
    before = model.norm.bias.clone()
    for budget in (0.3, 0.1, 0.1):
        result.apply_(model, result.point(budget))
        assert torch.equal(model.norm.bias, before + 1)


def test_quantized_inputs_never_go_to_another_object(model: Any, batches: list[Tensor]) -> None:
    result = run(model, batches, [0.05], methods=["dp"], correct=Correct("batch_norm", batches=1))
    other = copy.deepcopy(model)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(SpecError, match="another model object"):
        result.apply_(other, result.point(0.05))
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_recipes_say_that_a_function_corrected(model: Any, batches: list[Tensor], tmp_path: Path) -> None:
    run(model, batches, [0.3], correct=lambda _: None, methods=["dp"]).write(tmp_path)
    remarks = yaml.safe_load((tmp_path / "dp-0.3.yaml").read_text())["remarks"]
    assert remarks["corrected_by"].startswith("a function")


def test_files_of_a_curve_are_replaced_whole(
    model: Any, batches: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run(model, batches, [0.3], methods=["dp"])
    result.write(tmp_path)
    table = LatencyTable({"stem": {"dense": 1.0}})
    table.save(tmp_path / "table.json")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def interrupted(path: Path, text: str, *_: Any, **__: Any) -> None:
        with path.open("w") as file:
            file.write(text[: len(text) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", interrupted)
    for write in (lambda: result.write(tmp_path), lambda: table.save(tmp_path / "table.json")):
        with pytest.raises(KeyboardInterrupt):
            write()
    with pytest.raises(KeyboardInterrupt):
        result.plot(tmp_path / "curve.svg")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
