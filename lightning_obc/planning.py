"""What a stage will do, found out before anything is calibrated or changed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import singledispatch

import torch
from torch import Tensor, nn

from lightning_obc.calibration import DeviceNeed, device_needs, offload_of, on_host, statistic_bytes
from lightning_obc.correction import check_correction
from lightning_obc.correction_spec import Correct
from lightning_obc.errors import (
    LayerNotFoundError,
    NonFiniteError,
    PatternError,
    ScheduleError,
    SpecError,
    UnsupportedLayerError,
)
from lightning_obc.layers import (
    LayerAdapter,
    ProblemShape,
    adapter_for,
    block_of,
    blocks_of,
    by_reason,
    is_lookup,
    reason_unsupported,
)
from lightning_obc.layerwise import Edges, differences, layer_stages, stage_layers
from lightning_obc.obs.prune import check_fit
from lightning_obc.obs.speed import sweep_flops
from lightning_obc.specs import Calibration, Prune, Quantize, Stage


@dataclass(frozen=True)
class LayerPlan:
    """One layer of a plan: what is done to it, its problem, and the float64 memory of its two-half statistic."""

    name: str
    module: nn.Module = field(repr=False)
    shape: ProblemShape
    stage: Stage

    @property
    def hessian_bytes(self) -> int:
        return 2 * 8 * self.shape.groups * self.shape.columns**2

    @property
    def sweep_flops(self) -> float:
        """⅔·R·d³ per problem, the cost of a full elimination; 0 for embeddings, which are rounded."""
        if is_lookup(self.module):
            return 0.0
        return sweep_flops(self.shape.groups, self.shape.rows, self.shape.columns)


@dataclass(frozen=True)
class StagePlan:
    """What a stage will do, found out before anything is calibrated or changed.

    Attributes:
        stage: The stage.
        layers: What it will compress.
        skipped: Layers that it will leave as they are, with the reason.
        calibration: How its statistics will be collected.
        blocks: Names of the layers by block of the network.
        outside: Names of the layers outside of all blocks.
        needs: What every calibration pass takes of another device than the model's, where there is one.
    """

    stage: Stage
    layers: list[LayerPlan]
    skipped: dict[str, str]
    calibration: Calibration = field(default_factory=Calibration)
    blocks: Sequence[Sequence[str]] = ()
    outside: Collection[str] = ()
    needs: Sequence[DeviceNeed] = ()

    @property
    def modules(self) -> dict[str, nn.Module]:
        return {layer.name: layer.module for layer in self.layers}

    @property
    def hessian_bytes(self) -> int:
        return sum(layer.hessian_bytes for layer in self.layers)

    @property
    def together(self) -> list[list[LayerPlan]]:
        """Layers that are compressed at once, from statistics of the same model; in module order as far as the plan
        can tell (a run takes the order in which batches reach them)."""
        return grouped(self.layers, self.calibration, self.blocks)

    @property
    def passes(self) -> list[list[LayerPlan]]:
        """Layers whose statistics are collected in one pass over the calibration data."""
        spec = self.calibration
        if spec.execution_device is None:
            return [part for group in self.together for part in within_memory(group, spec)]
        chunks = [chunk for group in self.together for chunk in by_block(group, self.blocks, self.outside)]
        return [part for chunk in chunks for part in within_memory(chunk, spec)]

    @property
    def statistics_bytes(self) -> int:
        """Memory of the statistics that live at once, at most."""
        return max(
            (sum(statistic_bytes(x.shape, self.calibration.paired) for x in part) for part in self.passes), default=0
        )

    @property
    def on_host(self) -> set[str]:
        """Layers whose statistics live in host memory while they are collected."""
        return {
            name
            for index, part in enumerate(self.passes)
            for name in on_host(
                {layer.name: layer.shape for layer in part},
                self.calibration,
                self.needs[index].weights if self.needs else 0,
            )
        }

    def __str__(self) -> str:
        from lightning_obc.report import render

        if isinstance(self.stage, Correct):
            return f"Plan of {self.stage}: no Hessians"
        columns = ("layer", "type", "adapter", "problems × rows × columns", "Hessian [MiB]", "sweep [Gflop]")
        rows = [
            [
                layer.name,
                type(layer.module).__name__,
                type(_adapter(layer.module)).__name__.removesuffix("Adapter"),
                f"{layer.shape.groups} × {layer.shape.rows} × {layer.shape.columns}",
                f"{layer.hessian_bytes / 2**20:.2f}",
                f"{layer.sweep_flops / 1e9:.2f}",
            ]
            for layer in self.layers
        ]
        title = f"Plan of {self.stage}: {len(rows)} layers, {self.hessian_bytes / 2**20:.1f} MiB of Hessians"
        own = {layer.name: differences(self.stage, layer.stage) for layer in self.layers}
        differing = {name: f"with {changed}" for name, changed in own.items() if changed}
        apart = by_reason(differing, "differently", "differently")
        left = by_reason(self.skipped, "left as it is", "left as they are")
        return "\n".join([render(title, columns, rows), *self._notes(), *apart, *left])

    def _notes(self) -> list[str]:
        spec, limit = self.calibration, self.calibration.memory_bytes
        plain = not spec.paired and not spec.bias and spec.device_memory is None and not self.needs
        if plain and limit is None:
            return []
        how = f"{spec.mode}, {len(self.passes)} calibration passes"
        if spec.paired:
            how += f" in {len(self.together)} groups ({spec.together}), each through the model before and after"
        if (away := self.on_host) or spec.device_memory is not None:
            how += f", {len(away)} layers' statistics in host memory, to keep {spec.device_memory} of the device"
        if spec.cache is not None:
            how += f", outputs of finished blocks kept in {spec.cache} of host memory"
        if spec.bias:
            how += ", biases corrected after each group"
        if self.needs:
            most = max(self.needs, key=lambda need: need.total)
            how += (
                f", one block after the other on {spec.execution_device}: at most {_mib(most.total)} of its memory and "
                f"the activations of a batch (for {', '.join(most.layers)}: weights {_mib(most.weights)}, "
                f"statistics {_mib(most.statistics)}, solving {_mib(most.solving)})"
            )
        notes = [f"calibration: {how}, at most {self.statistics_bytes / 2**20:.2f} MiB of statistics at once"]
        large = [
            layer.name
            for layer in self.layers
            if limit is not None and statistic_bytes(layer.shape, spec.paired) > limit
        ]
        return [*notes, f"larger alone than the memory limit: {', '.join(large)}"] if large else notes


def grouped(layers: Sequence[LayerPlan], spec: Calibration, blocks: Sequence[Sequence[str]]) -> list[list[LayerPlan]]:
    """Layers that are compressed at once.

    Args:
        layers: The layers, in their order.
        spec: Says what belongs together.
        blocks: Names by block of the network, in the order of the blocks.
    """
    if not spec.paired or spec.together == "all":
        return [list(layers)]
    if spec.together == "layer":
        return [[layer] for layer in layers]
    by_name = {layer.name: layer for layer in layers}
    return [[by_name[name] for name in block] for block in blocks]


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f} MiB"


def by_block(
    layers: Sequence[LayerPlan], blocks: Sequence[Sequence[str]], outside: Collection[str]
) -> list[list[LayerPlan]]:
    """The layers of every block apart; those outside of all blocks go with the next block behind them.

    Args:
        layers: The layers.
        blocks: Names by block of the network, in the order of the blocks.
        outside: Names of the layers outside of all blocks.
    """
    by_name = {layer.name: layer for layer in layers}
    chunks: list[list[LayerPlan]] = []
    waiting: list[LayerPlan] = []
    for block in blocks:
        waiting += [by_name[name] for name in block if name in by_name]
        if waiting and block[0] not in outside:
            chunks.append(waiting)
            waiting = []
    return [*chunks, waiting] if waiting else chunks


def within_memory(layers: Sequence[LayerPlan], spec: Calibration) -> list[list[LayerPlan]]:
    """Parts of a group whose statistics fit the memory limit together: the largest layer first, into the first part
    that has room. A layer that is too large alone is a part of its own."""
    limit = spec.memory_bytes
    if limit is None:
        return [list(layers)]
    parts: list[list[LayerPlan]] = []
    room: list[int] = []
    for layer in sorted(layers, key=lambda x: -x.hessian_bytes):
        size = statistic_bytes(layer.shape, spec.paired)
        index = next((i for i, left in enumerate(room) if size <= left), None)
        if index is None:
            parts.append([layer])
            room.append(limit - size)
        else:
            parts[index].append(layer)
            room[index] -= size
    position = {layer.name: i for i, layer in enumerate(layers)}
    return [sorted(part, key=lambda x: position[x.name]) for part in parts]


def plan_stage(
    model: nn.Module, stage: Stage, calibration: Calibration | None = None, edges: Edges | None = None
) -> StagePlan:
    """Select the layers of a stage and check everything that can be checked without data.

    Args:
        model: The model.
        stage: The stage.
        calibration: How its statistics will be collected; None means ``Calibration()``.
        edges: Names of the first and the last layer; None takes them in the order of the modules.

    Raises:
        LayerNotFoundError: A name, glob or type, or an override, that matches nothing.
        PatternError: A pattern that does not fit a layer, with ``misfit="error"``; every such layer is named.
        NonFiniteError: NaN or Inf in a weight.
        DeviceMemoryError: A block that does not fit the device that it would be brought to.
    """
    if isinstance(stage, Correct):
        check_correction(model, stage)
        return StagePlan(stage, [], {}, calibration or Calibration())
    layers: list[LayerPlan] = []
    skipped: dict[str, str] = {}
    misfits: dict[str, PatternError] = {}
    stages = layer_stages(model, stage, edges)
    for name, module in stage_layers(model, stage, edges).items():
        shape, own = _adapter(module).shape(module), stages[name]
        if isinstance(stage, Prune) and is_lookup(module):
            skipped[name] = "its rows are looked up, not multiplied: embeddings are quantized only"
            continue
        try:
            check_layer(own, shape)
        except PatternError as error:
            misfits[name] = error
            continue
        layers.append(LayerPlan(name, module, shape, own))
    if wrong := {name: x for name, x in misfits.items() if getattr(stages[name], "misfit", "error") == "error"}:
        first = next(iter(wrong.values()))
        got = "; ".join(f"{name}: {error.got}" for name, error in wrong.items())
        raise PatternError(first.message, got=got, expected=first.expected, remedy=first.remedy)
    skipped |= {name: f"{error.message}: {error.got}" for name, error in misfits.items()}
    if not layers:
        raise LayerNotFoundError(
            f"{stage} has no layer to compress",
            got="; ".join(f"{name}: {reason}" for name, reason in skipped.items()) if skipped else "no layer",
            expected="at least one layer that the pattern fits",
            remedy="choose other layers, another pattern or misfit",
        )
    _check_weights(layers)
    names = [layer.name for layer in layers]
    found = StagePlan(stage, layers, skipped, calibration or Calibration(), blocks_of(model, names))
    if found.calibration.execution_device is None:
        return found
    found = replace(found, outside=frozenset(name for name in names if block_of(model, name) is None))
    passes = [{layer.name: layer.module for layer in part} for part in found.passes]
    return replace(found, needs=device_needs(model, passes, found.calibration))


def check_execution(model: nn.Module, stages: Sequence[Stage], spec: Calibration) -> None:
    """Refuse what needs the whole model on ``spec.execution_device`` at once.

    Raises:
        SpecError: Global tuning of a model whose blocks are brought there one at a time; or there is no such device.
    """
    tuned = [stage for stage in stages if isinstance(stage, Correct) and stage.method == "global"]
    if tuned and offload_of(model, spec) is not None:
        raise SpecError(
            f"{tuned[0]} trains the whole model at once",
            got=f"execution_device={spec.execution_device!r} for a model in host memory",
            expected="a model that is on the device that computes",
            remedy="use another correction, or run this one without an execution_device afterwards",
        )


def _check_weights(layers: Sequence[LayerPlan]) -> None:
    bad = [layer.name for layer in layers if not bool(torch.isfinite(weight_matrix(layer.module)).all())]
    if bad:
        raise NonFiniteError(
            "Weights hold NaN or Inf",
            got=f"layers {', '.join(bad)}",
            expected="finite weights",
            remedy="look for a diverged training run or a damaged checkpoint",
        )


def weight_matrix(module: nn.Module) -> Tensor:
    """A copy of a layer's weight as ``[g, R, d]``."""
    return _adapter(module).weight_matrix(module)


