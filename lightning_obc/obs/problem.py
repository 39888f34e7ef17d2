"""Prepare one layer problem once: checks, damping, inverse.

Index legend: ``g`` problems of a layer (groups of a convolution), ``R`` rows, ``d`` columns. ``H = 2 X Xᵀ / n``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_obc import linalg
from lightning_obc.brief import Brief
from lightning_obc.errors import NonFiniteError, PatternError, ShapeError
from lightning_obc.hessian import Hessian
from lightning_obc.kernels.obs_sweep import SweepInput
from lightning_obc.obs.solution import LayerSolution, Status

HessianLike = Tensor | Hessian
# Losses are squares of weights times a Hessian: this leaves float32 half of its 2^±126 for the weights.
_EXPONENT_LIMIT = 60


@dataclass(frozen=True, repr=False)
class Problem(Brief):
    """A prepared layer problem.

    Attributes:
        original: The weight as it was passed in, ``[R, d]`` or ``[g, R, d]``, any floating dtype.
        weight: ``[g, R, d]`` float32 or float64, the precision of the sweep.
        hessian: ``[g, d, d]`` float64, undamped.
        damped: ``[g, d, d]`` float64, ``H + λ̄ I``.
        inverse: ``[g, d, d]`` float64, ``G``, its inverse.
        lam_bar: ``[g]`` float64, ``λ̄``, what was added to the diagonal.
        damping: The share of ``mean(diag H)`` that was finally used.
        dead: ``[g, d]`` bool, columns whose calibration inputs are exactly zero.
        notes: Everything out of the ordinary so far.
    """

    original: Tensor
    weight: Tensor
    hessian: Tensor
    damped: Tensor
    inverse: Tensor
    lam_bar: Tensor
    damping: float
    dead: Tensor
    notes: tuple[str, ...] = ()

    def units(self) -> Tensor | None:
        """``[g]`` float64: what a sweep's losses are counted in, or None, which means 1.

        A problem whose ``mean diag(H + λ̄ I)`` is so far from 1 that the sweep's numbers would leave float32 counts in
        the power of two next to it, which changes none of their digits.
        """
        exponent = torch.frexp(self.damped.diagonal(dim1=-2, dim2=-1).mean(-1)).exponent
        exponent = torch.where(exponent.abs() > _EXPONENT_LIMIT, exponent, 0)
        return torch.ldexp(torch.ones_like(self.lam_bar), exponent) if bool(exponent.any()) else None

    def sweep_input(self, keep: Tensor | None = None, weight: Tensor | None = None) -> SweepInput:
        """What the backends see, with losses in :meth:`units`; ``weight`` in place of the problem's own."""
        dtype, units = self.weight.dtype, self.units()
        start = self.weight if weight is None else weight.to(dtype)
        if units is None:
            return SweepInput(start, self.inverse.to(dtype), self.damped, keep)
        units = units[:, None, None]
        return SweepInput(start, (self.inverse * units).to(dtype), self.damped / units, keep)

    def with_dtype(self, dtype: torch.dtype) -> Problem:
        """The same problem swept in another precision."""
        return replace(self, weight=self.original_batched().to(dtype))

    def original_batched(self) -> Tensor:
        return self.original if self.original.dim() == 3 else self.original[None]

    def shaped(self, tensor: Tensor) -> Tensor:
        """Drop the batch dimension again if the weight came without one."""
        return tensor if self.original.dim() == 3 else tensor[0]

    def error(self, weight: Tensor) -> tuple[float, float]:
        """Undamped loss ``½ Σ Δw H Δwᵀ`` and damping loss ``½ λ̄ ‖ΔW‖²`` of ``weight [g, R, d]``, in float64."""
        delta = weight.double() - self.original_batched().double()
        return quadratic(delta, self.hessian), float((self.lam_bar[:, None, None] * delta.square()).sum() / 2)

    def solution(self, weight: Tensor, mask: Tensor, status: Status, **quantized: object) -> LayerSolution:
        """Wrap final weights ``[g, R, d]``: cast to the original dtype, then measure exactly what is returned."""
        final = (weight.to(self.original.dtype) + 0.0).contiguous()
        loss, damping_loss = self.error(final)
        reference = quadratic(self.original_batched().double(), self.hessian)
        return LayerSolution(
            weight=self.shaped(final),
            mask=self.shaped(mask.contiguous()),
            loss=loss,
            damping_loss=damping_loss,
            reference=reference,
            status=status,
            **quantized,  # type: ignore[arg-type]
        )

    def status(self, backend: str, *notes: str) -> Status:
        return Status(backend, self.damping, int(self.dead.sum()), notes=self.notes + notes)


