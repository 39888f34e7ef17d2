"""Search the whole trade-off: database, costs, scores, profiles, stitching, correction, metric.

model ─► database of levels ─► costs and scores ─► a profile per budget and method ─► stitch ─► correct ─► measure
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from lightning_obc.activations import ActivationGrid, ActivationQuantizer
from lightning_obc.allocation.ahead import look_ahead
from lightning_obc.allocation.build import build_database
from lightning_obc.allocation.choices import choices
from lightning_obc.allocation.corrector import Correction, Corrector
from lightning_obc.allocation.costs import CostName, CostTable
from lightning_obc.allocation.curve import CurvePoint, Method, SearchResult
from lightning_obc.allocation.database import Database
from lightning_obc.allocation.latency import LatencyTable
from lightning_obc.allocation.levels import Level, product, unstructured_ladder
from lightning_obc.allocation.output_error import OutputError
from lightning_obc.allocation.scores import activation_losses, layer_errors, sensitivity_scores, swap_losses
from lightning_obc.allocation.search import Profile, Programme, check_budgets
from lightning_obc.allocation.solve import Recipe
from lightning_obc.allocation.spdy import SPDY, spdy_scores, spdy_search
from lightning_obc.allocation.stitch import stitch
from lightning_obc.allocation.uniform import uniform_profile
from lightning_obc.calibration import CalibrationBatches, calibration_batches, collect_hessians
from lightning_obc.errors import SpecError
from lightning_obc.hessian import Hessian
from lightning_obc.layers import select_layers
from lightning_obc.layers.parts import LayerPart
from lightning_obc.report.progress import Progress, shown
from lightning_obc.specs import Calibration

Forward = Callable[[nn.Module, Any], Any]
METHODS: tuple[Method, ...] = ("uniform", "dp", "spdy")
_SCORES = ("error", "sensitivity", "loss")


def default_levels(cost: CostName | LatencyTable) -> list[Level]:
    """Levels that suit a cost: the unstructured ladder for FLOPs, 2:4 with 8 and 4 bits for BOPs and time, zeros
    with weights of few bits for bytes."""
    if cost == "flops":
        return unstructured_ladder(0.02)
    if cost == "bytes":
        return product([None, 0.5, 0.75], [(None, None), *((bits, None) for bits in (8, 6, 4, 3, 2))])
    return product([None, "2:4"], [(None, None), (8, 8), (4, 8), (4, 4)])


def search(
    model: nn.Module,
    batches: Any,
    budgets: Sequence[float],
    metric: Callable[[nn.Module], float],
    *,
    cost: CostName | LatencyTable = "bops",
    levels: Sequence[Level] | None = None,
    methods: Sequence[Method] = METHODS,
    scores: Literal["error", "sensitivity", "loss"] = "sensitivity",
    loss: Callable[[nn.Module], float] | None = None,
    correct: Correction | None = None,
    directory: str | Path | None = None,
    layers: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    calibration: Calibration | None = None,
    forward: Forward | None = None,
    recipe: Recipe | None = None,
    activations: ActivationGrid | None = None,
    edges_at_8: bool = False,
    mask_cost: bool = False,
    spdy: SPDY | None = None,
    buckets: int = 10_000,
    progress: Progress | bool = False,
    metric_name: str = "metric",
) -> SearchResult:
    """Find the best level for every layer under each budget, and measure the models that come out.

    Args:
        model: The dense model. It is dense again afterwards, whatever happens; see ``SearchResult.apply_``.
        batches: Calibration data, as for :func:`lightning_obc.compress`.
        budgets: Shares of the dense model's cost, in (0, 1].
        metric: ``metric(model)``, larger is better; measured once per point.
        cost: ``"bops"``, ``"flops"``, ``"bytes"`` or a latency table. Layers that are not compressed cost what they
            cost dense.
        levels: Levels to choose from; None takes :func:`default_levels`.
        methods: ``"uniform"`` (one level for all layers), ``"dp"`` (dynamic programme on scores), ``"spdy"``.
        scores: Of the programme: relative layer ``"error"``; ``"sensitivity"``, the same scaled by the increase of the
            calibration loss when that layer alone takes a middling level (one evaluation per layer); or ``"loss"``,
            that increase for every level (one evaluation per layer and level).
        loss: ``loss(model)`` on calibration data, smaller is better. None means the squared error of the model's
            outputs on the calibration batches, relative to the dense model's.
        correct: Runs after every stitching: a :class:`~lightning_obc.Correct` stage, whose ``at`` is ignored, or
            ``correct(model)``, which recipes cannot run, but say that it is lacking.
        directory: Where the database is kept, to be gone on with; None takes a directory that goes with the result.
            Levels in it that are not among ``levels`` are left alone.
        layers: Names, globs or type names; None means every supported layer.
        exclude: Names, globs or type names that stay dense.
        calibration: How much data is used; only its independent mode.
        forward: ``forward(model, batch)`` runs a batch.
        recipe: How levels are solved.
        activations: How activation ranges are found.
        edges_at_8: The first and last supported layers take no level below 8 bits.
        mask_cost: BOPs count one bit operation for each masked weight.
        spdy: Extent of SPDY's search.
        buckets: Resolution of the dynamic programme.
        progress: True shows a bar; a callable gets ``(description, completed, total)``.
        metric_name: What the metric is called in tables and plots.

    Returns:
        The trade-off curve.

    Raises:
        BudgetError: A budget that is not positive, above 1, or below what the levels reach: the least is named, and
            the layers and left-out parts that it consists of. As far as it does not depend on what is solved, before
            any level is.
        LayerNotFoundError, CalibrationError, LayerNotReachedError: A name that matches nothing, a model that cannot be
            called with a batch, layers that no batch reaches: found with one batch, before anything is solved.
        SpecError: Methods, costs or timings that cannot be used; a limit of SPDY's that leaves nothing to search.
        FingerprintError, DatabaseError: The directory holds another database, or a damaged one.
    """
    check_budgets(budgets, 0.0, dense=1.0)
    unknown = [method for method in methods if method not in METHODS]
    if unknown or not methods:
        raise SpecError("Unknown search methods", got=unknown or "none", expected=f"some of {METHODS}")
    if scores not in _SCORES:
        raise SpecError("Unknown scores", got=repr(scores), expected=f"one of {_SCORES}")
    if "spdy" in methods and spdy is not None:
        # It sets out from the profiles of the other two, and now is earlier than behind an hour of solving levels.
        spdy.check_searches(2)
    spec = calibration or Calibration()
    if spec.mode != "independent":
        raise SpecError(
            "A search solves every level for the dense model's inputs",
            got=f"mode={spec.mode!r}",
            expected='mode="independent"',
            remedy="correct the stitched model instead, with correct=",
        )
    if spec.execution_device is not None:
        raise SpecError(
            "A search measures the whole model again and again",
            got=f"execution_device={spec.execution_device!r}",
            expected="a model that is on the device that computes",
            remedy="leave Calibration.execution_device out",
        )
    source = calibration_batches(batches, spec)
    wanted = list(levels) if levels is not None else default_levels(cost)
    how: dict[str, Any] = {"forward": forward, "mask_cost": mask_cost, "edges_at_8": edges_at_8}
    look_ahead(model, source, wanted, budgets, cost, layers=layers, exclude=exclude, calibration=spec, **how)
    with shown(progress) as report, _dense_afterwards(model) as cleanup:
        database = _database(model, source, wanted, spec, forward, directory, layers, exclude, recipe, report)
        corrector = None if correct is None else Corrector(correct, model, source, forward)
        setting = _Setting(model, database, source, forward, loss, corrector, cleanup.restore)
        setting.quantizer = cleanup.quantizer = _quantizer(model, database, source, forward, activations)
        offered = choices(model, database, cost, wanted, source, **how)
        dense_cost, shares = offered.dense, offered.as_shares()
        table = shares.table
        programme = Programme(table, budgets, buckets=buckets, fixed=shares.fixed, notes=shares.notes)
        dense_metric = float(metric(model))
        errors = _scores(setting, table, scores)
        found = _profiles(setting, programme, table, errors, methods, spdy or SPDY(evaluations=300), report)
        points, notes = [], []
        for budget, method, profile, evaluations in found:
            if profile is None:
                notes.append(f"no single level meets the budget of {budget:.4g}")
                continue
            value = setting.evaluate(profile)
            share = programme.cost(profile)
            points.append(CurvePoint(budget, method, share, float(metric(model)), value, profile, evaluations))
    cost_name = "seconds" if isinstance(cost, LatencyTable) else cost
    return SearchResult(
        cost_name, dense_cost, dense_metric, points, database, setting.quantizer, corrector, notes, metric_name
    )


class _Cleanup:
    """Brings a model back to its dense state."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._state = {key: value.detach().clone() for key, value in model.state_dict().items()}
        self.quantizer: ActivationQuantizer | None = None

    def __enter__(self) -> _Cleanup:
        return self

    def __exit__(self, *_: object) -> None:
        if self.quantizer is not None:
            self.quantizer.disable()
        self.restore()

    def restore(self) -> None:
        with torch.no_grad():
            for key, value in self._model.state_dict().items():
                value.copy_(self._state[key])


