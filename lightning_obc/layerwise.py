"""Which settings of a stage hold for which layer: its overrides, and the first and last layer of the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

from torch import nn

from lightning_obc.activation_spec import LEAST_BITS
from lightning_obc.calibration import Collector
from lightning_obc.errors import LayerNotFoundError
from lightning_obc.layers import is_lookup, select_layers
from lightning_obc.specs import Quantize, Stage, overridden

Edges = Sequence[str]


def edge_layers(model: nn.Module) -> Edges:
    """Names of the first and the last layer in the order of the modules; embeddings are not counted."""
    names = [name for name, module in select_layers(model).items() if not is_lookup(module)]
    return names[:1] + names[-1:]


def reached_edges(model: nn.Module, stages: Sequence[Stage], collect: Callable[[], Collector]) -> Edges | None:
    """Names of the layers that the first calibration batch reaches first and last, where a stage treats them apart.

    Args:
        model: The model.
        stages: The stages.
        collect: Makes a collector; called only when a stage needs it.
    """
    if all(_treatment(stage) == "same" for stage in stages):
        return None
    layers = {name: module for name, module in select_layers(model).items() if not is_lookup(module)}
    reached = collect().reached(layers)
    return [*reached[:1], *reached[-1:]]


def stage_layers(model: nn.Module, stage: Stage, edges: Edges | None = None) -> dict[str, nn.Module]:
    """The layers of a stage, as :func:`~lightning_obc.layers.select_layers`, without the edges that it skips.

    Args:
        model: The model.
        stage: The stage.
        edges: First and last layer; None takes them in the order of the modules.
    """
    skipped = list(_edges(model, edges)) if _treatment(stage) == "skip" else []
    return select_layers(model, stage.layers, [*(stage.exclude or ()), *skipped] or None)


def layer_stages(model: nn.Module, stage: Stage, edges: Edges | None = None) -> dict[str, Stage]:
    """What is done to each layer of a stage: the stage itself, or what its overrides and edges make of it.

    Raises:
        LayerNotFoundError: An override that matches none of the stage's layers.
    """
    chosen = stage_layers(model, stage, edges)
    plain: Any = replace(stage, edges="same", overrides={}) if hasattr(stage, "overrides") else stage  # type: ignore
    found: dict[str, Any] = dict.fromkeys(chosen, plain)
    bits = _treatment(stage)
    if isinstance(stage, Quantize) and isinstance(bits, int):
        inputs = None if stage.inputs is None else stage.inputs.with_bits(max(bits, LEAST_BITS))
        wider = replace(plain, grid=replace(stage.parsed, bits=bits), activations=inputs)
        found |= {name: wider for name in _edges(model, edges) if name in found}
    for key, override in getattr(stage, "overrides", {}).items():
        names = [name for name in select_layers(model, [key]) if name in found]
        if not names:
            raise LayerNotFoundError(
                f"An override of {stage} matches none of its layers",
                got=repr(key),
                expected=f"names, globs or types of {', '.join(found)}",
                remedy="drop the override, or select the layers",
            )
        for name in names:
            found[name] = overridden(found[name], override)
    return found


def differences(stage: Stage, own: Stage) -> str:
    """What an overridden stage does differently, as ``pattern=0.3, damping=0.1``; empty for nothing."""
    names = [entry.name for entry in fields(own) if entry.name not in ("overrides", "edges")]  # type: ignore[arg-type]
    changed = [name for name in names if getattr(own, name) != getattr(stage, name)]
    return ", ".join(f"{name}={getattr(own, name)}" for name in changed)


def _treatment(stage: Stage) -> str | int:
    return getattr(stage, "edges", "same")


def _edges(model: nn.Module, edges: Edges | None) -> Edges:
    return edge_layers(model) if edges is None else edges
