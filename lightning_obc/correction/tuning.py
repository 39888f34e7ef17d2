"""Global tuning: all layers' outputs brought nearer to the dense model's by a bounded run of Adam (the paper's gAP)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._pytree import tree_map

from lightning_obc.correction.channels import affine
from lightning_obc.correction.objective import LayerErrors, layer_errors
from lightning_obc.correction.passes import Forward, Progress, limited, quiet
from lightning_obc.correction.result import CorrectedLayer, CorrectionReport
from lightning_obc.errors import CalibrationError, LayerNotFoundError, NonFiniteError, PatternError, SpecError
from lightning_obc.layers import adapter_for, select_layers


def tune_global(
    model: nn.Module,
    dense_model: nn.Module,
    batches: Iterable[Any],
    *,
    layers: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    fixed: Collection[str] = (),
    masks: Mapping[str, Tensor] | None = None,
    lr: float = 1e-5,
    epochs: int = 100,
    patience: int = 5,
    held_out: float = 0.25,
    time_limit: float | None = None,
    batches_limit: int | None = None,
    forward: Forward | None = None,
    progress: Progress | None = None,
) -> CorrectionReport:
    """Tune the remaining weights of all layers together (paper, section 6: global AdaPrune).

    Minimises the mean over layers of ``‖y' - y‖² / ‖y‖²``, with ``y`` the layer's output in the dense model and ``y'``
    in the compressed one, whose inputs come from its own earlier layers. Adam, in evaluation mode; masks are applied
    again after each step. The last batches are held out: the weights with the least objective on *them* are kept, and
    the weights of the beginning are among the candidates, so the result is never worse there.

    Args:
        model: The compressed model; weights and biases of the layers change, in place.
        dense_model: The dense model; it stays as it is.
        batches: At least two batches; they are kept.
        layers: Entries as for :func:`~lightning_obc.layers.select_layers`; None means every supported layer.
        exclude: Entries of the same kinds to leave out.
        fixed: Names of layers whose weights stay, such as quantized ones that would leave their grid. Their outputs
            still count, and their biases are tuned.
        masks: bool ``[g, R, d]`` by layer name, True = kept, as in a ``LayerSolution``. None, and layers not in it:
            every weight that is zero now stays zero.
        lr: Adam's learning rate.
        epochs: Most passes over the batches that are not held out.
        patience: Epochs without an improvement on the held-out batches after which tuning stops.
        held_out: Share of the batches that is held out, at least one.
        time_limit: Seconds after which tuning stops, whatever the epoch.
        batches_limit: Most batches to use; None means all.
        forward: ``forward(model, batch)`` runs one batch; None means the model's own way.
        progress: Called as ``progress(description, completed, total)``.

    Returns:
        Per layer the held-out relative error before and after; ``objective`` is their mean.

    Raises:
        EmptyCalibrationError, CalibrationError: Fewer than two batches.
        LayerNotFoundError: Nothing to tune, or a layer that the dense model lacks.
        LayerNotReachedError: No batch passes through some layer.
        PatternError: A mask prunes weights that are not zero.
        ShapeError: A mask, or an output of the dense model, of another shape.
        NonFiniteError: The objective is NaN or Inf at the beginning. Nothing is changed by any of these errors.
    """
    chosen = select_layers(model, layers, exclude)
    parameters, skipped = _weights_and_biases(chosen, fixed)
    zeros = _zeros(chosen, {name for name in chosen if name not in fixed}, masks)
    options = Options(lr, epochs, patience, held_out, time_limit)
    kept = limited(batches, batches_limit)
    return _tune("global", model, dense_model, chosen, parameters, zeros, skipped, kept, options, forward, progress)


def tune_vectors(
    model: nn.Module,
    dense_model: nn.Module,
    batches: Iterable[Any],
    *,
    layers: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    lr: float = 1e-4,
    epochs: int = 100,
    patience: int = 5,
    held_out: float = 0.25,
    time_limit: float | None = None,
    batches_limit: int | None = None,
    forward: Forward | None = None,
    progress: Progress | None = None,
) -> CorrectionReport:
    """Tune every 1-D parameter (biases, norm layers) for the objective of :func:`tune_global`; weights stay.

    Safe for quantized models. Arguments, result and errors are those of :func:`tune_global`; ``layers`` says whose
    outputs count.
    """
    chosen = select_layers(model, layers, exclude)
    vectors = [p for p in model.parameters() if p.dim() == 1 and p.is_floating_point()]
    options = Options(lr, epochs, patience, held_out, time_limit)
    kept = limited(batches, batches_limit)
    return _tune("vectors", model, dense_model, chosen, vectors, [], {}, kept, options, forward, progress)


@dataclass(frozen=True)
class Options:
    """The bounds of a tuning run; see :func:`tune_global`."""

    lr: float
    epochs: int
    patience: int
    held_out: float
    time_limit: float | None

    def __post_init__(self) -> None:
        positive = {"lr": self.lr, "epochs": self.epochs, "patience": self.patience}
        bad = {name: value for name, value in positive.items() if not (math.isfinite(value) and value > 0)}
        if self.time_limit is not None and not self.time_limit > 0:
            bad["time_limit"] = self.time_limit
        if bad:
            raise SpecError("A bound of the tuning is not possible", got=bad, expected="positive numbers")
        if not 0 < self.held_out < 1:
            raise SpecError("held_out lies outside (0, 1)", got=self.held_out, expected="a share of the batches")

    def split(self, batches: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        """Batches to tune on, and batches held out."""
        if len(batches) < 2:
            raise CalibrationError(
                "Tuning needs batches to hold out",
                got=f"{len(batches)} batch",
                expected="at least two batches",
                remedy="use smaller batches",
            )
        count = min(max(round(self.held_out * len(batches)), 1), len(batches) - 1)
        return batches[:-count], batches[-count:]


def _weights_and_biases(layers: Mapping[str, nn.Module], fixed: Collection[str]) -> tuple[list[Tensor], dict[str, str]]:
    found: dict[int, Tensor] = {}
    skipped: dict[str, str] = {}
    for name, module in layers.items():
        adapter, bias = adapter_for(module), affine(module)[1]
        assert adapter is not None
        if name in fixed:
            skipped[name] = "its weights stay (only its bias is tuned)" if bias is not None else "its weights stay"
        elif is_parametrized(module, "weight"):
            skipped[name] = "its weight is computed by a parametrization"
        else:
            weight = adapter.weight(module)
            found[id(weight)] = weight
        if bias is not None:
            found[id(bias)] = bias
    return list(found.values()), skipped


def _zeros(
    layers: Mapping[str, nn.Module], tuned: Collection[str], masks: Mapping[str, Tensor] | None
) -> list[tuple[Tensor, Tensor]]:
    """Weights with the places that stay zero, both in the layout of the module."""
    result: list[tuple[Tensor, Tensor]] = []
    for name in tuned:
        module, adapter = layers[name], adapter_for(layers[name])
        assert adapter is not None
        if is_parametrized(module, "weight"):
            continue
        weight, mask = adapter.weight(module), (masks or {}).get(name)
        if mask is None:
            result.append((weight, weight.detach() == 0))
            continue
        adapter.check_matrix(module, mask)
        pruned = ~adapter.to_module_layout(module, mask.to(weight.device, torch.bool))
        if bool(weight.detach()[pruned].any()):
            raise PatternError(
                f"The mask of layer {name!r} prunes weights that are not zero",
                got=f"{int((weight.detach()[pruned] != 0).sum())} of them",
                expected="the mask of the compressed weights",
                remedy="pass the masks of the last solutions, or none to keep the zeros that are there",
            )
        result.append((weight, pruned))
    return result


def _tune(
    method: str,
    model: nn.Module,
    dense_model: nn.Module,
    layers: Mapping[str, nn.Module],
    parameters: Sequence[Tensor],
    zeros: Sequence[tuple[Tensor, Tensor]],
    skipped: dict[str, str],
    batches: Sequence[Any],
    options: Options,
    forward: Forward | None,
    progress: Progress | None,
) -> CorrectionReport:
    started = time.perf_counter()
    training, held_out = options.split(batches)
    if not parameters:
        raise LayerNotFoundError(
            "There is nothing to tune", got=f"{len(layers)} layers, all fixed", expected="at least one free parameter"
        )
    with torch.inference_mode(False), torch.enable_grad(), quiet(model), quiet(dense_model):
        training, held_out = tree_map(_usable, list(training)), tree_map(_usable, list(held_out))

        def errors(batch: Any) -> LayerErrors:
            return layer_errors(model, dense_model, layers, batch, forward)

        with _only(model, parameters):
            run = _Run(parameters, zeros, errors, options, progress)
            before, after, steps, note = run(training, held_out)
    rows = [
        CorrectedLayer(name, type(layers[name]).__name__, error, after.get(name), skipped.get(name, ""))
        for name, error in before.items()
    ]
    hidden = {name: "its output stays inside its module" for name in layers if name not in before}
    objective = (_mean(before), _mean(after))
    seconds = time.perf_counter() - started
    return CorrectionReport(method, rows, hidden, len(batches), seconds, objective, steps, (note,) if note else ())


def _usable(value: Any) -> Any:
    """Tensors that were made in inference mode cannot be saved for backward; their copies can."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def _mean(errors: Mapping[str, float]) -> float:
    return sum(errors.values()) / max(len(errors), 1)