def _dense_afterwards(model: nn.Module) -> _Cleanup:
    return _Cleanup(model)


class _Setting:
    """The model, its levels, and what a profile is judged by."""

    def __init__(
        self,
        model: nn.Module,
        database: Database,
        source: CalibrationBatches,
        forward: Forward | None,
        loss: Callable[[nn.Module], float] | None,
        corrector: Corrector | None,
        restore: Callable[[], None],
    ) -> None:
        self.model, self.database, self.source, self.forward = model, database, source, forward
        self.quantizer: ActivationQuantizer | None = None
        self._corrector, self._restore = corrector, restore
        self._loss = loss if loss is not None else OutputError(model, source, forward)

    def evaluate(self, profile: Profile) -> float:
        """Stitch, correct, and compute the calibration loss; the model stays as the profile has it."""
        if self._corrector is not None:
            # A correction may change anything; each starts from the dense model's state.
            self._restore()
        stitch(self.model, self.database, profile, quantizer=self.quantizer)
        if self._corrector is not None:
            self._corrector(self.model, self.database.profile_levels(profile))
        return float(self._loss(self.model))


def _database(
    model: nn.Module,
    source: CalibrationBatches,
    levels: Sequence[Level],
    spec: Calibration,
    forward: Forward | None,
    directory: str | Path | None,
    layers: Sequence[str] | None,
    exclude: Sequence[str] | None,
    recipe: Recipe | None,
    progress: Progress | None,
) -> Database:
    path = Path(directory) if directory is not None else Path(tempfile.mkdtemp(prefix="lightning-obc-"))

    def collect(modules: Mapping[str, nn.Module]) -> Mapping[str, Hessian]:
        drawing: dict[str, Any] = {"positions": spec.positions, "seed": spec.seed}
        return collect_hessians(model, modules, source, forward=forward, rounds=spec.rounds, **drawing)

    try:
        database = build_database(
            path,
            model,
            levels,
            collect,
            layers=layers,
            exclude=exclude,
            recipe=recipe,
            calibration=_drawn(spec),
            progress=progress,
        )
    except BaseException:
        if directory is None:
            shutil.rmtree(path, ignore_errors=True)
        raise
    if directory is None:
        weakref.finalize(database, shutil.rmtree, path, ignore_errors=True)
    return database


