"""Batch-norm reset: running statistics of the compressed model, measured anew."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from lightning_obc.correction.norms import norm_layers
from lightning_obc.correction.passes import (
    Forward,
    Progress,
    count_batches,
    finite,
    quiet,
    run_batch,
    shared,
)
from lightning_obc.correction.result import CorrectedLayer, CorrectionReport
from lightning_obc.distributed import Ranks, exchange, is_sharded
from lightning_obc.errors import CalibrationError, LayerNotFoundError, LayerNotReachedError, NonFiniteError, SpecError


def reset_batch_norm(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    batches_limit: int | None = 100,
    momentum: float | None = None,
    layers: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    forward: Forward | None = None,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
) -> CorrectionReport:
    """Measure the running statistics of batch-norm layers anew, in place (paper, section 6: "batchnorm reset").

    Only these layers go to train mode, so that each normalises by the batch and the layers behind it see what they
    would in training. Dropout stays off; modes, other buffers and random states are afterwards as before. Batch-norm
    and instance-norm layers that track running statistics take part. Works in inference mode.

    Args:
        model: The compressed model; only ``running_mean``, ``running_var`` and ``num_batches_tracked`` change.
        batches: Batches; one pass over them. Every batch should be as large as in training.
        batches_limit: Most batches to use; None means a full pass.
        momentum: None averages over all batches, each weighted by its values per channel, which is exact. A number is
            the weight of the newest batch, after a start from mean 0 and variance 1; the released code uses 0.1 and 100
            batches, and needs about that many to forget its start.
        layers: Names, globs, types or containers of norm layers; None means all.
        exclude: Entries of the same kinds to leave out.
        forward: ``forward(model, batch)`` runs one batch; None means the model's own way.
        progress: Called as ``progress(description, completed, total)``.
        ranks: Processes that share the batches, or all run all of them (with a momentum, or when the model's parameters
            are sharded); None for a single process.

    Raises:
        EmptyCalibrationError: There are no batches.
        CalibrationError: A batch has a single value per channel somewhere.
        LayerNotFoundError: The model has no batch-norm layer with running statistics.
        LayerNotReachedError: No batch passes through any batch-norm layer.
        NonFiniteError: The new statistics hold NaN or Inf. Nothing is changed by any of these errors.
    """
    if momentum is not None and not 0 < momentum <= 1:
        raise SpecError("A momentum is not possible", got=momentum, expected="a number in (0, 1], or None")
    started = time.perf_counter()
    norms, skipped = tracking_layers(norm_layers(model, layers, exclude))
    done, measured = 0, {}
    # A moving average depends on the order of the batches, and the parts of a sharded model run the same ones.
    alone = momentum is not None or any(map(is_sharded, model.parameters()))
    sharing = None if alone else ranks
    total = -(-count_batches(batches, batches_limit) // (1 if sharing is None else sharing.size))
    with torch.no_grad(), quiet(model), _training(norms, momentum) as counts:
        for done, batch in enumerate(shared(batches, batches_limit, sharing), start=1):
            if progress is not None:
                progress("resetting batch-norm", done - 1, max(total, done))
            run_batch(model, batch, forward)
        # Leaving the context puts every buffer back, so the new values must be taken out first.
        measured = {name: _statistics(norms[name]) for name in counts}
    if sharing is not None:
        done = sum(exchange(sharing, done))
        measured = _averaged(norms, measured, counts, sharing)
    elif ranks is not None:
        exchange(ranks)
        measured = {
            name: (ranks.broadcast_(mean, 0), ranks.broadcast_(variance, 0), batches_)
            for name, (mean, variance, batches_) in measured.items()
        }
    skipped |= {name: "no batch passes through it" for name in norms if name not in measured}
    _check(measured, skipped)
    rows = [_write_(name, norms[name], *measured[name]) for name in measured]
    if progress is not None:
        progress("resetting batch-norm", done, done)
    return CorrectionReport("batch_norm", rows, skipped, done, time.perf_counter() - started)


def tracking_layers(norms: Mapping[str, nn.Module]) -> tuple[dict[str, _NormBase], dict[str, str]]:
    """Of norm layers by name: those that track running statistics, and why a batch-norm layer is none of them.

    Raises:
        LayerNotFoundError: There is none.
    """
    kept: dict[str, _NormBase] = {}
    skipped: dict[str, str] = {}
    for name, module in norms.items():
        if isinstance(module, _NormBase) and module.running_mean is not None and module.track_running_stats:
            kept[name] = module
        elif isinstance(module, _NormBase) or "batchnorm" in type(module).__name__.lower():
            skipped[name] = "it tracks no running statistics"
    if not kept:
        raise LayerNotFoundError(
            "There is no batch-norm layer to reset",
            got=f"{len(norms)} normalisation layers, none with running statistics that training updates",
            expected="at least one batch-norm layer that tracks running statistics",
            remedy='use method="statistics" for layer-norm networks',
        )
    return kept, skipped


@contextmanager
def _training(norms: Mapping[str, _NormBase], momentum: float | None) -> Iterator[dict[str, int]]:
    """Train mode with fresh statistics for these layers alone. Yields their values per channel, as they are reached."""
    counts: dict[str, int] = {}
    own = {name: module.momentum for name, module in norms.items()}
    with ExitStack() as stack:
        for name, module in norms.items():
            module.training = True
            module.reset_running_stats()
            if isinstance(module, nn.SyncBatchNorm):
                # Ranks need not run as many batches as each other, so none may wait for another in the middle of one.
                module.forward = partial(_BatchNorm.forward, module)  # type: ignore[method-assign]
                stack.callback(module.__dict__.pop, "forward")
            stack.callback(module.register_forward_pre_hook(_weighing(name, counts, momentum)).remove)
        try:
            yield counts
        finally:
            for name, module in norms.items():
                module.momentum = own[name]


def _weighing(name: str, counts: dict[str, int], momentum: float | None) -> Any:
    """A hook that sets the momentum with which one call joins the average of all calls so far."""

    def hook(module: _NormBase, args: tuple[Any, ...]) -> None:
        x = args[0]
        values = x.numel() // module.num_features
        if values == 1:
            raise CalibrationError(
                f"Batch-norm layer {name!r} gets a single value per channel",
                got=f"an input of shape {tuple(x.shape)}",
                expected="at least two values per channel in every batch",
                remedy="use larger batches, and drop a last batch of one sample",
            )
        counts[name] = counts.get(name, 0) + values
        module.momentum = values / max(counts[name], 1) if momentum is None else momentum

    return hook


def _statistics(module: _NormBase) -> tuple[Tensor, Tensor, Tensor]:
    mean, variance, batches = module.running_mean, module.running_var, module.num_batches_tracked
    assert mean is not None
    assert variance is not None
    assert batches is not None
    return mean.clone(), variance.clone(), batches.clone()


_Statistics = tuple[Tensor, Tensor, Tensor]


def _averaged(
    norms: Mapping[str, _NormBase], measured: Mapping[str, _Statistics], counts: Mapping[str, int], ranks: Ranks
) -> dict[str, _Statistics]:
    """Averages over the batches of all ranks; a layer may be reached on some of them only."""
    reached = {name for theirs in exchange(ranks, list(measured)) for name in theirs}
    averages: dict[str, _Statistics] = {}
    for name in (name for name in norms if name in reached):
        mean, variance, batches = measured.get(name) or _statistics(norms[name])
        count = torch.full_like(mean, counts.get(name, 0), dtype=torch.float64)
        tracked = torch.full_like(count, float(batches) if name in measured else 0.0)
        rows = torch.stack([mean.double() * count, variance.double() * count, count, tracked])
        mean_sum, variance_sum, total, calls = ranks.sum_(rows).unbind()
        averages[name] = (mean_sum / total, variance_sum / total, calls[0].to(batches.dtype))
    return averages


def _check(measured: Mapping[str, tuple[Tensor, Tensor, Tensor]], skipped: Mapping[str, str]) -> None:
    if not measured:
        raise LayerNotReachedError(
            "No batch passed through any batch-norm layer",
            got=", ".join(skipped),
            expected="batch-norm layers that are called as modules in the forward pass",
            remedy="give the model a calibration_step that calls them",
        )
    if not finite(value for mean, variance, _ in measured.values() for value in (mean, variance)):
        bad = [name for name, (mean, variance, _) in measured.items() if not finite((mean, variance))]
        raise NonFiniteError(
            "New batch-norm statistics hold NaN or Inf",
            got=f"layers {', '.join(bad)}",
            expected="finite activations",
            remedy="check the data, and the layers before the first of these",
        )


@torch.no_grad()
def _write_(name: str, module: _NormBase, mean: Tensor, variance: Tensor, batches: Tensor) -> CorrectedLayer:
    old_mean, old_variance, tracked = module.running_mean, module.running_var, module.num_batches_tracked
    assert old_mean is not None
    assert old_variance is not None
    assert tracked is not None
    std, old_std = variance.double().sqrt(), old_variance.double().sqrt()
    moved = (mean.double() - old_mean.double()).square().sum() + (std - old_std).square().sum()
    before = float((moved / std.square().sum().clamp_min(1e-300)).sqrt())
    old_mean.copy_(mean)
    old_variance.copy_(variance)
    tracked.copy_(batches)
    return CorrectedLayer(name, type(module).__name__, before)
