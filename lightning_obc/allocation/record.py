"""The stored levels of one layer: nested masks as one index per weight, other masks as bits, codes of kept weights.

Index legend: ``g`` problems, ``R`` rows, ``d`` columns, ``C`` column groups of a grid, ``K`` levels of a ladder.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_obc.allocation.levels import Level
from lightning_obc.allocation.storage import pack, unpack
from lightning_obc.errors import DamagedFileError, DatabaseError, PatternError, SpecError
from lightning_obc.grids import Grid
from lightning_obc.specs import NM, Block, Pattern

MOST_NESTED = 255


@dataclass(frozen=True)
class LevelRecord:
    """What is known about one level of one layer.

    Attributes:
        loss: ``½ Σ Δw H Δwᵀ`` with the undamped ``H``, against the dense weight.
        damping_loss: ``½ λ̄ ‖ΔW‖²``.
        kept: Weights that are not pruned.
        scales: Scales of the grid, 0 without one.
        backend: The backend that solved it.
        notes: Everything out of the ordinary.
    """

    loss: float
    damping_loss: float
    kept: int
    scales: int = 0
    backend: str = ""
    notes: tuple[str, ...] = ()


@dataclass
class LayerRecord:
    """All stored levels of one layer. Weights are not in it: they follow from masks and the Hessian, or from codes.

    Attributes:
        shape: ``(g, R, d)``.
        reference: ``½ Σ w H wᵀ`` of the dense weight.
        damping: Share of ``mean(diag H)`` that every solve used.
        levels: Records by the name of the (weight) level.
        missing: Levels that the layer cannot have, by name, with the reason.
        tensors: The packed tensors, as they are in the file.
        ladders: Names of nested levels, mildest first, by the number of their index.
    """

    shape: tuple[int, int, int]
    reference: float
    damping: float
    levels: dict[str, LevelRecord] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    ladders: list[list[str]] = field(default_factory=list)

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def add_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Store keep-masks ``[g, R, d]`` of one kind of pattern; nested ones share an index of a few bits."""
        names = sorted(masks, key=lambda name: -int(masks[name].sum()))
        index = torch.zeros(self.shape, dtype=torch.uint8)
        for name in names[:MOST_NESTED]:
            index += masks[name].cpu()
        nested = [name for rank, name in enumerate(names) if torch.equal(index > rank, masks[name].cpu())]
        if 1 < len(nested) == len(names):
            number = len(self.ladders)
            self.ladders.append(names)
            self.tensors[f"ladder.{number}"] = pack(index.flatten(), len(names).bit_length())
        else:
            self.tensors |= {f"mask.{name}": pack(masks[name].to(torch.uint8).flatten(), 1) for name in names}

    def mask(self, level: Level) -> Tensor:
        """Keep-mask ``[g, R, d]`` of a level's pattern.

        Raises:
            DatabaseError: There is none.
            PatternError: What is stored does not obey the pattern.
        """
        name = level.mask.name
        if level.pattern is None:
            return torch.ones(self.shape, dtype=torch.bool)
        number = next((number for number, names in enumerate(self.ladders) if name in names), None)
        if number is not None:
            names = self.ladders[number]
            index = unpack(self._tensor(f"ladder.{number}"), len(names).bit_length(), self.weights)
            return (index > names.index(name)).reshape(self.shape)
        return unpack(self._tensor(f"mask.{name}"), 1, self.weights).bool().reshape(self.shape)

    def add_codes(self, level: Level, mask: Tensor, grid: Grid, codes: Tensor) -> None:
        """Store the codes ``[g, R, d]`` of kept weights, scales and zero points ``[g, R, C]``."""
        name = level.weights.name
        self.tensors[f"codes.{name}"] = pack(codes.cpu()[mask.cpu()], grid.spec.bits)
        self.tensors[f"scale.{name}"] = grid.scale.cpu()
        self.tensors[f"zero.{name}"] = grid.zero_point.cpu().to(torch.uint8)

    def codes(self, level: Level, mask: Tensor) -> tuple[Grid, Tensor]:
        """Grid and codes ``[g, R, d]`` of a quantized level; pruned weights carry the zero point."""
        assert level.grid is not None
        name, columns = level.weights.name, self.shape[2]
        scale, zero = self._tensor(f"scale.{name}"), self._tensor(f"zero.{name}")
        size = level.grid.group_size
        grid = Grid(level.grid, scale, zero.to(scale.dtype), None if size is None else torch.arange(columns) // size)
        codes = grid.expand(zero, columns).clone()
        codes[mask] = unpack(self._tensor(f"codes.{name}"), level.grid.bits, int(mask.sum()))
        return grid, codes

    def level_bytes(self, name: str) -> float:
        """Bytes that a level takes; a ladder's index is shared evenly by its levels."""
        own = sum(
            tensor.numel() * tensor.element_size()
            for key, tensor in self.tensors.items()
            if key in (f"mask.{name}", f"codes.{name}", f"scale.{name}", f"zero.{name}")
        )
        ladder = next((number for number, names in enumerate(self.ladders) if name in names), None)
        if ladder is None:
            return float(own)
        return own + self.tensors[f"ladder.{ladder}"].numel() / len(self.ladders[ladder])

    def _tensor(self, key: str) -> Tensor:
        if key not in self.tensors:
            raise DatabaseError(
                "A level is not in the database",
                got=key.partition(".")[2],
                expected=f"one of {list(self.levels)[:12]}",
                remedy="build the database again with this level",
            )
        return self.tensors[key]

    def to_file(self, names: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON metadata; levels are written as positions in ``names``, the index file's list."""
        position = {name: index for index, name in enumerate(names)}
        order = list(self.levels)
        losses = [[self.levels[name].loss, self.levels[name].damping_loss] for name in order]
        notes = {name: list(self.levels[name].notes) for name in order if self.levels[name].notes}
        metadata = {
            "shape": list(self.shape),
            "reference": self.reference,
            "damping": self.damping,
            "levels": _ranges([position[name] for name in order]),
            "named": _named([position[name] for name in order], names),
            "ladders": [_ranges([position[name] for name in ladder]) for ladder in self.ladders],
            "scales": {name: self.levels[name].scales for name in order if self.levels[name].scales},
            "backend": next((record.backend for record in self.levels.values() if record.backend), ""),
            "notes": notes,
            "missing": self.missing,
        }
        return self.tensors | {"losses": torch.tensor(losses, dtype=torch.float32).reshape(-1, 2)}, metadata

    @classmethod
    def from_file(cls, tensors: dict[str, Tensor], metadata: Mapping[str, Any], levels: Sequence[Level]) -> LayerRecord:
        """Read :meth:`to_file`; ``levels`` is the index file's list.

        Raises:
            DamagedFileError: The metadata does not belong to this format, or to another index.
        """
        tensors = dict(tensors)
        try:
            shape = tuple(metadata["shape"])
            positions = _positions(metadata["levels"])
            if metadata["named"] != _named(positions, [level.name for level in levels]):
                raise ValueError("it was written for another index")
            names = [levels[position].name for position in positions]
            by_name = {level.name: level for level in levels}
            record = cls(shape, metadata["reference"], metadata["damping"], missing=dict(metadata["missing"]))
            record.ladders = [[levels[p].name for p in _positions(ladder)] for ladder in metadata["ladders"]]
            losses = tensors.pop("losses").tolist()
            record.tensors = tensors
            kept = record._kept({name: by_name[name] for name in names})
            for name, (loss, damping_loss) in zip(names, losses, strict=True):
                scales, notes = metadata["scales"].get(name, 0), tuple(metadata["notes"].get(name, ()))
                record.levels[name] = LevelRecord(loss, damping_loss, kept[name], scales, metadata["backend"], notes)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise DamagedFileError(
                "The file of a layer cannot be read",
                got=repr(error),
                expected="a file of this version that belongs to the index",
                remedy="build the database again: the layer is solved again",
            ) from None
        return record

    def _kept(self, levels: Mapping[str, Level]) -> dict[str, int]:
        """Kept weights of every level, counted in the masks."""
        counts: dict[str, int] = {}
        for number, names in enumerate(self.ladders):
            index = unpack(self._tensor(f"ladder.{number}"), len(names).bit_length(), self.weights)
            above = torch.bincount(index.long(), minlength=len(names) + 1).flip(0).cumsum(0).flip(0)
            counts |= {name: int(above[rank + 1]) for rank, name in enumerate(names)}
        for level in levels.values():
            support = level.mask.name
            if support not in counts:
                counts[support] = int(self.mask(level).sum())
        return {name: counts[level.mask.name] for name, level in levels.items()}


def check_mask(mask: Tensor, dense: Tensor, pattern: Pattern, channels: int, name: str) -> None:
    """Refuse a stored mask ``[g, R, d]`` of the weight ``dense`` that does not obey its pattern.

    A block either loses everything or keeps all that is not zero in ``dense`` already.

    Raises:
        PatternError: It does not.
    """
    size = pattern.m if isinstance(pattern, NM) else pattern.size if isinstance(pattern, Block) else 1
    fits = channels % size == 0
    if fits and isinstance(pattern, NM):
        fits = bool((mask.unflatten(-1, (-1, size)).sum(-1) <= pattern.n).all())
    if fits and isinstance(pattern, Block):
        whole = (mask == (dense != 0)).unflatten(-1, (-1, size)).all(-1)
        fits = bool((whole | ~mask.unflatten(-1, (-1, size)).any(-1)).all())
    if not fits:
        raise PatternError(
            f"A stored level no longer fits the pattern {pattern}",
            got=f"layer {name!r} with {channels} input channels",
            expected="a mask that obeys the pattern",
            remedy="delete the layer's file and build the database again",
        )


def _ranges(positions: Sequence[int]) -> list[list[int]]:
    """Consecutive positions as ``[first, last]`` pairs, in order."""
    pairs: list[list[int]] = []
    for position in positions:
        if pairs and pairs[-1][1] == position - 1:
            pairs[-1][1] = position
        else:
            pairs.append([position, position])
    return pairs


def _named(positions: Sequence[int], names: Sequence[str]) -> str:
    """A digest of the names that positions stand for: an index that was made anew may list other levels."""
    text = "\n".join(names[position] if position < len(names) else "none" for position in positions)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _positions(pairs: Sequence[Sequence[int]]) -> list[int]:
    return [position for first, last in pairs for position in range(first, last + 1)]


def check_ladder(levels: Sequence[Level]) -> None:
    """Refuse more nested levels than an index of one byte can tell apart.

    Raises:
        SpecError: There are more than 255.
    """
    if len(levels) > MOST_NESTED:
        raise SpecError("A ladder has too many levels", got=len(levels), expected=f"at most {MOST_NESTED}")
