"""Statistics and bias correction: output moments of layers brought back to the dense model's, one layer after another.

Symbols: ``μ, σ`` mean and standard deviation of an output channel in the compressed model, ``μ*, σ*`` in the dense one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_obc.correction.channels import affine
from lightning_obc.correction.moments import ChannelMoments, NormStatistics, measure
from lightning_obc.correction.norms import norm_layers
from lightning_obc.correction.passes import Forward, Progress, limited
from lightning_obc.correction.result import CorrectedLayer, CorrectionReport
from lightning_obc.distributed import Ranks
from lightning_obc.errors import LayerNotReachedError, ShapeError, SpecError
from lightning_obc.layers import select_layers

# Changes one layer in place so that its output moments move from the second towards the first; returns a note.
_Correct = Callable[[nn.Module, ChannelMoments, ChannelMoments], str]


def correct_statistics(
    model: nn.Module,
    dense: nn.Module | NormStatistics,
    batches: Iterable[Any],
    *,
    batches_limit: int | None = None,
    max_ratio: float = 10.0,
    layers: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    forward: Forward | None = None,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
) -> CorrectionReport:
    """Match mean and standard deviation of every norm layer's output channels to the dense model's (paper, section 6).

    Layer after layer in the order of execution, each measured with the earlier ones already corrected. The correction
    ``y ↦ (y - μ) σ*/σ + μ*`` is folded into the layer's scale and shift, so the state dict carries it. One pass per
    layer, each only up to that layer. Works for every norm layer with an affine output, batch-norm in evaluation mode.

    Args:
        model: The compressed model; only scales and shifts of its norm layers change, in place.
        dense: The dense model, or what :func:`record_statistics` recorded of it.
        batches: Batches; they are kept, as every pass needs the same ones. Best those that ``dense`` was recorded on.
        batches_limit: Most batches to use; None means all. The released code uses one.
        max_ratio: Channels are scaled by no more than this, and no less than its inverse. Channels without any
            variance, in either model, are shifted only.
        layers: Names, globs, types or containers of norm layers; None means all.
        exclude: Entries of the same kinds to leave out.
        forward: ``forward(model, batch)`` runs one batch; None means the model's own way.
        progress: Called as ``progress(description, completed, total)``.
        ranks: Processes that share the batches; None for a single process.

    Returns:
        One row per corrected layer; layers without affine parameters are in ``skipped``.

    Raises:
        EmptyCalibrationError, LayerNotFoundError, LayerNotReachedError, NonFiniteError: The model is as before then.
        ShapeError: The recorded statistics belong to another model.
    """
    if not max_ratio >= 1:
        raise SpecError("max_ratio is too small", got=max_ratio, expected="a number of at least 1")
    norms = norm_layers(model, layers, exclude)

    def correct(module: nn.Module, target: ChannelMoments, now: ChannelMoments) -> str:
        return _fold_(module, target, now, max_ratio)

    kept = limited(batches, batches_limit, ranks)
    if isinstance(dense, nn.Module):
        dense_norms = norm_layers(dense, layers, exclude)
        dense = measure(dense, dense_norms, kept, forward=forward, ranks=ranks)
    run = _Sequential(model, dense, kept, forward, progress, ranks)
    return run("statistics", norms, correct, {name: _why_not_scaled(module) for name, module in norms.items()})


def correct_bias(
    model: nn.Module,
    dense: nn.Module | NormStatistics,
    batches: Iterable[Any],
    *,
    batches_limit: int | None = None,
    layers: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    forward: Forward | None = None,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
) -> CorrectionReport:
    """Remove the mean shift of the compressed layers' outputs through their biases: ``b ↦ b + μ* - μ``.

    Layer after layer in the order of execution, each measured with the earlier ones already corrected.

    Args:
        model: The compressed model; only biases change, in place.
        dense: The dense model, or what ``record_statistics(dense, batches, layers=select_layers(dense, layers))``
            recorded of it.
        batches: Batches; they are kept, as every pass needs the same ones. Best those that ``dense`` was recorded on.
        batches_limit: Most batches to use; None means all.
        layers: Entries as for :func:`~lightning_obc.layers.select_layers`; None means every supported layer.
        exclude: Entries of the same kinds to leave out.
        forward: ``forward(model, batch)`` runs one batch; None means the model's own way.
        progress: Called as ``progress(description, completed, total)``.
        ranks: Processes that share the batches; None for a single process.

    Returns:
        One row per corrected layer; layers without a bias, or whose output cannot be observed, are in ``skipped``.

    Raises:
        EmptyCalibrationError, LayerNotFoundError, LayerNotReachedError, NonFiniteError: The model is as before then.
        ShapeError: The recorded statistics belong to another model.
    """
    chosen = select_layers(model, layers, exclude)
    kept = limited(batches, batches_limit, ranks)
    if isinstance(dense, nn.Module):
        dense_layers = select_layers(dense, layers, exclude)
        dense = measure(dense, dense_layers, kept, forward=forward, ranks=ranks)
    run = _Sequential(model, dense, kept, forward, progress, ranks)
    reasons = {name: None if affine(module)[1] is not None else "it has no bias" for name, module in chosen.items()}
    return run("bias", chosen, _shift_, reasons)


class _Sequential:
    """Measures and corrects layers one by one; puts everything back after an error."""

    def __init__(
        self,
        model: nn.Module,
        dense: NormStatistics,
        batches: Sequence[Any],
        forward: Forward | None,
        progress: Progress | None,
        ranks: Ranks | None,
    ) -> None:
        self.model, self.dense, self.batches = model, dense, batches
        self.forward, self.progress, self.ranks = forward, progress, ranks

    def __call__(
        self, method: str, layers: Mapping[str, nn.Module], correct: _Correct, reasons: Mapping[str, str | None]
    ) -> CorrectionReport:
        started = time.perf_counter()
        skipped = {name: reason for name, reason in reasons.items() if reason is not None}
        todo = self._in_order({name: module for name, module in layers.items() if name not in skipped}, skipped)
        saved = [(tensor, tensor.detach().clone()) for m in todo.values() for tensor in affine(m) if tensor is not None]
        try:
            rows = self._correct_all(method, todo, correct, skipped)
        except BaseException:
            with torch.no_grad():
                for tensor, value in saved:
                    tensor.copy_(value)
            raise
        return CorrectionReport(method, rows, skipped, len(self.batches), time.perf_counter() - started)

    def _in_order(self, layers: Mapping[str, nn.Module], skipped: dict[str, str]) -> dict[str, nn.Module]:
        """The layers that the dense statistics know, in the dense model's order of execution."""
        for name, module in layers.items():
            if name not in self.dense.channels:
                skipped[name] = self.dense.skipped.get(name, "the dense statistics do not contain it")
                continue
            expected, got = _channels(module), self.dense.channels[name].mean.numel()
            if expected != got:
                raise ShapeError(
                    "The dense statistics belong to another model",
                    got=f"layer {name!r} with {got} channels",
                    expected=f"{expected} channels",
                    remedy="record them on the dense model of the same architecture",
                )
        todo = {name: layers[name] for name in self.dense.channels if name in layers}
        if layers and not todo:
            raise LayerNotReachedError(
                "None of the layers to correct has dense statistics",
                got="; ".join(f"{name}: {reason}" for name, reason in skipped.items()),
                expected="statistics of at least one of them",
                remedy="record them with the same layers, on batches that pass through them",
            )
        return todo

    def _correct_all(
        self, method: str, todo: Mapping[str, nn.Module], correct: _Correct, skipped: dict[str, str]
    ) -> list[CorrectedLayer]:
        before: dict[str, float] = {}
        notes: dict[str, str] = {}
        first = self._measure(todo)
        for done, (name, module) in enumerate(todo.items()):
            if self.progress is not None:
                self.progress(f"correcting {method}: {name}", done, len(todo))
            target = self.dense.channels[name]
            # Nothing has changed yet at the first layer, so its moments are known already.
            now = (first if done == 0 else self._measure({name: module}, stop=target.calls == 1)).channels.get(name)
            if now is None or name not in first.channels:
                skipped[name] = first.skipped.get(name, "no batch passes through it")
                continue
            before[name] = distance(target, first.channels[name], method == "statistics")
            notes[name] = correct(module, target, now)
        if self.progress is not None:
            self.progress(f"correcting {method}", len(todo), len(todo))
        last = self._measure({name: todo[name] for name in before})
        return [
            CorrectedLayer(
                name,
                type(todo[name]).__name__,
                before[name],
                distance(self.dense.channels[name], last.channels[name], method == "statistics"),
                notes[name],
            )
            for name in before
        ]

    def _measure(self, layers: Mapping[str, nn.Module], stop: bool = False) -> NormStatistics:
        return measure(self.model, layers, self.batches, forward=self.forward, stop=stop, ranks=self.ranks)


