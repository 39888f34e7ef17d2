"""Mean and standard deviation of every output channel of chosen layers, in the order of execution."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_obc.correction.channels import channels_by_values, observed
from lightning_obc.correction.norms import norm_layers
from lightning_obc.correction.passes import Forward, Progress, first_tensor, limited, quiet, run_batch
from lightning_obc.distributed import Ranks, SingleProcess, exchange
from lightning_obc.errors import LayerNotReachedError, NonFiniteError


@dataclass(frozen=True)
class ChannelMoments:
    """Moments of one layer's output over all samples and positions.

    Attributes:
        mean: ``[C]`` float64.
        std: ``[C]`` float64, of the population (divided by the number of values).
        values: Values per channel behind them.
        calls: Most calls of the layer in one batch.
    """

    mean: Tensor
    std: Tensor
    values: float
    calls: int = 1


@dataclass(frozen=True)
class NormStatistics:
    """Recorded output moments of layers, so that the dense model need not be kept.

    Attributes:
        channels: Moments by layer name, in the order in which the layers are first called.
        skipped: Layers that were not measured, with the reason.
    """

    channels: Mapping[str, ChannelMoments]
    skipped: Mapping[str, str] = field(default_factory=dict)


class _Enough(BaseException):
    """Ends a forward pass behind the last layer of interest; no handler of the model's must stop it."""


class _Observer:
    """Sums of one layer's output channels in float64. Their reduction over ranks is a sum."""

    def __init__(self, module: nn.Module, stop: bool) -> None:
        self.module, self.stop = module, stop
        self.sums: Tensor | None = None  # [3, C]: number of values, Σ y, Σ y²
        self.calls = self.most_calls = 0
        self.reason: str | None = None
        self._probing = False

    def hook(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._probing:
            return
        self.calls += 1
        self._probing = True
        try:
            tensor = first_tensor(output)
            rows = None if tensor is None else channels_by_values(module, tensor.detach(), args)
        finally:
            self._probing = False
        if rows is None:
            self.reason = f"where the channels of a {type(module).__name__} lie, or how to scale them, is not known"
        elif rows.shape[1]:
            self._add(rows if rows.dtype == torch.float64 else rows.float())
        if self.stop:
            raise _Enough

    def _add(self, rows: Tensor) -> None:
        # Two-pass moments of one call are accurate in the tensor's precision, unless squares underflow; only their sums
        # need float64.
        size = rows.abs().amax().clamp_min(torch.finfo(rows.dtype).tiny)
        variance, mean = (moment.double() for moment in torch.var_mean(rows / size, dim=1, correction=0))
        variance, mean = variance * size.double().square(), mean * size.double()
        count = torch.full_like(mean, rows.shape[1])
        sums = torch.stack([count, count * mean, count * (variance + mean.square())])
        self.sums = sums if self.sums is None else self.sums + sums

    def end_batch(self) -> None:
        self.most_calls, self.calls = max(self.most_calls, self.calls), 0

    def facts(self) -> tuple[int, int, str | None]:
        """Channels (0 where nothing was measured), most calls in a batch, and why nothing was measured."""
        return 0 if self.sums is None else self.sums.shape[1], self.most_calls, self.reason

    def sums_of(self, channels: int) -> Tensor:
        """A copy of the sums ``[3, channels]``, zeros where nothing was measured."""
        if self.sums is not None:
            return self.sums.clone()
        like = next(self.module.parameters(), torch.empty(0))
        return torch.zeros(3, channels, dtype=torch.float64, device=like.device)


def record_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    layers: Mapping[str, nn.Module] | None = None,
    batches_limit: int | None = None,
    forward: Forward | None = None,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
) -> NormStatistics:
    """Output mean and standard deviation of every norm layer, to be kept instead of the dense model.

    Nothing changes: the pass runs in evaluation mode without gradients, and puts everything back.

    Args:
        model: The dense model.
        batches: Batches, as for :func:`~lightning_obc.calibration.collect_hessians`.
        layers: Layers to measure, by name; None means every normalisation layer.
        batches_limit: Most batches to use; None means all.
        forward: ``forward(model, batch)`` runs one batch; None means the model's own way.
        progress: Called as ``progress(description, completed, total)``.
        ranks: Processes that share the batches; None for a single process.

    Raises:
        EmptyCalibrationError: There are no batches.
        LayerNotFoundError: The model has no normalisation layer.
        LayerNotReachedError: No batch passes through any of the layers.
        NonFiniteError: NaN or Inf in an output.
    """
    modules = norm_layers(model) if layers is None else dict(layers)
    kept = limited(batches, batches_limit, ranks)
    steps = _shown(kept, "recording statistics", progress)
    statistics = measure(model, modules, steps, forward=forward, ranks=ranks)
    if not statistics.channels:
        raise LayerNotReachedError(
            "No batch passed through any of the layers to be measured",
            got="; ".join(f"{name}: {reason}" for name, reason in statistics.skipped.items()),
            expected="layers that are called as modules in the forward pass",
            remedy="give the model a calibration_step that calls them",
        )
    return statistics