def weight_shape(module: nn.Module) -> tuple[int, ...]:
    """Shape of a layer's weight in the module's own layout."""
    return tuple(_adapter(module).current(module).shape)


def _adapter(module: nn.Module) -> LayerAdapter:
    adapter = adapter_for(module)
    if adapter is None:
        raise UnsupportedLayerError(
            "A module cannot be compressed", got=reason_unsupported(module), remedy="register an adapter for it"
        )
    return adapter


@singledispatch
def check_layer(stage: Stage, shape: ProblemShape) -> None:
    """Raise :class:`PatternError` when a stage does not fit a layer. One implementation per stage type."""
    raise SpecError("This stage has no solver", got=type(stage).__name__, expected="Prune or Quantize")


@check_layer.register
def _check_prune(stage: Prune, shape: ProblemShape) -> None:
    check_fit(stage.parsed, shape.channels, stage.misfit)


@check_layer.register
def _check_quantize(stage: Quantize, shape: ProblemShape) -> None:
    size = stage.parsed.group_size
    if size is not None and shape.channels % size:
        raise PatternError(
            f"The grid {stage.parsed} does not fit the layer",
            got=f"{shape.channels} input channels per group and kernel position, group_size {size}",
            expected="a group size that divides the input channels",
            remedy='exclude the layer, use another group_size, or set misfit="skip"',
        )


