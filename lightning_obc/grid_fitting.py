"""Fit the scales and zero points of an integer grid to a weight matrix.

Index legend: ``g`` problems, ``R`` rows, ``d`` columns, ``C`` column groups of ``S = d / C`` consecutive columns.
Every range contains 0, and 0 is always a grid point, so zeros of a pruned layer cost nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_obc.errors import PatternError, ShapeError
from lightning_obc.grids import Grid
from lightning_obc.specs import IntGrid

SHRINK_STEPS = 80
SHRINK_RESOLUTION = 100
ERROR_NORM = 2.4
# Powers of errors stay within float32 for ranges within 2^±24.
_EXPONENT_LIMIT = 24


def fit_grid(
    weight: Tensor,
    spec: IntGrid,
    *,
    channels: int | None = None,
    hessian: Tensor | None = None,
) -> Grid:
    """Fit ``spec`` to ``weight``.

    Args:
        weight: ``[g, R, d]``, finite.
        spec: What to fit.
        channels: Input channels per kernel position (the period of the columns); default ``d``. Column groups never
            straddle a kernel position.
        hessian: ``[g, d, d]``; its diagonal weighs the errors of ``scale="hessian"``.

    Raises:
        ShapeError: ``scale="hessian"`` without a Hessian, or a weight that is not ``[g, R, d]``.
        PatternError: ``channels`` does not divide by ``spec.group_size``.
    """
    if weight.dim() != 3:
        raise ShapeError("A grid is fitted to a weight matrix", got=tuple(weight.shape), expected="[g, R, d]")
    column_group = _column_groups(weight.shape[-1], spec, channels, weight.device)
    groups = 1 if column_group is None else int(column_group[-1]) + 1
    sets = _as_sets(weight, groups, spec)
    low, high = sets.amin(-1).clamp(max=0), sets.amax(-1).clamp(min=0)
    if spec.scale == "minmax":
        scale, zero = _scale_and_zero(low, high, spec)
    else:
        importance, norm = _importance(weight, groups, spec, hessian)
        scale, zero = _shrink_search(sets, low, high, spec, importance, norm)
    shape = (*weight.shape[:2], groups)
    return Grid(spec, _spread(scale, shape), _spread(zero, shape), column_group)


def _column_groups(columns: int, spec: IntGrid, channels: int | None, device: torch.device) -> Tensor | None:
    if spec.granularity != "group":
        return None
    assert spec.group_size is not None
    channels = columns if channels is None else channels
    if channels % spec.group_size:
        raise PatternError(
            "The grid's groups do not fit the layer",
            got=f"{channels} input channels, group_size {spec.group_size}",
            expected="a group size that divides the input channels",
            remedy='another group_size, granularity="channel", or misfit="skip"',
        )
    return torch.arange(columns, device=device) // spec.group_size


def _as_sets(weight: Tensor, groups: int, spec: IntGrid) -> Tensor:
    """The sets of weights that share a scale, in the last dimension: ``[g, R, C, S]`` or ``[1, 1, 1, g·R·d]``."""
    if spec.granularity == "tensor":
        return weight.reshape(1, 1, 1, -1)
    return weight.reshape(*weight.shape[:2], groups, -1)


def _importance(weight: Tensor, groups: int, spec: IntGrid, hessian: Tensor | None) -> tuple[Tensor | None, float]:
    if spec.scale == "mse":
        return None, ERROR_NORM
    if hessian is None:
        raise ShapeError(
            'scale="hessian" needs the Hessian of the layer', expected="hessian=[g, d, d]", remedy='scale="mse"'
        )
    diagonal = hessian.diagonal(dim1=-2, dim2=-1).to(weight)[:, None, :].expand_as(weight)
    return _as_sets(diagonal, groups, spec), 2.0


def _scale_and_zero(low: Tensor, high: Tensor, spec: IntGrid) -> tuple[Tensor, Tensor]:
    top = spec.max_code
    if spec.symmetric:
        span = 2 * torch.maximum(-low, high)
        zero = torch.full_like(span, (top + 1) // 2)
        scale = span / top
    else:
        scale = (high - low) / top
        zero = torch.clamp(torch.round(-low / torch.where(scale > 0, scale, 1)), 0, top)
    # A set of zeros alone has no range; any positive scale represents it exactly. A subnormal scale would round to
    # infinity in the division of the encoder.
    tiny = torch.finfo(scale.dtype).tiny * (top + 1)
    return torch.where(scale > tiny, scale, torch.ones_like(scale)), zero


def _shrink_search(
    sets: Tensor, low: Tensor, high: Tensor, spec: IntGrid, importance: Tensor | None, norm: float
) -> tuple[Tensor, Tensor]:
    """The range ``f·[low, high]``, f = 1 … 0.21 in 80 steps, of least error; the first best is kept."""
    unit = _units(torch.maximum(-low, high))
    best = torch.full_like(low, torch.inf)
    best_scale, best_zero = _scale_and_zero(low, high, spec)
    for step in range(SHRINK_STEPS):
        factor = 1 - step / SHRINK_RESOLUTION
        scale, zero = _scale_and_zero(factor * low, factor * high, spec)
        codes = torch.clamp(torch.round(sets / scale[..., None]) + zero[..., None], 0, spec.max_code)
        error = (codes - zero[..., None]).mul_(scale[..., None]).sub_(sets).abs_()
        error = (error if unit is None else error / unit[..., None]).pow_(norm)
        total = (error if importance is None else error * importance).sum(-1)
        better = total < best
        best = torch.where(better, total, best)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
    return best_scale, best_zero


def _units(largest: Tensor) -> Tensor | None:
    """The powers of two that very small or large sets are counted in, 1 for others; None when there are only others."""
    exponent = torch.frexp(largest).exponent
    exponent = torch.where(exponent.abs() > _EXPONENT_LIMIT, exponent.clamp(-100, 100), 0)
    return torch.ldexp(torch.ones_like(largest), exponent) if bool(exponent.any()) else None


def _spread(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    return tensor.expand(shape).contiguous()


def refit_scale(grid: Grid, codes: Tensor, weight: Tensor, hessian: Tensor) -> Grid:
    """The scales that minimise ``½ Σ_r Δw_r H Δw_rᵀ`` for given codes, by least squares.

    With the centred codes ``c = codes - zero_point`` of one row and column group, the joint normal equations are
    ``A_gh = c_gᵀ H_gh c_h`` and ``b_g = c_gᵀ (H w)_g``; per tensor they are summed over rows. A solution that is not
    positive and finite is rejected row by row (the old scale stays).

    Args:
        grid: The grid the codes belong to.
        codes: ``[g, R, d]`` uint8.
        weight: ``[g, R, d]`` target weights.
        hessian: ``[g, d, d]`` float64, usually damped.

    Returns:
        A grid with new scales; the objective under ``hessian`` is never higher than before.
    """
    zero = grid.expand(grid.zero_point, weight.shape[-1]).double()
    centred = codes.double() - zero
    normal, right = _normal_equations(centred, weight.double() @ hessian, hessian, grid.scale.shape[-1])
    if grid.spec.granularity == "tensor":
        normal, right = normal.sum((0, 1), keepdim=True), right.sum((0, 1), keepdim=True)
    fitted = torch.linalg.lstsq(normal, right[..., None], driver="gelsd" if right.device.type == "cpu" else None)
    scale = fitted.solution[..., 0].to(grid.scale.dtype).expand_as(grid.scale)
    # A group whose codes all sit on the zero point has an empty equation; its scale does not matter and stays.
    empty = centred.reshape(*grid.scale.shape, -1).abs().amax(-1) == 0
    scale = torch.where(empty, grid.scale, scale)
    usable = torch.all(torch.isfinite(scale) & (scale > 0), dim=-1, keepdim=True)
    candidate = Grid(grid.spec, torch.where(usable, scale, grid.scale).contiguous(), grid.zero_point, grid.column_group)
    return _keep_better(grid, candidate, codes, weight, hessian)


def _normal_equations(
    centred: Tensor, target: Tensor, hessian: Tensor, groups: int, chunk_bytes: int = 2**27
) -> tuple[Tensor, Tensor]:
    """``A [g, R, C, C]`` and ``b [g, R, C]`` of :func:`refit_scale`, rows in chunks of bounded memory."""
    problems, rows, columns = centred.shape
    right = (centred * target).reshape(problems, rows, groups, -1).sum(-1)
    if groups == 1:
        return ((centred @ hessian) * centred).sum(-1)[..., None, None], right
    normal = centred.new_empty(problems, rows, groups, groups)
    size = columns // groups
    step = max(1, chunk_bytes // (16 * problems * groups * columns))
    for start in range(0, rows, step):
        part = centred[:, start : start + step]
        blocks = torch.zeros(*part.shape[:2], groups, columns, dtype=part.dtype, device=part.device)
        for index in range(groups):
            inside = slice(index * size, (index + 1) * size)
            blocks[:, :, index, inside] = part[:, :, inside]
        moved = torch.einsum("brcd,bde->brce", blocks, hessian)
        normal[:, start : start + step] = moved @ blocks.transpose(-1, -2)
    return normal, right


def _keep_better(old: Grid, new: Grid, codes: Tensor, weight: Tensor, hessian: Tensor) -> Grid:
    def loss(grid: Grid) -> Tensor:
        delta = grid.dequantize(codes).double() - weight.double()
        rows = ((delta @ hessian) * delta).sum(-1, keepdim=True)
        return rows.sum((0, 1), keepdim=True) if grid.spec.granularity == "tensor" else rows

    scale = torch.where(loss(new) <= loss(old), new.scale, old.scale)
    return Grid(old.spec, scale, old.zero_point, old.column_group)
