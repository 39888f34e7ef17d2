"""Per-layer overrides, and the first and last layer of a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_obc as obc
from lightning_obc.errors import LayerNotFoundError, PatternError, SpecError
from lightning_obc.layerwise import differences, layer_stages
from lightning_obc.planning import plan_stage


class Crossed(nn.Module):
    """Registers its layers in another order than it runs them."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.body = nn.Linear(8, 4), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        self.stem = nn.Linear(8, 8)
        self.unused = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)))


def zeros(layer: Any) -> float:
    return float((layer.weight == 0).float().mean())


def levels(layer: Any) -> int:
    return max(len(row.unique()) for row in layer.weight)


@pytest.fixture
def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(32, 8, generator=generator) for _ in range(2)]


def test_later_overrides_win_and_the_table_says_so(batches: list[Tensor]) -> None:
    model = Crossed()
    stage = obc.Prune(
        0.5,
        exclude=["unused"],
        overrides={"Linear": {"damping": 0.1}, "body.*": {"pattern": "2:4"}, "body.1": {"pattern": 0.25}},
    )
    own = layer_stages(model, stage)
    assert {name: str(x.parsed) for name, x in own.items()} == {
        "head": "0.5",
        "body.0": "2:4",
        "body.1": "0.25",
        "stem": "0.5",
    }
    assert all(x.damping == 0.1 for x in own.values())
    plan = str(obc.plan(model, [stage], batches[0]))
    assert "differently: body.0 (with pattern=2:4, damping=0.1)" in plan
    report = obc.compress(model, batches, stage)
    assert [zeros(layer) for layer in (model.head, *model.body, model.stem)] == [0.5, 0.5, 0.25, 0.5]
    assert "differently: body.0 (by Prune(2:4))" in report.table()
    assert report.layers["body.1"].sparsity == 0.25


def test_an_override_equals_a_stage_of_its_own(batches: list[Tensor]) -> None:
    one, two = Crossed(), Crossed()
    two.load_state_dict(one.state_dict())
    obc.compress(one, batches, obc.Quantize(4, exclude=["unused"], overrides={"head": obc.QuantizeOverride(grid=8)}))
    head = obc.Quantize(8, layers=["head"])
    # Independent calibration before either stage, as in one stage.
    reference = Crossed()
    reference.load_state_dict(two.state_dict())
    obc.compress(two, batches, obc.Quantize(4, exclude=["head", "unused"]))
    obc.compress(reference, batches, head)
    assert torch.equal(one.head.weight, reference.head.weight)
    assert torch.equal(one.body[0].weight, two.body[0].weight)
    assert torch.equal(one.stem.weight, two.stem.weight)


def test_edges_are_those_that_the_data_reaches_first_and_last(batches: list[Tensor]) -> None:
    model = Crossed()
    obc.compress(model, batches, obc.Prune(0.5, exclude=["unused"], edges="skip"))
    assert [zeros(layer) for layer in (model.stem, *model.body, model.head)] == [0, 0.5, 0.5, 0]
    obc.compress(model, batches, obc.Quantize(2, exclude=["unused"], edges=8, overrides={"head": {"damping": 0.1}}))
    assert [levels(layer) <= 4 for layer in (model.stem, *model.body, model.head)] == [False, True, True, False]
    # Without data the order of the modules has to do: head comes first there.
    skipping = plan_stage(model, obc.Prune(0.5, edges="skip"))
    assert [layer.name for layer in skipping.layers] == ["body.0", "body.1", "stem"]
    found = obc.plan(model, [obc.Prune(0.5, exclude=["unused"], edges="skip")], batches[0])
    assert [layer.name for layer in found.stages[0].plan.layers] == ["body.0", "body.1"]


