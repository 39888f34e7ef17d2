"""Statistics of layers behind compressed layers, beside what they saw before: both from the same batches."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_obc.calibration.collect import Forward, Gathering, Progress, batch_runner
from lightning_obc.calibration.dense import DenseWeights
from lightning_obc.calibration.inputs import LayerInputs, looked_up
from lightning_obc.calibration.isolation import traceless
from lightning_obc.calibration.offload import Offload, staying
from lightning_obc.calibration.replay import Replay
from lightning_obc.calibration.rng import preserved_rng
from lightning_obc.calibration.statistic import HessianAccumulator
from lightning_obc.distributed import Ranks, all_or_none
from lightning_obc.errors import LayerNotReachedError, OBCError, ShapeError, UnsupportedLayerError
from lightning_obc.hessian import PairedHessian
from lightning_obc.kernels.hessian_update import symmetrise_
from lightning_obc.layers import LayerAdapter, adapter_for


class PairedAccumulator(HessianAccumulator):
    """Also the float64 sums ``Σ (x - x') x'ᵀ`` and ``Σ (x - x') (x - x')ᵀ`` over all samples, ``[g, d, d]`` each.

    ``x'`` are the inputs behind compressed layers, which the halves of the statistic hold; ``x`` those before.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        name: str = "",
        device: torch.device | str | None = None,
        lookup: bool = False,
        on_host: bool = False,
    ) -> None:
        super().__init__(module, name=name, device=device, lookup=lookup, on_host=on_host)
        with torch.inference_mode(False):
            self.cross, self.difference = (
                torch.zeros_like(self.sums[0], pin_memory=self.sums.is_pinned()) for _ in range(2)
            )

    @torch.no_grad()
    def update_pair(self, before: Tensor, x: Tensor, module: nn.Module | None = None) -> None:
        """Add the inputs of one call of the layer before and behind compressed layers.

        Raises:
            ShapeError: They differ in shape.
            UnsupportedLayerError: As :meth:`update`, or the adapter cannot compare inputs.
        """
        if before.shape != x.shape:
            raise ShapeError(
                f"Layer {self.name!r} has an input of another shape than before the compression",
                got=tuple(x.shape),
                expected=str(tuple(before.shape)),
                remedy="exclude layers whose inputs are chosen by earlier outputs, such as experts or heads behind "
                'proposals, or use Calibration(mode="independent")',
            )
        module = self._module if module is None else module
        x, before = self._at_sums(x), self._at_sums(before)
        self.update(x, module)
        adapter = self._adapter_of(module)
        if adapter.lookup:
            self._check_same(before, x)
            return
        x, before = self._without_padding(x, module), self._without_padding(before, module)
        x = x if x.dtype == torch.float64 else x.float()
        change = before.to(x.dtype) - x
        with self._on_device(self.difference, x) as difference:
            adapter.accumulate_(module, difference, change)
        with self._on_device(self.cross, x) as cross:
            adapter.accumulate_cross_(module, cross, change, x)

    def _check_same(self, before: Tensor, x: Tensor) -> None:
        if not torch.equal(before, x):
            raise UnsupportedLayerError(
                f"Layer {self.name!r} looks up other rows than before the compression",
                got="indices that depend on earlier layers",
                expected="the same indices for the same batch",
                remedy='exclude the layer, or use Calibration(mode="independent")',
            )

    def all_sums(self) -> list[Tensor]:
        return [*super().all_sums(), self.cross, self.difference]

    def finite(self) -> Tensor:
        return super().finite() & self.difference.diagonal(dim1=-2, dim2=-1).isfinite().all()

    def release_pair(self) -> PairedHessian:
        """The statistic without copies of the sums; the accumulator must not be used afterwards.

        Raises:
            NonFiniteError: NaN or Inf has come in.
        """
        hessian, scale = self.release(), 2.0 / max(sum(self.samples), 1)
        with torch.inference_mode(False):
            return PairedHessian(hessian, self.cross.mul_(scale), symmetrise_(self.difference).mul_(scale))


def check_comparable(module: nn.Module) -> None:
    """Raise UnsupportedLayerError when the adapter of a layer cannot compare inputs before and after compression."""
    adapter = adapter_for(module)
    if adapter is not None and type(adapter).accumulate_cross_ is LayerAdapter.accumulate_cross_:
        empty = torch.zeros(0)
        adapter.accumulate_cross_(module, empty, empty, empty)


