"""One or more passes over the calibration batches, with hooks that gather the Hessian of every layer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from lightning_obc.calibration.batches import batch_size_of, call_forward, calling, to_device, token_mask_of
from lightning_obc.calibration.inputs import LayerInputs, looked_up
from lightning_obc.calibration.isolation import eager_forward as eager_forward
from lightning_obc.calibration.isolation import traceless
from lightning_obc.calibration.isolation import undisturbed as undisturbed
from lightning_obc.calibration.offload import Offload, staying
from lightning_obc.calibration.replay import Replay
from lightning_obc.calibration.source import no_batches, numbered_part
from lightning_obc.calibration.statistic import HessianAccumulator
from lightning_obc.distributed import Ranks, SingleProcess, all_or_none, exchange, is_sharded
from lightning_obc.errors import CalibrationError, LayerNotReachedError, OBCError
from lightning_obc.hessian import Hessian

Forward = Callable[[nn.Module, Any], Any]
Progress = Callable[[str, float, float], None]
_OWN_FORWARD = ("forward= got model and batch", "a function of model and batch that runs the model")
Accumulator = TypeVar("Accumulator", bound=HessianAccumulator)


def collect_hessians(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    rounds: int = 1,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
    on_host: Collection[str] = (),
    ranks: Ranks | None = None,
    owners: Mapping[str, int] | None = None,
    positions: int | None = None,
    seed: int = 0,
    offload: Offload | None = None,
    replay: Replay | None = None,
) -> dict[str, Hessian]:
    """Hessians ``2 X Xᵀ / n`` of layers, from the inputs that calibration batches give them (paper, section 3).

    Modules that share a weight with a selected layer add their inputs to that layer's statistic; so does
    ``F.linear`` on the weight of a layer that is not called as a module. When a batch is a mapping with an
    ``attention_mask`` of shape ``[samples, tokens]``, padded tokens add nothing to linear layers.

    The pass leaves no trace: train modes, buffers (batch-norm statistics), random states and hooks are afterwards what
    they were. It works in inference mode, and sees through compiled modules.

    Args:
        model: The model; it runs in evaluation mode, without gradients.
        layers: Layers by name, as :func:`~lightning_obc.layers.select_layers` returns them.
        batches: Re-iterable when ``rounds`` is more than one. Its ``set_round(k)``, when it has one, is called
            before each round.
        forward: ``forward(model, batch)`` runs one batch; None means
            :func:`~lightning_obc.calibration.batches.call_forward`.
        rounds: Passes over the batches; every pass counts its samples.
        device: Batches are moved there. None means the model's device, or no move at all with a ``forward`` of
            one's own.
        progress: Called as ``progress(description, batches done, batches in all)`` after every batch; 0 in all when
            the number is not known.
        on_host: Names of the layers whose sums live in host memory, and are brought to the device for every update.
        ranks: Processes that share the batches; all of them call this function with the same arguments. Where the
            model's parameters are sharded, ranks without a batch of their own run one for the others, uncounted.
        owners: The rank that gets the statistic of a layer, by its name; None gives all statistics to all ranks.
        positions: Positions (of a feature map, or tokens) of every sample that are used in one call of a layer, at
            most, drawn at random; the statistic is then an unbiased estimate. None uses all.
        seed: Seed of these draws.
        offload: What brings the model's blocks to another device, which then holds the statistics.
        replay: Spares the batches the blocks that are finished.

    Returns:
        One statistic per layer that this rank owns, on the device of the layer's weight, or in host memory. ``samples``
        is the same for all layers, up to the split into halves.

    Raises:
        EmptyCalibrationError: There are no batches.
        CalibrationError: A later round yields nothing, because the batches can be iterated only once.
        LayerNotReachedError: No batch passed through some layer.
        NonFiniteError: NaN or Inf in the input of a layer.
    """
    run, lookups = batch_runner(model, forward, device, offload), looked_up(model, layers)
    drawing: dict[str, Any] = {"positions": positions, "seed": seed}
    if offload is not None:
        drawing["device"] = offload.device
    gathering = Gathering(
        {
            name: HessianAccumulator(module, name=name, lookup=name in lookups, on_host=name in on_host, **drawing)
            for name, module in layers.items()
        },
        ranks,
    )
    gathering.in_step = any(map(is_sharded, model.parameters()))
    inputs = LayerInputs(layers, gathering.update)
    with all_or_none(gathering.ranks), traceless(model), inputs.watched(model), staying(offload, layers):
        for done, batch in enumerate(gathering.numbered(batches, rounds), start=1):
            spared = nullcontext() if replay is None else replay.running("before", done, list(layers))
            with spared, inputs.one_batch():
                run(batch)
            gathering.check_finite()
            if progress is not None:
                progress("calibration", done, gathering.count(batches, rounds))
    gathering.reduce_(owners)
    # One layer after the other is released, so that all layers never exist twice.
    return {name: gathering.statistics.pop(name).release() for name in gathering.own(owners)}


def batch_runner(
    model: nn.Module,
    forward: Forward | None,
    device: torch.device | str | None = None,
    offload: Offload | None = None,
) -> Callable[[Any], Any]:
    """A function that sends one batch through the model, as :func:`collect_hessians` describes."""
    target = torch.device(device) if device is not None else None if forward else _device_of(model)
    run = forward or call_forward

    def run_one(batch: Any) -> Any:
        # call_forward names its own errors.
        with nullcontext() if offload is None else offload.one_batch(), calling(model, batch, *_OWN_FORWARD):
            return run(model, batch if target is None else to_device(batch, target))

    return run_one


class Gathering(Generic[Accumulator]):
    """The statistics of all layers while batches go through the model, each rank's share of them on that rank."""

    def __init__(
        self,
        statistics: dict[str, Accumulator],
        ranks: Ranks | None = None,
        unfit: dict[str, OBCError] | None = None,
    ) -> None:
        self.statistics, self.unfit = statistics, unfit
        self.ranks = ranks or SingleProcess()
        self.reached: set[str] = set()
        # All ranks run as many batches, as the parts of a sharded model have to; and this one is not counted.
        self.in_step = self.idle = False

    def update(self, name: str, module: nn.Module, x: Tensor) -> None:
        if self.idle:
            return
        self.reached.add(name)
        self.statistics[name].update(x, module)

    def numbered(self, batches: Iterable[Any], rounds: int) -> Iterator[Any]:
        """This rank's batches of all rounds, counted in every statistic before they are handed out."""
        rank, size = self.ranks.rank, self.ranks.size
        for current in range(rounds):
            if hasattr(batches, "set_round"):
                batches.set_round(current)
            samples = index = 0
            last: Any = None
            for found in numbered_part(batches, rank, size):
                samples, index = samples + found.size, found.index
                if found.index % size != rank:
                    continue
                last, mask, count = found.batch, token_mask_of(found.batch), batch_size_of(found.batch)
                for statistic in self.statistics.values():
                    statistic.begin_batch(count, start=found.start, batch_index=found.index, token_mask=mask)
                yield found.batch
            if samples == 0:
                raise _nothing(current, batches)
            if self.in_step and index % size < rank:
                self.idle = True
                yield next(iter(batches)) if last is None else last
                self.idle = False
        if hasattr(batches, "set_round"):
            batches.set_round(0)

    def check_finite(self) -> None:
        """One synchronisation per batch; the layers are asked one by one only when something is wrong."""
        flags = [statistic.finite() for statistic in self.statistics.values()]
        if flags and not torch.stack([flag.to(flags[0].device) for flag in flags]).all():
            for statistic in self.statistics.values():
                statistic.raise_if_not_finite()

    def count(self, batches: Iterable[Any], rounds: int) -> int:
        """This rank's batches of all rounds, or 0 when that is not known."""
        return -(-count_batches(batches, 1) // self.ranks.size) * rounds

    def own(self, owners: Mapping[str, int] | None) -> list[str]:
        """Names of the layers whose statistics this rank gets."""
        return [name for name in self.statistics if owners is None or owners[name] == self.ranks.rank]

    def reduce_(self, owners: Mapping[str, int] | None) -> None:
        """Add up the shares of all ranks, and forget the statistics of layers that others own.

        Raises:
            LayerNotReachedError: No batch of any rank passed through some layer.
        """
        samples = {name: statistic.samples for name, statistic in self.statistics.items()}
        found = exchange(self.ranks, (sorted(self.reached), samples, self.unfit))
        for name, error in [entry for _, _, unfit in found for entry in (unfit or {}).items()]:
            # Unfit on one rank is unfit on all.
            if self.unfit is not None and name in self.statistics:
                self.unfit[name] = error
                del self.statistics[name]
        self.reached = {name for reached, _, _ in found for name in reached}
        self.check_reached()
        for name, statistic in list(self.statistics.items()) if self.ranks.size > 1 else []:
            owner = None if owners is None else owners[name]
            for sums in statistic.all_sums():
                self.ranks.sum_(sums) if owner is None else self.ranks.sum_to_(sums, owner)
            statistic.samples = [sum(counts[name][half] for _, counts, _ in found) for half in (0, 1)]
            if owner not in (None, self.ranks.rank):
                del self.statistics[name]

    def check_reached(self) -> None:
        missing = [name for name in self.statistics if name not in self.reached]
        if missing:
            raise not_reached(missing)


def not_reached(names: Sequence[str]) -> LayerNotReachedError:
    """The error of layers that no batch passes through."""
    return LayerNotReachedError(
        "No calibration batch passed through some of the layers",
        got=", ".join(names),
        expected="every selected layer to be called in the forward pass",
        remedy="exclude them, or give the model a calibration_step that calls them",
    )


def _nothing(current: int, batches: Iterable[Any]) -> CalibrationError:
    if current == 0:
        return no_batches(batches)
    return CalibrationError(
        "The calibration data can be iterated only once",
        got=f"no batch in round {current + 1}",
        expected="the same batches in every round",
        remedy="pass a list or a DataLoader instead of an iterator, or use rounds=1",
    )


def count_batches(batches: Iterable[Any], rounds: int) -> int:
    """Batches of all rounds, or 0 when that is not known."""
    try:
        return len(batches) * rounds  # type: ignore[arg-type]
    except TypeError:
        return 0


def _device_of(model: nn.Module) -> torch.device | None:
    parameter = next(model.parameters(), None)
    return None if parameter is None else parameter.device