def _drawn(spec: Calibration) -> dict[str, Any]:
    """What decides the statistics, for fingerprint and recipes; sampled positions are named where there are any."""
    values = {key: getattr(spec, key) for key in ("samples", "rounds", "batch_size", "seed")}
    return values if spec.positions is None else values | {"positions": spec.positions}


def _quantizer(
    model: nn.Module,
    database: Database,
    source: CalibrationBatches,
    forward: Forward | None,
    spec: ActivationGrid | None,
) -> ActivationQuantizer | None:
    modules = select_layers(model)
    names = [name for name in database.layers if not isinstance(modules[name], LayerPart)]
    needed = any(level.activations for name in names for level in database.levels(name))
    if not (names and needed):
        return None
    return ActivationQuantizer(model, names, spec=spec).observe(source, forward=forward).freeze()


def _scores(setting: _Setting, table: CostTable, kind: str) -> CostTable:
    if kind == "loss":
        return swap_losses(setting.database, setting.evaluate)
    errors = layer_errors(setting.database, _input_losses(setting, table))
    allowed = {name: {level: errors[name][level] for level in row} for name, row in table.items()}
    return allowed if kind == "error" else sensitivity_scores(allowed, setting.evaluate)


def _input_losses(setting: _Setting, table: CostTable) -> dict[str, dict[int, float]] | None:
    """Output errors that come from quantized inputs, where some level has them."""
    if setting.quantizer is None:
        return None
    levels = [level for name in table for level in setting.database.levels(name)]
    widths = sorted({level.activations for level in levels if level.activations})
    modules = select_layers(setting.model, list(setting.quantizer.bits))
    return activation_losses(setting.model, setting.quantizer, modules, widths, setting.source, forward=setting.forward)


def _profiles(
    setting: _Setting,
    programme: Programme,
    table: CostTable,
    scores: CostTable,
    methods: Sequence[Method],
    spec: SPDY,
    progress: Progress | None,
) -> list[tuple[float, Method, Profile | None, int]]:
    found: list[tuple[float, Method, Profile | None, int]] = []
    choices = programme.solve(scores)
    prior = spdy_scores(table) if spec.prior == "quadratic" else scores
    for number, (budget, choice) in enumerate(zip(programme.budgets, choices, strict=True)):
        if progress is not None:
            progress("Search: profiles", number, len(choices))
        uniform = uniform_profile(setting.database, programme, table, scores, budget)
        if "uniform" in methods:
            found.append((budget, "uniform", uniform, 0))
        if "dp" in methods:
            found.append((budget, "dp", choice.profile, 0))
        if "spdy" in methods:
            one = Programme(table, [budget], buckets=programme.buckets, fixed=programme.fixed)
            known = [profile for profile in (choice.profile, uniform) if profile is not None]
            result = spdy_search(one, prior, setting.evaluate, spec, initial=known)
            found.append((budget, "spdy", result.choice.profile, result.evaluations))
    if progress is not None:
        progress("Search: profiles", len(choices), len(choices))
    return found