def test_overridden_backends_and_solvers_are_timed(batches: list[Tensor]) -> None:
    stage = obc.Quantize(4, backend="torch", exclude=["unused"], overrides={"head": {"backend": "naive"}})
    found = obc.plan(Crossed(), [stage], batches[0])
    assert set(found.speeds) == {"torch", "naive"}
    assert found.stages[0].solve_seconds is not None
    mixed = obc.Quantize(4, exclude=["unused"], overrides={"head": {"solver": "gptq"}})
    assert obc.plan(Crossed(), [mixed]).stages[0].solve_seconds is not None


def test_gradual_overrides_reach_their_own_sparsity() -> None:
    stage = obc.Prune(
        0.8, at={"epoch": 1}, schedule=obc.Gradual(3, curve="linear"), overrides={"a": {"pattern": 0.4}, "b": {}}
    )
    steps = stage.steps()
    assert [step.overrides["a"].pattern for step in steps] == [obc.Unstructured(x) for x in (0.0, 0.2, 0.4)]
    assert [step.overrides["b"] for step in steps] == [obc.PruneOverride()] * 3


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: obc.Prune(0.5, overrides={"a": {"grid": 4}}), "grid"),
        (lambda: obc.Prune(0.5, overrides={"a": 0.3}), "cannot be read"),
        (lambda: obc.Prune(0.5, overrides=["a"]), "mapping"),
        (lambda: obc.Prune(0.5, overrides={"a": {"pattern": 124}}), "in quotes"),
        (lambda: obc.Prune(0.5, refine=True, overrides={"a": {"pattern": obc.Block(4)}}), "cannot be refined"),
        (lambda: obc.Prune(0.5, at={"epoch": 0}, schedule=obc.Gradual(2), overrides={"a": {"pattern": "2:4"}}), "grad"),
        (lambda: obc.Quantize(4, overrides={"a": {"grid": 9}}), "bit width"),
        (lambda: obc.Quantize(4, edges="first"), "edges"),
        (lambda: obc.Quantize(4, edges=16), "bit width"),
        (lambda: obc.Prune(0.5, edges=8), "edges"),
    ],
)
def test_overrides_that_cannot_be_meant(make: Any, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        make()


def test_overrides_that_match_nothing_are_named_before_anything_changes(batches: list[Tensor]) -> None:
    model = Crossed()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for stage, error, words in (
        (obc.Prune(0.5, overrides={"steam": {"pattern": 0.3}}), LayerNotFoundError, "'stem'"),
        (obc.Prune(0.5, layers=["head"], overrides={"stem": {"pattern": 0.3}}), LayerNotFoundError, "none of its"),
        (obc.Prune(0.5, overrides={"stem": {"pattern": "3:5"}}), PatternError, "stem"),
    ):
        with pytest.raises(error, match=words):
            obc.compress(model, batches, stage)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_overrides_come_back_from_yaml() -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_class_arguments(obc.OBCCallback, "obc")
    text = """
obc:
  stages:
    - class_path: lightning_obc.Prune
      init_args:
        pattern: "2:4"
        edges: skip
        overrides: {"stem.*": {pattern: 0.3, refine: true}, body: {pattern: "1:4"}, a: {pattern: {class_path:
          lightning_obc.Block, init_args: {size: 4, sparsity: 0.5}}}}
    - class_path: lightning_obc.Quantize
      init_args: {grid: 4, edges: 8, overrides: {head: {grid: {bits: 8, symmetric: true}}}}
"""
    config = parser.parse_string(text)
    stages = parser.instantiate_classes(config).obc.stages
    assert stages == [
        obc.Prune(
            "2:4",
            edges="skip",
            overrides={
                "stem.*": {"pattern": 0.3, "refine": True},
                "body": {"pattern": "1:4"},
                "a": {"pattern": obc.Block(4, 0.5)},
            },
        ),
        obc.Quantize(4, edges=8, overrides={"head": {"grid": obc.IntGrid(8, symmetric=True)}}),
    ]
    assert list(stages[0].overrides) == ["stem.*", "body", "a"]
    assert differences(stages[0], stages[0]) == ""
    again = parser.parse_string(parser.dump(config))
    assert parser.instantiate_classes(again).obc.stages == stages
    assert parser.dump(again) == parser.dump(config)