@contextmanager
def _only(model: nn.Module, parameters: Sequence[Tensor]) -> Iterator[None]:
    """Gradients for these parameters alone; flags and gradients as before afterwards."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    try:
        for parameter, _, _ in before:
            parameter.requires_grad_(False)
            parameter.grad = None
        for tensor in parameters:
            tensor.requires_grad_(True)
        yield
    finally:
        for parameter, flag, gradient in before:
            parameter.requires_grad_(flag)
            parameter.grad = gradient


class _Run:
    """One run of Adam that keeps the best parameters on held-out batches."""

    def __init__(
        self,
        parameters: Sequence[Tensor],
        zeros: Sequence[tuple[Tensor, Tensor]],
        errors: Callable[[Any], LayerErrors],
        options: Options,
        progress: Progress | None,
    ) -> None:
        self.parameters, self.zeros, self.errors = list(parameters), zeros, errors
        self.options, self.progress = options, progress
        self.optimizer = torch.optim.Adam(self.parameters, lr=options.lr)
        self.best = [p.detach().clone() for p in self.parameters]
        self.steps = 0
        self.deadline = math.inf if options.time_limit is None else time.perf_counter() + options.time_limit

    def __call__(
        self, training: Sequence[Any], held_out: Sequence[Any]
    ) -> tuple[dict[str, float], dict[str, float], int, str]:
        """Held-out relative error of each layer before and after, the steps taken, and why it ended early."""
        before = self._judge(held_out)
        if not math.isfinite(_mean(before)):
            bad = [name for name, error in before.items() if not math.isfinite(error)]
            raise NonFiniteError(
                "Layer outputs hold NaN or Inf before tuning", got=f"layers {', '.join(bad)}", expected="finite outputs"
            )
        after, note = before, ""
        try:
            stale = 0
            for epoch in range(self.options.epochs):
                note = self._epoch(training, epoch, _mean(after))
                now = self._judge(held_out)
                # NaN compares false, so a diverged epoch never becomes the best one.
                if _mean(now) < _mean(after):
                    after, stale = now, 0
                    self.best = [p.detach().clone() for p in self.parameters]
                else:
                    stale += 1
                if note or stale >= self.options.patience:
                    note = note or f"no improvement on held-out batches in {stale} epochs, after epoch {epoch + 1}"
                    break
        finally:
            with torch.no_grad():
                for parameter, value in zip(self.parameters, self.best, strict=True):
                    parameter.copy_(value)
        return before, after, self.steps, note

    def _epoch(self, training: Sequence[Any], epoch: int, best: float) -> str:
        for index, batch in enumerate(training):
            if time.perf_counter() > self.deadline:
                return f"the time limit of {self.options.time_limit:g} s was reached in epoch {epoch + 1}"
            if self.progress is not None:
                done, total = epoch * len(training) + index, self.options.epochs * len(training)
                self.progress(f"tuning: held-out error {best:.4g}", done, total)
            loss = self.errors(batch).mean()
            if not bool(loss.isfinite()):
                return f"the objective was not finite in epoch {epoch + 1}"
            gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient
            self.optimizer.step()
            self._mask()
            self.steps += 1
        return ""

    @torch.no_grad()
    def _mask(self) -> None:
        for weight, pruned in self.zeros:
            weight.masked_fill_(pruned, 0.0)

    @torch.no_grad()
    def _judge(self, batches: Sequence[Any]) -> dict[str, float]:
        total: LayerErrors | None = None
        for batch in batches:
            errors = self.errors(batch)
            total = errors if total is None else total.plus(errors)
        assert total is not None
        return total.relative()
