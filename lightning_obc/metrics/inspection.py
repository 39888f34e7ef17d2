"""What the weights of a model show by themselves: zeros, N:M groups, grids. Needs no record of how they came about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_obc.errors import SpecError
from lightning_obc.layers import LayerAdapter, adapter_for, is_lookup, select_layers
from lightning_obc.metrics.functional import DENSE_BITS, whole
from lightning_obc.metrics.storage import Storage
from lightning_obc.specs import NM, parse_pattern

_CHUNK = 2**22
_MOST_BITS = 8
_SUBDIVISIONS = 16
# Bits: dense weights are taken for a grid with a chance of about 2⁻³⁰.
_EVIDENCE = 30.0
_EVIDENCE_OF_REPEAT = 16.0
_MOST_SLACK = 0.2


@dataclass(frozen=True)
class LayerInspection:
    """One layer's weight as it is.

    Attributes:
        name: Dotted name in the model.
        type: Class name of the module.
        shape: Shape of the weight in the layout of the module.
        zeros: Number of zeros.
        bits: Bits of the narrowest uniform grid that holds every row of the weight; 32 when there is none of at most 8
            bits (the convention of :mod:`lightning_obc.metrics.storage` for dense weights of any precision).
        conformity: By N:M pattern such as ``"2:4"``: share of its groups with at most ``n`` non-zeros. Patterns that
            do not divide the layer's input channels are left out.
        bytes: Bytes of the weight stored with its bits and zeros, by the same convention.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    zeros: int
    bits: int
    conformity: Mapping[str, float]
    bytes: float

    @property
    def weights(self) -> int:
        """Entries of the weight."""
        return torch.Size(self.shape).numel()

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        return self.zeros / max(self.weights, 1)