def distance(target: ChannelMoments, now: ChannelMoments, with_std: bool = True) -> float:
    """Root mean square difference of means (and standard deviations) over the root mean square of ``σ*``."""
    moved = (now.mean - target.mean).square().sum()
    if with_std:
        moved = moved + (now.std - target.std).square().sum()
    return float((moved / target.std.square().sum().clamp_min(1e-300)).sqrt())


def _why_not_scaled(module: nn.Module) -> str | None:
    return "it has no affine parameters" if affine(module)[0] is None else None


def _channels(module: nn.Module) -> int:
    weight, bias = affine(module)
    vector = bias if bias is not None else weight
    return 0 if vector is None else vector.numel()


@torch.no_grad()
def _fold_(module: nn.Module, target: ChannelMoments, now: ChannelMoments, max_ratio: float) -> str:
    weight, bias = affine(module)
    assert weight is not None
    ratio, still, clipped = _ratio(target, now, max_ratio)
    notes = [f"{still} channels without variance are shifted only"] if still else []
    if clipped:
        notes.append(f"the scaling of {clipped} channels is limited to {max_ratio:g}")
    weight.mul_(ratio.view_as(weight).to(weight.dtype))
    if bias is None:
        notes.append("no shift to correct the mean with")
    else:
        mean, target_mean = now.mean.view_as(bias), target.mean.view_as(bias)
        bias.copy_((bias.double() - mean) * ratio.view_as(bias) + target_mean)
    return "; ".join(notes)


def _ratio(target: ChannelMoments, now: ChannelMoments, max_ratio: float) -> tuple[Tensor, int, int]:
    """``σ*/σ`` within its limits, how many channels have no variance, and how many were limited."""
    # Below this, a standard deviation is rounding noise of float32 activations of that size.
    floor = 1e-6 * torch.maximum(now.mean.abs(), target.mean.abs()) + 1e-9 * target.std.square().mean().sqrt()
    still = (now.std <= floor) | (target.std <= floor)
    ratio = torch.where(still, 1.0, target.std / now.std.clamp_min(1e-300))
    limited_ratio = ratio.clamp(1 / max_ratio, max_ratio)
    return limited_ratio, int(still.sum()), int((ratio != limited_ratio).sum())


@torch.no_grad()
def _shift_(module: nn.Module, target: ChannelMoments, now: ChannelMoments) -> str:
    bias = affine(module)[1]
    assert bias is not None
    bias.copy_(bias.double() + (target.mean - now.mean))
    return ""