@torch.no_grad()
def measure(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    stop: bool = False,
    ranks: Ranks | None = None,
) -> NormStatistics:
    """Measure layers in one pass. With ``stop``, every forward pass ends at the first call of any of them.

    Raises:
        NonFiniteError: NaN or Inf in an output; the first layer in the order of execution is named.
    """
    targets = {name: observed(module) for name, module in modules.items()}
    observers = {name: _Observer(target, stop) for name, target in targets.items() if target is not None}
    hidden = {name: "its output stays inside its module" for name, target in targets.items() if target is None}
    order: dict[str, None] = {}
    with ExitStack() as stack:
        stack.enter_context(quiet(model))
        for name, observer in observers.items():
            stack.callback(observer.module.register_forward_hook(_noting(name, observer, order)).remove)
        for batch in batches:
            with suppress(_Enough):
                run_batch(model, batch, forward)
            for observer in observers.values():
                observer.end_batch()
    with torch.inference_mode(False):
        return _finished(observers, list(order), hidden, ranks or SingleProcess())


def _noting(name: str, observer: _Observer, order: dict[str, None]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        order.setdefault(name)
        observer.hook(module, args, output)

    return hook


def _finished(
    observers: Mapping[str, _Observer], order: Sequence[str], hidden: Mapping[str, str], ranks: Ranks
) -> NormStatistics:
    seen = exchange(ranks, {name: observers[name].facts() for name in order})
    channels: dict[str, ChannelMoments] = {}
    skipped = {**hidden, **dict.fromkeys(observers, "no batch passes through it")}
    # A layer that no batch of this rank reaches may be reached on another one.
    for name in dict.fromkeys(name for theirs in seen for name in theirs):
        facts = [theirs[name] for theirs in seen if name in theirs]
        size = max(size for size, _, _ in facts)
        if size == 0:
            skipped[name] = next((reason for _, _, reason in facts if reason), "its output is empty")
            continue
        del skipped[name]
        calls = max(calls for _, calls, _ in facts)
        channels[name] = _moments(ranks.sum_(observers[name].sums_of(size)), calls)
        if not bool(channels[name].std.isfinite().all()):
            raise NonFiniteError(
                f"The output of layer {name!r} is not finite",
                got="NaN or Inf in its channels' moments",
                expected="finite activations",
                remedy="check the data, and the layers before this one",
            )
    return NormStatistics(channels, skipped)


def _moments(sums: Tensor, calls: int) -> ChannelMoments:
    count, total, squares = sums.unbind()
    mean = total / count
    return ChannelMoments(mean, (squares / count - mean.square()).clamp_min(0).sqrt(), float(count[0]), calls)


def _shown(batches: Sequence[Any], description: str, progress: Progress | None) -> Iterator[Any]:
    for done, batch in enumerate(batches):
        if progress is not None:
            progress(description, done, len(batches))
        yield batch
    if progress is not None:
        progress(description, len(batches), len(batches))
