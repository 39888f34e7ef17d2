"""Profiles in and out of a model, their recipes, and scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from lightning_obc.activations import ActivationGrid, ActivationQuantizer
from lightning_obc.allocation.database import Database
from lightning_obc.allocation.recipe import apply_recipe, read_recipe, write_recipe
from lightning_obc.allocation.scores import activation_losses, layer_errors, sensitivity_scores, swap_losses
from lightning_obc.allocation.stitch import stitch
from lightning_obc.calibration import collect_hessians
from lightning_obc.errors import DatabaseError, LayerNotFoundError, NonFiniteError, PatternError, SpecError
from lightning_obc.layers import select_layers

PROFILE = {"stem": "0.5", "mix": "2:4+w4+a4", "head": "w8+a8"}


@pytest.fixture
def quantizer(model: Any, batches: list[Tensor]) -> ActivationQuantizer:
    return ActivationQuantizer(model).observe(batches).freeze()


def state(model: Any) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def test_stitching_writes_the_levels_and_dense_brings_the_model_back(
    database: Database, model: Any, quantizer: ActivationQuantizer
) -> None:
    before = state(model)
    solutions = stitch(model, database, PROFILE, quantizer=quantizer)
    assert set(solutions) == set(PROFILE)
    assert float((model.stem.weight == 0).double().mean()) == 0.5
    kept = (model.mix.weight != 0).movedim(1, -1).reshape(-1, 4).sum(1)
    assert bool((kept <= 2).all())
    assert solutions["mix"].codes is not None
    assert quantizer.bits == {"stem": None, "mix": 4, "head": 8}
    assert quantizer.enabled
    stitch(model, database, {}, quantizer=quantizer)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert list(model.state_dict()) == list(before)
    assert quantizer.grids == {}


def test_nothing_is_written_when_something_is_wrong(database: Database, model: Any) -> None:
    before = state(model)
    with pytest.raises(LayerNotFoundError, match="nowhere"):
        stitch(model, database, {"stem": "0.5", "nowhere": "0.5"})
    with pytest.raises(DatabaseError, match="no level '3:4'"):
        stitch(model, database, {"stem": "0.5", "head": "3:4"})
    with pytest.raises(SpecError, match="quantizes activations"):
        stitch(model, database, PROFILE)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_recipes_make_the_same_model_again(
    database: Database,
    model: Any,
    quantizer: ActivationQuantizer,
    statistics: Any,
    batches: list[Tensor],
    tmp_path: Path,
) -> None:
    file = tmp_path / "recipe.yaml"
    write_recipe(file, database, PROFILE, remarks={"budget": 0.1})
    assert yaml.safe_load(file.read_text())["layers"]["mix"] == {"pattern": "2:4", "grid": 4, "activations": 4}
    stitch(model, database, PROFILE, quantizer=quantizer)
    expected, weights = model(batches[0]), state(model)
    stitch(model, database, {}, quantizer=quantizer)
    quantizer.disable()
    apply_recipe(model, file, statistics, quantizer=quantizer)
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[key]), key
    assert torch.equal(model(batches[0]), expected)


def test_recipes_of_other_models_and_unreadable_ones(
    database: Database, model: Any, statistics: Any, tmp_path: Path
) -> None:
    file = tmp_path / "recipe.yaml"
    write_recipe(file, database, {"mix": "2:4"})
    content = yaml.safe_load(file.read_text())
    before = state(model)
    file.write_text(yaml.safe_dump(content | {"layers": {"head": {"grid": 8}, "stem": {"pattern": "2:4"}}}))
    with pytest.raises(PatternError, match=r"'stem' cannot have the recipe's level 2:4"):
        apply_recipe(model, file, statistics)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for broken in (content | {"format": 7}, {"layers": {}}, content | {"layers": {"mix": {"zeros": 3}}}):
        file.write_text(yaml.safe_dump(broken))
        with pytest.raises(SpecError):
            read_recipe(file)
    with pytest.raises(SpecError, match="cannot be read"):
        read_recipe(tmp_path / "none.yaml")


# ------------------------------------------------------------------------------------------------- scores
def test_layer_errors_are_relative_and_grow_with_compression(database: Database) -> None:
    errors = layer_errors(database)
    for name in database.layers:
        solution = database.solution(name, "0.75")
        assert errors[name]["0.75"] == pytest.approx(solution.relative_error)
        assert 0 == errors[name]["dense"] < errors[name]["0.5"] < errors[name]["0.75"] < 1
        assert errors[name]["w8+a8"] < errors[name]["w4+a4"]


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_activation_losses_are_the_measured_output_errors(granularity: Any, model: Any, batches: list[Tensor]) -> None:
    tool = ActivationQuantizer(model, spec=ActivationGrid(granularity=granularity)).observe(batches).freeze()
    layers = select_layers(model)
    found = activation_losses(model, tool, layers, [8, 4], batches)
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in layers}
    handles = [
        module.register_forward_hook(lambda m, args, y, name=name: seen[name].append((args[0], y)))
        for name, module in layers.items()
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
        for handle in handles:
            handle.remove()
        tool.set_bits(4)
        tool.enable()
        for name, module in layers.items():
            error = sum(float((module(x) - y).double().square().sum()) for x, y in seen[name])
            assert found[name][4] == pytest.approx(error / sum(map(len, batches)), rel=1e-4)
            assert found[name][8] < 0.1 * found[name][4]


def test_activation_errors_add_to_those_of_the_weights(database: Database) -> None:
    plain, both = layer_errors(database), layer_errors(database, {"mix": {8: 2.0, 4: 5.0}})
    reference = database.references()["mix"]
    assert both["mix"]["w8+a8"] == pytest.approx(plain["mix"]["w8+a8"] + 2.0 / reference)
    assert both["mix"]["0.5"] == plain["mix"]["0.5"]
    assert both["head"] == plain["head"]


def test_swap_losses_change_one_layer_at_a_time(database: Database) -> None:
    seen: list[dict[str, str]] = []

    def evaluate(profile: dict[str, str]) -> float:
        seen.append(dict(profile))
        changed = [level for level in profile.values() if level != "dense"]
        return 1.0 + (float("nan") if changed == ["w8+a8"] else 0.5 * len(changed))

    levels = [level for level in database.levels("head") if level.name in ("dense", "0.5", "w8+a8")]
    scores = swap_losses(database, evaluate, levels=levels)
    assert scores["mix"] == {"dense": 0.0, "w8+a8": float("inf"), "0.5": 0.5}
    assert max(sum(level != "dense" for level in profile.values()) for profile in seen) == 1
    with pytest.raises(NonFiniteError, match="dense"):
        swap_losses(database, lambda profile: float("inf"))


def test_sensitivities_scale_a_layers_errors_by_one_measured_loss() -> None:
    errors = {
        name: {"dense": 0.0, "mild": 0.1, "half": 0.2, "low": 0.4} for name in ("calm", "touchy", "deaf", "broken")
    }
    errors["fixed"] = {"dense": 0.0}
    weight = {"calm": 1.0, "touchy": 50.0, "deaf": 0.0, "broken": float("nan")}
    seen: list[dict[str, str]] = []

    def evaluate(profile: dict[str, str]) -> float:
        seen.append(profile)
        return 3.0 + sum(weight[name] * errors[name][level] for name, level in profile.items() if level != "dense")

    scores = sensitivity_scores(errors, evaluate)
    assert len(seen) == 5, "the dense model and one change of every layer that can change"
    assert [list(profile.values()).count("half") for profile in seen] == [0, 1, 1, 1, 1]
    assert scores["touchy"]["low"] == pytest.approx(50 * 0.4)
    assert scores["calm"]["mild"] == pytest.approx(0.1)
    assert 0 < scores["deaf"]["low"] < scores["calm"]["low"]
    assert scores["broken"] == pytest.approx(scores["touchy"])
    assert scores["fixed"] == {"dense": 0.0}
    with pytest.raises(NonFiniteError, match="dense"):
        sensitivity_scores(errors, lambda profile: float("nan"))
    with pytest.raises(NonFiniteError, match="single change"):
        sensitivity_scores(errors, lambda profile: 1.0 if set(profile.values()) == {"dense"} else float("nan"))


def test_hessians_of_a_stitched_model_differ(database: Database, model: Any, batches: list[Tensor]) -> None:
    """The database's Hessians are the dense model's: a second calibration after stitching is another one."""
    stitch(model, database, {"stem": "0.75"})
    again = collect_hessians(model, {"head": model.head}, batches)["head"].full()
    assert not torch.allclose(again, database.hessian("head"), rtol=1e-2)
