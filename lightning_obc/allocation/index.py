"""The files of a database, its index, and the fingerprint that ties it to a model, a calibration and a recipe."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_obc.allocation.levels import Level, unique
from lightning_obc.allocation.solve import Recipe
from lightning_obc.allocation.storage import check_json, from_triangle, read_json, read_tensors, tensor_hash
from lightning_obc.errors import DatabaseError, FingerprintError
from lightning_obc.layers import adapter_for, select_layers

FORMAT = 2


@dataclass(frozen=True)
class Entry:
    """One layer in the index."""

    file: str
    weight: str
    channels: int


def entry_of(number: int, name: str, module: nn.Module, weight: Tensor) -> Entry:
    adapter = adapter_for(module)
    assert adapter is not None
    safe = re.sub(r"[^A-Za-z0-9_.-]", "_", name)[:80]
    return Entry(f"{number:03d}-{safe}", tensor_hash(weight), adapter.shape(module).channels)


def dense_weights(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """Copies of the weights ``[g, R, d]`` by layer name.

    Raises:
        FingerprintError: The model lacks a layer.
    """
    available = select_layers(model)
    absent = [name for name in names if name not in available]
    if absent:
        raise FingerprintError(
            "The database belongs to another model",
            got=f"a model without the layers {', '.join(absent[:8])}",
            expected=f"a model with {len(names)} layers like {', '.join(names[:3])}",
        )
    result: dict[str, Tensor] = {}
    for name in names:
        adapter = adapter_for(available[name])
        assert adapter is not None
        result[name] = adapter.weight_matrix(available[name])
    return result


def check_fingerprint(entries: Mapping[str, Entry], dense: Mapping[str, Tensor]) -> None:
    other = [name for name, entry in entries.items() if tensor_hash(dense[name]) != entry.weight]
    if other:
        raise FingerprintError(
            "The database belongs to another model, or the model's weights have changed since",
            got=f"other weights in {', '.join(other[:8])}",
            expected="the dense weights that the levels were solved for",
            remedy="load the dense checkpoint, or build a database for this model in another directory",
        )


def merged_index(
    path: Path, entries: Mapping[str, Entry], wanted: Sequence[Level], recipe: Recipe, calibration: dict[str, Any]
) -> dict[str, Any]:
    """The index with the levels of before and those that are new; positions of levels never change.

    Raises:
        FingerprintError: The index of before belongs to another model, calibration or recipe.
    """
    fresh: dict[str, Any] = {
        "format": FORMAT,
        "recipe": recipe.identity(),
        "calibration": json.loads(json.dumps(calibration)),
        "layers": {name: vars(entry) for name, entry in entries.items()},
        "levels": [],
        "wanted": [],
    }
    if index_file(path).exists():
        before = read_index(path)
        changed = [key for key in ("recipe", "calibration", "layers") if before[key] != fresh[key]]
        if changed:
            raise FingerprintError(
                f"The directory holds a database with other {', '.join(changed)}",
                got="; ".join(_difference(before[key], fresh[key]) for key in changed),
                expected="the model, calibration and recipe that it was begun with",
                remedy="use another directory, or delete this one",
            )
        fresh["levels"], fresh["wanted"] = before["levels"], before["wanted"]
    levels = unique([*stored_levels(fresh), *_stored(wanted)])
    position = {level.name: index for index, level in enumerate(levels)}
    offered = unique([*wanted_levels(fresh), *wanted])
    fresh["levels"] = [level.to_dict() for level in levels]
    fresh["wanted"] = [[position[level.weights.name], level.activations] for level in offered]
    return fresh


def stored_levels(index: Mapping[str, Any]) -> list[Level]:
    """Every level that differs in weights; layer files name them by their positions here."""
    return [Level.from_dict(values) for values in index["levels"]]


def wanted_levels(index: Mapping[str, Any]) -> list[Level]:
    """The levels that were asked for, each a stored one with a bit width of activations."""
    stored = stored_levels(index)
    return [replace(stored[position], activations=activations) for position, activations in index["wanted"]]


def _stored(wanted: Sequence[Level]) -> list[Level]:
    """The levels behind ``wanted`` that differ in weights: masks first, as codes need them."""
    parts = [level.mask for level in wanted] + [level.weights for level in wanted]
    return list({level.name: level for level in parts}.values())


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return ", ".join(f"{key}: {now.get(key)} instead of {before.get(key)}" for key in keys[:4])


def read_hessian(path: Path, layer: str, entry: Entry, columns: int) -> Tensor:
    tensors, metadata = read_tensors(hessian_file(path, entry))
    if metadata.get("weight") != entry.weight or "triangle" not in tensors:
        raise FingerprintError(
            f"The Hessian of layer {layer!r} belongs to another model",
            expected="the file that was written for this layer",
            remedy="delete it and build the database again",
        )
    return from_triangle(tensors["triangle"], columns)


def read_index(path: Path) -> Any:
    index = read_json(index_file(path))
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise DatabaseError(
            "The index of the database cannot be read",
            got=index.get("format") if isinstance(index, dict) else type(index).__name__,
            expected=f"format {FORMAT}",
            remedy="build the database in another directory",
        )
    return check_json(index_file(path), index)


def index_file(path: Path) -> Path:
    return path / "index.json"


def levels_file(path: Path, entry: Entry) -> Path:
    return path / "levels" / f"{entry.file}.safetensors"


def hessian_file(path: Path, entry: Entry) -> Path:
    return path / "hessians" / f"{entry.file}.safetensors"