@dataclass(frozen=True)
class ModelInspection:
    """All inspected layers of a model.

    Attributes:
        layers: In module order.
        parameters: Entries of all parameters of the model, tied ones once.
    """

    layers: Sequence[LayerInspection]
    parameters: int

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in the inspected weights together."""
        return sum(layer.zeros for layer in self.layers) / max(self._weights, 1)

    @property
    def bits(self) -> float:
        """Mean bit width over the entries of the inspected weights."""
        return sum(layer.bits * layer.weights for layer in self.layers) / max(self._weights, 1)

    @property
    def compression_ratio(self) -> float:
        """Float32 bytes of all parameters of the model over their bytes with the inspected weights compressed."""
        dense = self.parameters * DENSE_BITS / 8
        stored = dense - self._weights * DENSE_BITS / 8 + sum(layer.bytes for layer in self.layers)
        return dense / stored if stored > 0 else 1.0

    @property
    def conformity(self) -> dict[str, float]:
        """By pattern: share of conforming groups over all layers that the pattern divides."""
        names = dict.fromkeys(name for layer in self.layers for name in layer.conformity)
        shares = {}
        for name in names:
            fitting = [layer for layer in self.layers if name in layer.conformity]
            conforming = sum(layer.conformity[name] * layer.weights for layer in fitting)
            shares[name] = conforming / sum(layer.weights for layer in fitting)
        return shares

    @property
    def _weights(self) -> int:
        return sum(layer.weights for layer in self.layers)


@torch.no_grad()
def inspect_model(
    model: nn.Module,
    *,
    patterns: Sequence[str] = ("2:4",),
    layers: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    group_size: int | None = None,
) -> ModelInspection:
    """Look at the weights of a sparse or quantized model, however it became one.

    Args:
        model: Any module; nothing is changed.
        patterns: N:M patterns to look for. Where all groups of one conform, the weight counts as stored in it.
        layers: Names, globs or type names; None means every layer that an adapter handles.
        exclude: Entries of the same kinds to leave out.
        group_size: Input channels that share a scale, to see grids of groups too; None sees scales per tensor and per
            output channel.

    Raises:
        SpecError: A pattern is no N:M pattern. LayerNotFoundError: An entry, or the selection, matches nothing.

    >>> layer = nn.Linear(4, 2)
    >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, 0.0, 0.0, 2.0], [3.0, 1.0, 2.0, 0.0]]))
    >>> inspect_model(layer).conformity
    {'2:4': 0.5}
    """
    wanted = [_nm(pattern) for pattern in patterns]
    found = [
        _inspect(name, module, wanted, group_size) for name, module in select_layers(model, layers, exclude).items()
    ]
    return ModelInspection(found, sum(parameter.numel() for parameter in model.parameters()))


def _nm(pattern: str) -> NM:
    parsed = parse_pattern(pattern)
    if not isinstance(parsed, NM):
        raise SpecError("Only N:M patterns can be looked for", got=repr(pattern), expected='"n:m" such as "2:4"')
    return parsed


def _inspect(name: str, module: nn.Module, patterns: Sequence[NM], group_size: int | None) -> LayerInspection:
    adapter = adapter_for(module)
    assert isinstance(adapter, LayerAdapter)
    weight, channels = whole(adapter.current(module)), adapter.shape(module).channels
    rows = adapter.to_matrix_layout(module, weight).flatten(0, 1)
    fitting = [] if is_lookup(module) else [pattern for pattern in patterns if channels % pattern.m == 0]
    shares = {str(pattern): nm_conformity(rows, pattern) for pattern in fitting}
    bits, scales = _grid_of(rows, group_size if group_size and channels % group_size == 0 else None)
    storage = Storage(bits, next((pattern for pattern in fitting if shares[str(pattern)] == 1), None), scales)
    # Stored as zeros in no pattern, a weight may be smaller still than in its N:M pattern.
    size = min(storage.size(weight), Storage(bits, None, scales).size(weight))
    zeros = int((weight == 0).sum())
    return LayerInspection(name, type(module).__name__, tuple(weight.shape), zeros, bits, shares, size)


def nm_conformity(rows: Tensor, pattern: NM) -> float:
    """Share of the groups of ``m`` consecutive columns of ``rows`` ``[R, d]`` that have at most ``n`` non-zeros."""
    kept = (rows != 0).unflatten(1, (-1, pattern.m)).sum(-1)
    return float((kept <= pattern.n).double().mean())


def _grid_of(rows: Tensor, group_size: int | None) -> tuple[int, int]:
    """Bits and number of scales of the grid that holds a weight; 32 and 0 when there is none."""
    bits = grid_bits(rows)
    if bits is None and group_size is not None:
        rows = rows.reshape(-1, group_size)
        bits = grid_bits(rows)
    return (DENSE_BITS, 0) if bits is None else (bits, rows.shape[0])


def grid_bits(rows: Tensor) -> int | None:
    """Bits of the narrowest uniform grids, one for each row of ``[R, d]``, that hold all values; None above 8 bits.

    A row of two values lies on a grid whatever they are. The rows together must therefore give evidence: values that
    meet a grid which others have fixed, to within their rounding, or that occur repeatedly (in float32 and wider,
    where chance does not do it).
    """
    sample = rows[:: max(1, rows.shape[0] // 4)]
    if _rows_bits(sample)[0] is None:  # Dense weights are recognised by a few rows.
        return None
    size = max(1, _CHUNK // max(1, rows.shape[1]))
    widest, evidence = 1, 0.0
    for part in rows.split(size):
        bits, seen = _rows_bits(part)
        if bits is None:
            return None
        widest, evidence = max(widest, bits), evidence + seen
    return widest if evidence >= _EVIDENCE else None


def _rows_bits(rows: Tensor) -> tuple[int | None, float]:
    """Bits that the widest of these rows needs, or None; and the evidence, in bits, that this is no chance."""
    # In double, the rounding of the values themselves is all there is.
    values = rows.double().sort(1).values
    steps = values.diff(dim=1)
    distinct = 1 + (steps > 0).sum(1)
    span = values[:, -1] - values[:, 0]
    flat = span == 0
    smallest = steps.masked_fill(steps <= 0, torch.inf).amin(1) if steps.shape[1] else span
    bits, chance = torch.where(flat, 1, 0), torch.ones_like(span)
    for part in range(1, _SUBDIVISIONS + 1):
        # The smallest step may be several codes wide where a row has few values.
        codes = (span / smallest.masked_fill(flat, 1.0) * part).round()
        fits, slack = _fits(values, span, codes, torch.finfo(rows.dtype).eps)
        fits &= bits == 0
        bits = torch.where(fits, torch.log2(codes.clamp(min=1) + 1).ceil().long().clamp(min=1), bits)
        # Each value between the ends had this chance, in each attempt, to meet the grid.
        by_chance = part * (2 * slack).clamp(min=1e-9) ** (distinct - 2).clamp(min=0)
        chance = torch.where(fits, by_chance.clamp(max=1.0), chance)
    if bool((bits == 0).any()):
        return None, 0.0
    repeated = int(((rows != 0).sum(1) - distinct).clamp(min=0).sum()) if rows.element_size() >= 4 else 0
    evidence = -chance.clamp(min=1e-300).log2().sum()
    return int(bits.max()), float(evidence) + repeated * _EVIDENCE_OF_REPEAT


def _fits(values: Tensor, span: Tensor, codes: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Which rows of sorted values ``[R, d]`` lie on a grid of ``codes`` steps ``[R]`` over their span, as far as the
    rounding of each value tells; and what this rounding comes to, in steps ``[R]``."""
    possible = (codes >= 1) & (codes <= 2**_MOST_BITS - 1)
    step = span / codes.clamp(min=1)
    step = step.masked_fill(step == 0, 1.0)
    place = (values - values[:, :1]) / step[:, None]
    # A value's place moves with its own rounding and three times with that of the row's ends, half an eps each.
    slack = 2 * eps * values[:, [0, -1]].abs().amax(1) / step
    near = ((place - place.round()).abs() <= slack[:, None]).all(1)
    return possible & near & (slack < _MOST_SLACK), slack
