"""Specifications refuse what cannot be meant, and say what to write instead."""

from __future__ import annotations

import dataclasses
import pickle

import pytest

from lightning_obc.errors import NonFiniteError, OBCError, SpecError
from lightning_obc.specs import (
    NM,
    Block,
    Calibration,
    IntGrid,
    Prune,
    Quantize,
    Structured,
    Unstructured,
    parse_grid,
    parse_pattern,
)


@pytest.mark.parametrize(
    ("value", "pattern"),
    [
        ("2:4", NM(2, 4)),
        ("1:3", NM(1, 3)),
        (0.5, Unstructured(0.5)),
        ("0.25", Unstructured(0.25)),
        (0, Unstructured(0.0)),
    ],
)
def test_shorthand(value: object, pattern: object) -> None:
    assert parse_pattern(value) == pattern  # type: ignore[arg-type]
    assert parse_pattern(pattern) is pattern  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["4:2", "2:2", "0:4", "a:b", "two", 1.0, -0.1, 124, True, None, "1.5", float("nan")])
def test_bad_patterns(value: object) -> None:
    with pytest.raises(SpecError) as caught:
        Prune(value)  # type: ignore[arg-type]
    assert "Expected" in str(caught.value)


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        (64, ('"1:4"', "64 % of zeros is 0.64")),
        (248, ('"4:8"',)),
        (90, ("90 % of zeros is 0.9",)),
        (1.5, ("is 0.015",)),
        (100, ("no weight at all", "0.9 for 90 %")),
        (1, ("0.01 for 1 %", "0.99 for 99 %")),
        (-0.3, ("0.3 for 30 % of zeros",)),
        (1000, ('in quotes, "2:4"', "as a fraction, 0.5")),
    ],
)
def test_what_a_number_may_have_meant(value: float, meant: tuple[str, ...]) -> None:
    with pytest.raises(SpecError) as caught:
        Prune(value)
    assert all(text in str(caught.value) for text in meant)
    assert "124" not in str(caught.value)  # 2:4 is not what was written
    assert not any(trap in str(caught.value) for trap in ("1:40", "1:30", "16:40"))  # nobody means such groups


def test_the_base_60_trap_is_named() -> None:
    with pytest.raises(SpecError, match='in quotes, "2:4"'):
        Prune(124)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
@pytest.mark.parametrize("make", [Unstructured, Structured, lambda s: Block(4, s)])
def test_sparsity_outside_the_unit_interval(make: object, sparsity: float) -> None:
    with pytest.raises(SpecError, match=r"outside \[0, 1\)"):
        make(sparsity)  # type: ignore[operator]


@pytest.mark.parametrize(
    "keywords",
    [
        {"bits": 0},
        {"bits": 9},
        {"bits": 4.0},
        {"bits": 1, "symmetric": True},
        {"granularity": "group"},
        {"group_size": 8},
        {"granularity": "row"},
        {"scale": "max"},
        {"granularity": "group", "group_size": 0},
    ],
)
def test_bad_grids(keywords: dict[str, object]) -> None:
    with pytest.raises(SpecError):
        IntGrid(**keywords)  # type: ignore[arg-type]


def test_grid_shorthand() -> None:
    assert parse_grid(3) == IntGrid(3)
    assert Quantize(3).parsed.max_code == 7


@pytest.mark.parametrize("keywords", [{"samples": 0}, {"samples": 1.5}, {"rounds": 0}, {"batch_size": 0}])
def test_bad_calibration(keywords: dict[str, int]) -> None:
    with pytest.raises(SpecError):
        Calibration(**keywords)


@pytest.mark.parametrize("damping", [-1.0, True, float("nan"), float("inf"), "automatic"])
def test_bad_damping(damping: object) -> None:
    with pytest.raises(SpecError):
        Prune("2:4", damping=damping)  # type: ignore[arg-type]
    with pytest.raises(SpecError):
        Quantize(4, damping=damping)  # type: ignore[arg-type]


@pytest.mark.parametrize("keywords", [{"selection": "hep"}, {"misfit": "hep"}, {"backend": "cuda"}, {"damping": None}])
def test_unknown_choices(keywords: dict[str, object]) -> None:
    with pytest.raises(SpecError):
        Prune(0.5, **keywords)  # type: ignore[arg-type]


@pytest.mark.parametrize("at", ["sometime", {"epoch": -1}, {"epoch": 1, "step": 2}, {"hour": 1}, {}, 3, {"epoch": 1.5}])
def test_bad_times(at: object) -> None:
    with pytest.raises(SpecError):
        Prune("2:4", at=at)  # type: ignore[arg-type]


def test_specs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Prune("2:4").damping = 1.0  # type: ignore[misc]


def test_errors_survive_pickling() -> None:
    error = NonFiniteError("Broken", got=3, expected="4", remedy="count")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is NonFiniteError
    assert isinstance(again, ValueError)
    assert isinstance(again, OBCError)
    assert str(again) == str(error) == "Broken. Got: 3. Expected: 4. Remedy: count."
