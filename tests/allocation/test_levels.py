"""Levels: ladders, names, and the way to YAML and back."""

from __future__ import annotations

import pytest
import yaml

from lightning_obc.allocation.levels import (
    Level,
    block_ladder,
    check_levels,
    density_ladder,
    product,
    unique,
    unstructured_ladder,
)
from lightning_obc.errors import SpecError
from lightning_obc.specs import NM, Block, IntGrid, Structured, Unstructured


def test_ladders_have_the_lengths_of_the_paper() -> None:
    assert len(density_ladder(0.01)) == 45
    assert len(density_ladder(0.05)) == 30
    assert density_ladder(0.5, 0.5) == [1.0, 0.5]
    assert [level.name for level in unstructured_ladder(0.7)] == ["dense", "0.1", "0.19", "0.271", "0.3439"]
    assert block_ladder(4, 0.9)[1] == Level(Block(4, 1 - 0.9))


LEVELS = [
    Level(),
    Level(Unstructured(1 / 3), None, 4),
    Level(NM(2, 4), IntGrid(8), 8),
    Level(Block(8, 0.25), IntGrid(3, symmetric=True, granularity="group", group_size=16, scale="hessian")),
    Level(Structured(0.5)),
    Level(grid=IntGrid(4, granularity="tensor")),
]


@pytest.mark.parametrize("level", LEVELS, ids=str)
def test_levels_come_back_from_yaml(level: Level) -> None:
    assert Level.from_dict(yaml.safe_load(yaml.safe_dump(level.to_dict()))) == level


def test_names_are_unique() -> None:
    assert [str(level) for level in LEVELS] == [
        "dense",
        "0.333333+a4",
        "2:4+w8+a8",
        "block8@0.25+w3symgroup16hessian",
        "structured@0.5",
        "w4tensor",
    ]
    assert unique([*LEVELS, *LEVELS]) == LEVELS
    with pytest.raises(SpecError, match="same name"):
        unique([Level(Unstructured(0.5)), Level(Unstructured(0.5 + 1e-12))])


def test_products_and_shorthand() -> None:
    levels = product([None, "2:4", 0.5], [(None, None), (8, 8), (4, 8)])
    assert [level.name for level in levels] == [
        *("dense", "w8+a8", "w4+a8"),
        *("2:4", "2:4+w8+a8", "2:4+w4+a8"),
        *("0.5", "0.5+w8+a8", "0.5+w4+a8"),
    ]
    assert levels[4].weights == Level(NM(2, 4), IntGrid(8))
    assert levels[4].mask == Level(NM(2, 4))


def test_the_dense_level_is_always_there() -> None:
    assert check_levels([Level(NM(1, 2))]) == [Level(), Level(NM(1, 2))]
    with pytest.raises(SpecError, match="cannot be used"):
        check_levels([])
    with pytest.raises(SpecError, match="2:4"):
        check_levels(["2:4"])  # type: ignore[list-item]


@pytest.mark.parametrize(
    "values",
    [
        {"pattern": "2:4", "bits": 4},
        {"pattern": {"type": "Diagonal"}},
        {"pattern": {"type": "NM", "n": 2}},
        {"activations": 16},
        {"activations": True},
    ],
)
def test_levels_that_cannot_be_read(values: dict[str, object]) -> None:
    with pytest.raises(SpecError):
        Level.from_dict(values)


@pytest.mark.parametrize("arguments", [(0.0, 0.9), (1.0, 0.9), (0.1, 1.0)])
def test_impossible_ladders(arguments: tuple[float, float]) -> None:
    with pytest.raises(SpecError):
        density_ladder(*arguments)