def check_schedule(model: nn.Module, stages: Sequence[Stage], edges: Edges | None = None) -> None:
    """Refuse recipes whose later stages would destroy what earlier ones made.

    Raises:
        ScheduleError: No stages, a layer that is pruned after it was quantized, or a correction towards the dense
            model before anything has changed.
    """
    if not stages:
        raise ScheduleError("A recipe has no stages", got="[]", expected="at least one Prune or Quantize")
    quantized: dict[str, str] = {}
    for index, stage in enumerate(stages):
        if isinstance(stage, Correct):
            _check_correction_order(stage, stages[:index])
            continue
        names = set(stage_layers(model, stage, edges))
        if isinstance(stage, Quantize):
            quantized |= {name: str(stage) for name in names}
        elif clash := sorted(names & set(quantized)):
            raise ScheduleError(
                f"{stage} comes after a quantization of the same layers",
                got=", ".join(clash),
                expected="pruning before quantization, so that weights stay on their grid",
                remedy="put the Prune stage first",
            )


def _check_correction_order(stage: Correct, before: Sequence[Stage]) -> None:
    if stage.needs_dense and all(isinstance(earlier, Correct) for earlier in before):
        raise ScheduleError(
            f"{stage} has nothing to correct",
            got="no Prune or Quantize stage before it",
            expected="corrections behind the stages that change weights",
            remedy="put it last",
        )