def collect_paired(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Any],
    dense: DenseWeights,
    *,
    forward: Forward | None = None,
    rounds: int = 1,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
    replay: Replay | None = None,
    on_host: Collection[str] = (),
    unfit: dict[str, OBCError] | None = None,
    ranks: Ranks | None = None,
    owners: Mapping[str, int] | None = None,
    offload: Offload | None = None,
) -> dict[str, PairedHessian]:
    """Statistics of layers in a model that is compressed in part.

    Every batch goes through the model twice, from the same random state: with the weights in ``dense``, then as the
    model is. Arguments, what is left behind and errors are those of
    :func:`~lightning_obc.calibration.collect_hessians`.

    Args:
        model: The model; its weights are afterwards what they were.
        layers: Layers by name.
        batches: Batches.
        dense: The weights of what has been compressed so far.
        forward: ``forward(model, batch)`` runs one batch.
        rounds: Passes over the batches.
        device: Batches are moved there.
        progress: Called as ``progress(description, batches done, batches in all)``.
        on_host: Names of the layers whose sums live in host memory.
        replay: Spares the batches the blocks that are finished.
        unfit: Receives the errors of single layers, by name, and the pass goes on without these. None raises them.
        ranks: Processes that share the batches.
        owners: The rank that gets the statistic of a layer.
        offload: What brings the model's blocks to another device, which then holds the statistics.

    Raises:
        ShapeError: The input of a layer changes its shape when earlier layers are compressed.
        LayerNotReachedError: A layer is called more or less often when earlier layers are compressed.
        UnsupportedLayerError: An embedding looks up other rows when earlier layers are compressed.
    """
    run, lookups = batch_runner(model, forward, device, offload), looked_up(model, layers)
    home = None if offload is None else offload.device
    gathering = _Pairs(
        {
            name: PairedAccumulator(module, name=name, device=home, lookup=name in lookups, on_host=name in on_host)
            for name, module in layers.items()
        },
        unfit,
        ranks,
    )
    inputs = LayerInputs(layers, gathering.receive)

    def spared(stream: str, batch: int) -> AbstractContextManager[None]:
        return nullcontext() if replay is None else replay.running(stream, batch, list(layers))

    with all_or_none(gathering.ranks), traceless(model), inputs.watched(model), staying(offload, layers):
        for done, batch in enumerate(gathering.numbered(batches, rounds), start=1):
            gathering.recording = True
            with dense.restored(), preserved_rng(), spared("before", done), inputs.one_batch():
                run(batch)
            gathering.recording = False
            with spared("behind", done), inputs.one_batch():
                run(batch)
            gathering.check_calls()
            gathering.check_finite()
            if progress is not None:
                progress("calibration", done, gathering.count(batches, rounds))
    gathering.reduce_(owners)
    return {name: gathering.statistics.pop(name).release_pair() for name in gathering.own(owners)}


class _Pairs(Gathering[PairedAccumulator]):
    """Inputs of the first pass wait for those of the second, call by call."""

    def __init__(
        self, statistics: dict[str, PairedAccumulator], unfit: dict[str, OBCError] | None, ranks: Ranks | None
    ) -> None:
        super().__init__(statistics, ranks, unfit)
        self.recording = False
        self._waiting: dict[str, list[Tensor]] = {name: [] for name in statistics}

    def receive(self, name: str, module: nn.Module, x: Tensor) -> None:
        if name not in self.statistics:
            return
        self.reached.add(name)
        if self.recording:
            # A copy: what follows the layer may work in place on its input.
            self._waiting[name].append(x.clone())
        elif not self._waiting[name]:
            self._drop(name, _other_calls(name, "more calls"))
        else:
            try:
                self.statistics[name].update_pair(self._waiting[name].pop(0), x, module)
            except (ShapeError, UnsupportedLayerError) as error:
                self._drop(name, error)

    def check_calls(self) -> None:
        for name in [name for name, inputs in self._waiting.items() if inputs]:
            self._drop(name, _other_calls(name, "fewer calls"))

    def _drop(self, name: str, error: OBCError) -> None:
        """Go on without a layer whose inputs cannot be compared."""
        if self.unfit is None:
            raise error
        self.unfit[name] = error
        del self.statistics[name]
        self._waiting[name].clear()


def _other_calls(name: str, got: str) -> LayerNotReachedError:
    return LayerNotReachedError(
        f"Layer {name!r} is not called as often as before the compression",
        got=got,
        expected="the same calls on the same batch",
        remedy='exclude it, or use Calibration(mode="independent")',
    )
