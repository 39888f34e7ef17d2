"""One stage: calibrate, solve, apply, correct, report; layers that see compressed ones behind them, group by group.

layers ─► calibration (H per layer) ─► OBS engine ─► solutions ─► apply ─► rows of the report
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from lightning_obc.activations import check_visits, input_note, quantize_stage_inputs
from lightning_obc.calibration import Collector, DenseWeights, check_comparable, check_finite
from lightning_obc.correction import (
    NormStatistics,
    correct_bias,
    has_bias,
    record_statistics,
)
from lightning_obc.correction_spec import Correct
from lightning_obc.distributed import SingleProcess, all_or_none, exchange
from lightning_obc.errors import BackendError, LayerNotReachedError, OBCError, PatternError, SpecError
from lightning_obc.grids import Grid
from lightning_obc.hessian import Hessian, PairedHessian
from lightning_obc.layers import adapter_for, blocks_of
from lightning_obc.obs import LayerSolution
from lightning_obc.obs.parts import solution_on
from lightning_obc.obs.recentre import Recentred, against_before, recentre
from lightning_obc.origins import Origins
from lightning_obc.planning import (
    LayerPlan,
    StagePlan,
    by_block,
    grouped,
    plan_stage,
    weight_matrix,
    weight_shape,
    within_memory,
)
from lightning_obc.report import LayerReport, StageReport
from lightning_obc.solving import solve_layer
from lightning_obc.specs import Calibration, Stage
from lightning_obc.store import LayerProblem, StageStore
from lightning_obc.team import Outcome, Team, begin_together, rows_splittable

# Where the stage chooses its own damping, by halves of the samples that recentring does not tell apart.
_RECENTRING_DAMPING = 0.01
_log = logging.getLogger(__name__)

OnFailure = Literal["keep", "raise"]
Collect = Callable[[Mapping[str, nn.Module]], Mapping[str, Hessian]]
Progress = Callable[[str, float, float], None]


def run_stage(
    model: nn.Module,
    stage: Stage,
    collect: Collect,
    *,
    on_failure: OnFailure = "keep",
    progress: Progress | None = None,
    store: StageStore | None = None,
    plan: StagePlan | None = None,
    origins: Origins | None = None,
) -> StageReport:
    """Compress the layers of one stage in place.

    Args:
        model: Changed in place; parameters are copied into, never replaced.
        stage: What to do.
        collect: Returns the Hessians of the modules it is given. A :class:`~lightning_obc.calibration.Collector` also
            says, by its ``spec``, whether layers are calibrated behind compressed ones and how much memory statistics
            may take; any other function is called once, before any weight changes.
        on_failure: ``"keep"`` leaves a layer that cannot be solved as it is and says so; ``"raise"`` stops at it, with
            nothing written of the layers that are compressed together with it.
        progress: Called as ``progress(description, completed, total)``.
        store: Where solved layers are kept, to go on after an interruption; see
            :class:`~lightning_obc.store.SolutionStore`.
        plan: The plan of this stage, if it was made already.
        origins: Weights before earlier stages of the same run, for the error of all of them together; None where there
            are none.

    Raises:
        LayerNotFoundError, PatternError, NonFiniteError, CalibrationError: Before any weight is changed; behind
            compressed layers, before any weight of the next layers is changed.
        SpecError: The stage is a correction, which :func:`~lightning_obc.pipeline.correct_after` runs.
    """
    if isinstance(stage, Correct):
        raise SpecError(f"{stage} solves no layers", got="run_stage", expected="correct_after")
    started = time.perf_counter()
    check_visits(stage, collect)
    plan = plan_stage(model, stage) if plan is None else plan
    ranks = collect.ranks if isinstance(collect, Collector) else SingleProcess()
    with all_or_none(ranks):
        begin_together(model, ranks)
        origins = Origins() if origins is None else origins
        origins.begin()
        run = _StageRun(model, stage, collect, on_failure, progress, store, plan, Team(ranks), origins)
        groups = run.groups()
        for index, group in enumerate(groups):
            # Solutions of layers that are calibrated on the same model wait until the last of them is found.
            run.solve(group)
            run.apply_(group)
            run.correct_(group)
            run.advance(groups[index + 1 :])
        solutions = {x.name: found for x in plan.layers if (found := run.outcomes[x.name].solution) is not None}
        solved = {x.name: (x.module, x.stage) for x in plan.layers if x.name in solutions}
        inputs = quantize_stage_inputs(model, solved, collect)
        if progress is not None:
            progress(str(stage), run.total, run.total)
        rows = [_report(layer, run.outcomes[layer.name], inputs) for layer in plan.layers]
        run.leave()
        work = run.team.end(model, {name: solution.mask for name, solution in solutions.items()})
    seconds = time.perf_counter() - started
    return StageReport(str(stage), rows, plan.skipped, solutions, run.samples, seconds, work, inputs)


class _StageRun:
    """One stage at work: groups of layers, each calibrated, solved and applied."""

    def __init__(
        self,
        model: nn.Module,
        stage: Stage,
        collect: Collect,
        on_failure: OnFailure,
        progress: Progress | None,
        store: StageStore | None,
        plan: StagePlan,
        team: Team,
        origins: Origins,
    ) -> None:
        self.model, self.stage, self.collect, self.plan, self.team = model, stage, collect, plan, team
        self.origins = origins
        self.on_failure, self.progress, self.store = on_failure, progress, store
        self.spec = collect.spec if isinstance(collect, Collector) else Calibration()
        self.dense = DenseWeights()
        self.outcomes: dict[str, Outcome] = {}
        self.total, self.done = sum(layer.sweep_flops for layer in plan.layers), 0.0
        self.samples = 0
        self.recentred: set[str] = set()
        self.blocks: Sequence[Sequence[str]] = ()
        self.device = collect.offload.device if isinstance(collect, Collector) and collect.offload else None
        self.means = self._means()

    def groups(self) -> list[list[LayerPlan]]:
        """Layers that are compressed at once, in the order in which batches reach them."""
        layers = {layer.name: layer for layer in self.plan.layers}
        if not self.spec.paired and self.device is None:
            return [list(layers.values())]
        for layer in layers.values() if self.spec.paired else ():
            check_comparable(layer.module)
        assert isinstance(self.collect, Collector)
        order = self.collect.order(self.plan.modules)
        self.collect.keep_blocks({name: layers[name].module for name in order})
        self.blocks = blocks_of(self.model, order)
        return grouped([layers[name] for name in order], self.spec, self.blocks)

    def advance(self, left: Sequence[Sequence[LayerPlan]]) -> None:
        """Tell the calibration which groups or parts of them are still to come."""
        if isinstance(self.collect, Collector):
            self.collect.advance([layer.name for group in left for layer in group], self.dense)

    def solve(self, group: Sequence[LayerPlan]) -> None:
        self.recentred = self._recentred(group)
        chunks = [list(group)]
        if isinstance(self.collect, Collector) and self.collect.by_block:
            chunks = by_block(group, self.blocks, self.plan.outside)
        for index, chunk in enumerate(chunks):
            for part in within_memory(chunk, self.spec):
                self._solve_part(part)
            if later := chunks[index + 1 :]:
                self.advance(later)

    def _solve_part(self, part: Sequence[LayerPlan]) -> None:
        """Layers whose statistics are collected in one pass; the ranks share them."""
        costs, done = {layer.name: layer.sweep_flops for layer in part}, self.done
        division = self.team.divide(costs, [layer.name for layer in part if rows_splittable(layer.stage)])
        statistics = self._statistics(part, division.owners)
        with all_or_none(self.team.ranks):
            check_finite(statistics)
        samples = sum(next(iter(statistics.values())).samples) if statistics else self.samples
        self.samples = max(exchange(self.team.ranks, samples))
        # On all ranks at once: parts of a sharded weight are brought together.
        problems = {
            layer.name: (layer, weight_matrix(layer.module)) for layer in part if layer.name not in self.outcomes
        }
        devices = {name: weight.device for name, (_, weight) in problems.items()}
        for name, (_, weight) in problems.items():
            self.origins.meet(name, weight)

        def solve(name: str) -> Outcome:
            layer, weight = problems.pop(name)
            if self.progress is not None:
                self.progress(f"{self.stage}: {name}", self.done, self.total)
            outcome = self._solved(layer, weight, statistics.pop(name))
            self.done += layer.sweep_flops
            return outcome

        left = {name: costs[name] for name in problems}
        self.outcomes |= self.team.solve(division, left, devices, solve)
        self.done = done + sum(costs.values())

    def _recentred(self, group: Sequence[LayerPlan]) -> set[str]:
        """Layers that are moved to make up for what came before: not those behind them in the group, or these would
        make up for it again."""
        names = {layer.name for layer in group}
        if not self.spec.recentring or len(group) == 1 or not isinstance(self.collect, Collector):
            return names
        return self.collect.fed_from_outside({layer.name: layer.module for layer in group})

    def _statistics(self, part: Sequence[LayerPlan], owners: Mapping[str, int]) -> dict[str, Hessian | PairedHessian]:
        """Statistics of the layers that this rank solves."""
        modules = {layer.name: layer.module for layer in part}
        if not isinstance(self.collect, Collector):
            return dict(self.collect(modules))
        if not self.spec.paired:
            return dict(self.collect(modules, owners))
        unfit: dict[str, OBCError] | None = {} if self.on_failure == "keep" else None
        started, found = time.perf_counter(), self.collect.paired(modules, self.dense, unfit, owners)
        self.outcomes |= {name: self._kept(error, started) for name, error in (unfit or {}).items()}
        return dict(found)

    def _solved(self, layer: LayerPlan, weight: Tensor, statistic: Hessian | PairedHessian) -> Outcome:
        started, start, home = time.perf_counter(), None, weight.device
        # Where the statistic is; a model whose blocks are brought there for the calibration is on the host again.
        weight = weight if self.device is None else weight.to(self.device)
        mixing = self.spec.recentring if layer.name in self.recentred else 0.0
        problem = LayerProblem(layer.name, layer.stage, weight, statistic, mixing, self._pooled(layer))
        # Outside of what may fail: progress that belongs to another run must not be mixed into this one.
        solution = self.store.load(problem) if self.store is not None else None
        try:
            if isinstance(statistic, PairedHessian):
                start = recentre(weight, statistic, mixing=mixing, damping=_damping(layer.stage))
            if solution is None:
                solution = self._solution(layer, weight, statistic, start)
                if self.store is not None:
                    self.store.save(problem, solution)
        except Exception as error:
            return self._kept(error, started)
        total = self._total_error(layer.name, solution, statistic)
        if self.device is not None:
            solution = solution_on(solution, home)
        seconds = time.perf_counter() - started
        return Outcome(solution, solution.remarks, seconds, None if start is None else start.inherited, total)

    def _total_error(self, name: str, solution: LayerSolution, statistic: Hessian | PairedHessian) -> float | None:
        """A figure of the report: a device that has no memory left for it does not cost the layer."""
        try:
            return self.origins.error(name, solution, statistic)
        except RuntimeError as error:
            _log.warning("%s: its error over all stages is left out of the report: %s", name, error)
            return None

    def _solution(
        self, layer: LayerPlan, weight: Tensor, statistic: Hessian | PairedHessian, start: Recentred | None
    ) -> LayerSolution:
        options = layer.shape.channels, self._pooled(layer)
        if isinstance(statistic, PairedHessian):
            assert start is not None
            solution = solve_layer(layer.stage, start.weight, statistic.hessian, *options)
            return against_before(solution, weight, statistic)
        return solve_layer(layer.stage, weight, statistic, *options)

    def _pooled(self, layer: LayerPlan) -> bool:
        # Only convolutions have groups of one kind; query, key and value of attention are problems of their own.
        return self.spec.pooled and getattr(layer.module, "groups", 1) > 1

    def _kept(self, error: Exception, started: float) -> Outcome:
        # One bad layer must not lose the run. Errors of the recipe or the backend would meet every layer alike, and
        # what is no Exception (interrupts) passes anyway.
        recipe = isinstance(error, (SpecError, BackendError)) and not isinstance(error, PatternError)
        if self.on_failure == "raise" or recipe:
            raise error
        return Outcome(None, f"kept: {error}", time.perf_counter() - started)

    def apply_(self, group: Sequence[LayerPlan]) -> None:
        for layer in group:
            outcome, started = self.outcomes[layer.name], time.perf_counter()
            adapter = adapter_for(layer.module)
            if outcome.solution is None or adapter is None:
                continue
            if self.spec.paired:
                self.dense.keep(layer.module)
            try:
                adapter.write_weight_(layer.module, outcome.solution.weight)
            except Exception as error:
                self.outcomes[layer.name] = self._kept(error, started)

    def leave(self) -> None:
        """The stage is over: later ones begin with what its layers hold now."""
        for layer in self.plan.layers:
            if self.outcomes[layer.name].solution is not None:
                self.origins.leave(layer.name, weight_matrix(layer.module))

    def _means(self) -> NormStatistics | None:
        """Means of the outputs of layers with a bias before anything changes."""
        layers = {x.name: x.module for x in self.plan.layers if has_bias(x.module)}
        if not (self.spec.bias and layers and isinstance(self.collect, Collector)):
            return None
        options: dict[str, Any] = {"forward": self.collect.forward, "ranks": self.collect.ranks}
        return record_statistics(self.model, self.collect.batches, layers=layers, **options)

    def correct_(self, group: Sequence[LayerPlan]) -> None:
        names = [x.name for x in group if self.outcomes[x.name].solution is not None and has_bias(x.module)]
        if self.means is None or not names:
            return
        assert isinstance(self.collect, Collector)
        options: dict[str, Any] = {"forward": self.collect.forward, "ranks": self.collect.ranks}
        try:
            correct_bias(self.model, self.means, self.collect.batches, layers=names, progress=self.progress, **options)
        except LayerNotReachedError:
            # Outputs of parts stay inside their module: there is no mean to compare.
            return


def _damping(stage: Stage) -> float:
    damping = getattr(stage, "damping", None)
    return damping if isinstance(damping, (int, float)) else _RECENTRING_DAMPING


def _report(layer: LayerPlan, outcome: Outcome, inputs: Mapping[str, Grid]) -> LayerReport:
    solution, status = outcome.solution, outcome.status
    if solution is not None and layer.name not in inputs:
        status += input_note(layer.stage, layer.module)
    weight = weight_matrix(layer.module)
    bits = weight.element_size() * 8
    return LayerReport(
        name=layer.name,
        type=type(layer.module).__name__,
        shape=tuple(weight_shape(layer.module)),
        stage=str(layer.stage),
        sparsity=float((weight == 0).double().mean()),
        bits=bits if solution is None or solution.grid is None else solution.grid.spec.bits,
        loss=0.0 if solution is None else solution.loss,
        damping_loss=0.0 if solution is None else solution.damping_loss,
        relative_error=0.0 if solution is None else solution.relative_error,
        held_out=None if solution is None else solution.status.held_out,
        status=status,
        seconds=outcome.seconds,
        compressed=solution is not None,
        inherited=outcome.inherited,
        total_error=outcome.total,
        input_bits=inputs[layer.name].spec.bits if layer.name in inputs else None,
        curve=() if solution is None else solution.curve,
    )