def quadratic(delta: Tensor, hessian: Tensor) -> float:
    """``½ Σ_r δ_r H δ_rᵀ`` over ``[g, R, d]`` rows, in float64; rounding below zero counts as 0, NaN stays NaN."""
    return max(float(((delta @ hessian) * delta).sum() / 2), 0.0)


def row_losses(delta: Tensor, hessian: Tensor) -> Tensor:
    """``½ δ_r H δ_rᵀ`` of every row: ``[g, R]`` of ``[g, R, d]`` and ``[g, d, d]``, float64."""
    return ((delta @ hessian) * delta).sum(-1) / 2


def measured_with(hessian: Hessian, solution: LayerSolution, weight: Tensor) -> LayerSolution:
    """A solution of ``weight [g, R, d]`` with its loss and reference under another Hessian than it was solved for."""
    full, before = hessian.full().to(weight.device), weight.double()
    loss, reference = quadratic(solution.weight.double() - before, full), quadratic(before, full)
    return replace(solution, loss=loss, reference=reference)


def full_hessian(hessian: HessianLike) -> Tensor:
    """The Hessian over all samples as a float64 tensor ``[g, d, d]`` or ``[d, d]``."""
    return hessian.full() if isinstance(hessian, Hessian) else hessian.double()


def prepare(weight: Tensor, hessian: HessianLike, damping: float = 0.01) -> Problem:
    """Check a layer problem and invert its damped Hessian.

    Args:
        weight: ``[R, d]`` or ``[g, R, d]``, floating point; float16 and bfloat16 are swept in float32.
        hessian: ``[d, d]``, ``[g, d, d]`` or a :class:`~lightning_obc.hessian.Hessian`; moved to the weight's device.
        damping: Share of ``mean(diag H)`` added to the diagonal.

    Raises:
        ShapeError: Shapes or dtypes do not belong together.
        NonFiniteError: NaN or Inf in the weight or the Hessian.
        AsymmetricHessianError: The two triangles of the Hessian differ by more than rounding, which is evened out.
        NotPositiveDefiniteError: No bounded damping makes ``H`` positive definite.
    """
    check_weight(weight)
    batched = weight if weight.dim() == 3 else weight[None]
    full = on_device(full_hessian(hessian), weight.device)
    full = full if full.dim() == 3 else full[None]
    _check_hessian(full, batched)
    full = linalg.symmetrised(full)
    dead = linalg.dead_columns(full)
    inverse = linalg.safe_inverse(full, damping)
    return Problem(
        original=weight,
        weight=(batched if weight.dtype == torch.float64 else batched.float()).contiguous(),
        hessian=full,
        damped=inverse.damped_hessian,
        inverse=inverse.inverse,
        lam_bar=inverse.lam_bar,
        damping=float(inverse.damping.max()),
        dead=dead,
        notes=inverse.notes,
    )


def on_device(hessian: Tensor, device: torch.device) -> Tensor:
    """A Hessian where the weight is.

    Raises:
        ShapeError: It has no data (meta device).
    """
    _check_data("Hessian", hessian)
    return hessian.to(device)


def _check_data(name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise ShapeError(
            f"A {name} has no data",
            got="a tensor on the meta device",
            expected="values on a CPU or an accelerator",
            remedy="load the checkpoint into the model, and calibrate it, before it is compressed",
        )


def check_weight(weight: Tensor) -> None:
    """Refuse what is no finite floating-point matrix ``[R, d]`` or ``[g, R, d]`` with data.

    Raises:
        ShapeError, NonFiniteError: It is not.
    """
    _check_data("weight", weight)
    if weight.dim() not in (2, 3) or 0 in weight.shape:
        raise ShapeError("A weight matrix has the wrong shape", got=tuple(weight.shape), expected="[R, d] or [g, R, d]")
    if not weight.dtype.is_floating_point:
        raise ShapeError("A weight matrix is not floating point", got=weight.dtype, expected="a floating dtype")
    finite = torch.isfinite(weight)
    if not bool(finite.all()):
        raise NonFiniteError(
            "The weight holds NaN or Inf",
            got=f"{int((~finite).sum())} of {weight.numel()} entries",
            expected="finite weights",
            remedy="look for a diverged training run or a damaged checkpoint",
        )


def _check_hessian(hessian: Tensor, weight: Tensor) -> None:
    expected = (weight.shape[0], weight.shape[2], weight.shape[2])
    if tuple(hessian.shape) != expected:
        raise ShapeError("Weight and Hessian do not fit together", got=tuple(hessian.shape), expected=str(expected))


def check_channels(columns: int, channels: int | None) -> int:
    """``channels``, or ``columns`` when None.

    Raises:
        PatternError: ``columns`` is not a multiple of ``channels``.
    """
    if channels is None:
        return columns
    if channels < 1 or columns % channels:
        raise PatternError(
            "channels does not divide the columns", got=channels, expected=f"a divisor of {columns} columns"
        )
    return channels
