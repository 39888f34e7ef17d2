"""What the engine returns: frozen results that carry their own loss and status."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from lightning_obc.brief import Brief
from lightning_obc.grids import Grid


@dataclass(frozen=True)
class Status:
    """How a layer was solved.

    Attributes:
        backend: The backend that ran the sweep.
        damping: Share of ``mean(diag H)`` that was finally added to the diagonal.
        dead: Number of columns whose calibration inputs are exactly zero.
        held_out: Relative error on the samples that did not take part, where ``damping="auto"`` measured it.
        notes: Everything out of the ordinary, in order: retries, raised damping, pattern padding.
        estimate: True when the Hessian, and with it every loss, is an estimate from a random part of the positions.
    """

    backend: str = ""
    damping: float = 0.0
    dead: int = 0
    held_out: float | None = None
    notes: tuple[str, ...] = ()
    estimate: bool = False

    @property
    def ok(self) -> bool:
        """True when nothing out of the ordinary happened."""
        return not self.notes

    def __str__(self) -> str:
        dead = (f"{self.dead} dead columns (inputs always 0)",) if self.dead else ()
        sampled = ("errors estimated from sampled positions",) if self.estimate else ()
        return "; ".join((*self.notes, *dead, *sampled)) or "ok"


@dataclass(frozen=True)
class Refinement:
    """What local search after the greedy solver brought.

    Attributes:
        gain: Share of the greedy damped loss that it saved on the calibration samples, >= 0.
        held_out_gain: Share of the greedy held-out loss that it saves when the halves of the samples judge each other;
            None where they could not, 0 where no row changed. It is that of weights which are solved on one half, not
            of the layer's own, which have seen all samples: it may well be the larger figure. Slightly flattered,
            because the depth of refinement is chosen on it.
        rows: Share of the rows that changed.
        stopped: True when the time limit cut the search short.
    """

    gain: float
    held_out_gain: float | None
    rows: float
    stopped: bool = False

    def __str__(self) -> str:
        cut = ", when its time was up" if self.stopped else ""
        if not self.rows:
            return f"refined: no better weights than the greedy ones{cut}"
        text = f"refined: damped loss {_percent(self.gain)} lower than greedy's, in {_percent(self.rows)} of the rows"
        if self.held_out_gain:
            text += f"; of weights solved on one half of the samples, {_percent(self.held_out_gain)} lower on the other"
        elif self.held_out_gain is not None:
            text += "; of weights solved on one half of the samples, no lower on the other"
        return f"{text}{cut}"


def _percent(share: float) -> str:
    # Three digits where there are so many, and never 0 for what is not.
    return f"{100 * share:.3g} %" if share >= 1e-5 or share == 0 else "less than 0.001 %"


@dataclass(frozen=True, repr=False)
class LayerSolution(Brief):
    """Compressed weights of one layer problem.

    ``loss`` is ``½ Σ_r Δw_r H Δw_rᵀ`` in float64 with the undamped ``H``: the squared output error of the layer,
    per calibration sample. It is relative to the weight that was passed in.

    Attributes:
        weight: ``[R, d]`` or ``[g, R, d]``, dtype and device of the input weight; zeros are ``+0.0``.
        mask: Same shape, bool, True = kept.
        loss: Squared output error per sample.
        damping_loss: ``½ λ̄ ‖ΔW‖²``, what the damping adds to the objective that was minimised.
        reference: ``½ Σ_r w_r H w_rᵀ`` of the weight that was passed in; ``loss / reference`` is the relative error.
        status: How it was solved.
        grid: Scale and zero point of a quantized solution, otherwise None.
        codes: uint8 codes, same shape as ``weight``, of a quantized solution.
        refinement: What refinement brought, or None when there was none.
        curve: Points of the sweep that chose mask or codes (the greedy one, where several orders were tried), before
            refits and refinement: share of the weights that are zero, or of the kept weights that are rounded, and
            damped loss as a share of that of no weights at all. Empty of solvers that take no steps: magnitude,
            nearest rounding, AdaPrune.
    """

    weight: Tensor
    mask: Tensor
    loss: float
    damping_loss: float
    reference: float
    status: Status = field(default_factory=Status)
    grid: Grid | None = None
    codes: Tensor | None = None
    refinement: Refinement | None = None
    curve: tuple[tuple[float, float], ...] = field(default=(), repr=False)

    @property
    def scale(self) -> Tensor | None:
        return None if self.grid is None else self.grid.scale

    @property
    def zero_point(self) -> Tensor | None:
        return None if self.grid is None else self.grid.zero_point

    @property
    def relative_error(self) -> float:
        """``loss / reference``; 0 when both are 0."""
        return 0.0 if self.loss == 0 else self.loss / max(self.reference, 1e-300)

    @property
    def sparsity(self) -> float:
        return 1.0 - self.mask.double().mean().item()

    @property
    def remarks(self) -> str:
        """How it was solved, for people: the status, and what refinement brought."""
        return str(self.status) if self.refinement is None else f"{self.status}; {self.refinement}"

    def marked(self, hessian: object) -> LayerSolution:
        """The same solution, marked as an estimate when it was solved for a statistic that is one."""
        if not getattr(hessian, "estimate", False):
            return self
        return replace(self, status=replace(self.status, estimate=True))

    def with_held_out(self, held_out: float | None) -> LayerSolution:
        """The same solution with a held-out relative error on record."""
        return replace(self, status=replace(self.status, held_out=held_out))
