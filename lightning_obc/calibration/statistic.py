"""The calibration statistic of one layer: update, merge, finalise."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_obc.calibration.failure import misfit_input
from lightning_obc.errors import NonFiniteError, ShapeError, UnsupportedLayerError
from lightning_obc.hessian import Hessian, PairedHessian
from lightning_obc.kernels.hessian_update import PositionSample, sampled_positions, symmetrise_
from lightning_obc.layers import LayerAdapter, adapter_for, reason_unsupported


class HessianAccumulator:
    """Two float64 sums of ``x xᵀ``, split by the parity of the sample's index. Its reduction over ranks is a sum.

    Call :meth:`begin_batch` once per batch, then :meth:`update` for every time the layer is called on it. Samples are
    counted per batch, not per call, so that ``n`` is the same for every layer.

    Args:
        module: The layer; an adapter must handle it.
        name: Name of the layer in errors.
        device: Where the sums live; None means the device of the layer's weight.
        on_host: The sums live in host memory, and are brought to the inputs' device for every update.
        lookup: Also count how often each row is looked up, because an embedding shares the weight.
        positions: Positions of every sample that are used in one call, at most, drawn at random; None uses all.
        seed: Seed of these draws; every layer has its own by its name.

    Raises:
        UnsupportedLayerError: No adapter handles the module.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        name: str = "",
        device: torch.device | str | None = None,
        lookup: bool = False,
        on_host: bool = False,
        positions: int | None = None,
        seed: int = 0,
    ) -> None:
        adapter = adapter_for(module)
        if adapter is None:
            raise UnsupportedLayerError(
                f"Layer {name!r} has no adapter", got=type(module).__name__, expected=reason_unsupported(module)
            )
        self.name, self.shape = name, adapter.shape(module)
        self._module, self._adapter = module, adapter
        size = (2, self.shape.groups, self.shape.columns, self.shape.columns)
        # Tensors made in inference mode could not be used in training afterwards.
        with torch.inference_mode(False):
            self.sums = self._zeros(size, torch.device(device or adapter.current(module).device), on_host)
            self.rows = self.sums.new_zeros(2, self.shape.groups, self.shape.rows) if lookup or adapter.lookup else None
        self._on_host = on_host
        self._sample = None if positions is None else PositionSample(positions, seed ^ zlib.crc32(name.encode()))
        self._estimate = False
        self.samples = [0, 0]
        self.batch_index = -1
        self._batch_size, self._start = 0, 0
        self._token_mask: Tensor | None = None

    @staticmethod
    def _zeros(size: tuple[int, ...], device: torch.device, on_host: bool) -> Tensor:
        if not on_host:
            return torch.zeros(size, dtype=torch.float64, device=device)
        return torch.zeros(size, dtype=torch.float64, pin_memory=device.type == "cuda")

    @property
    def adapter(self) -> LayerAdapter:
        return self._adapter

    def begin_batch(
        self, batch_size: int, *, start: int = 0, batch_index: int = 0, token_mask: Tensor | None = None
    ) -> None:
        """Count the samples of a batch.

        Args:
            batch_size: Samples in the batch.
            start: Index of its first sample within the round.
            batch_index: Index of the batch within the round.
            token_mask: Bool ``[samples, tokens]``, False for padded tokens; None when there are none.
        """
        self._token_mask = token_mask
        self._batch_size, self._start, self.batch_index = batch_size, start, batch_index
        for parity in (0, 1):
            self.samples[parity] += len(range(self._offset(parity), batch_size, 2))

    def _offset(self, parity: int) -> int:
        """First sample of the current batch whose index within the round has the given parity."""
        return (self._start + parity) % 2

    @torch.no_grad()
    def update(self, x: Tensor, module: nn.Module | None = None) -> None:
        """Add the input of one call of the layer, as :meth:`LayerAdapter.inputs` returns it.

        Where the leading dimension is a multiple of the batch size (windows, tokens), the samples are outermost in it;
        otherwise the samples cannot be told apart, and whole batches go to alternate halves.

        Args:
            x: The input.
            module: The module that was called, when it is another one that shares the layer's weight.

        Raises:
            UnsupportedLayerError: The other module sees the weight as a problem of another shape.
            ShapeError: The input does not fit the layer.
        """
        module = self._module if module is None else module
        try:
            self._add_by_half_(self._without_padding(self._at_sums(x), module), module)
        except ShapeError as error:
            # The layer would fail on it too, but the hooks see its input first.
            raise misfit_input(self.name, module, x, self._adapter.current(module)) from error

    def _add_by_half_(self, x: Tensor, module: nn.Module) -> None:
        adapter, leading, size = self._adapter_of(module), x.shape[0], self._batch_size
        if size > 0 and leading % size == 0:
            by_sample = x.reshape(size, leading // size, *x.shape[1:])
            for parity in (0, 1):
                part = by_sample[self._offset(parity) :: 2]
                if part.shape[0]:
                    self._add_(adapter, module, parity, part.flatten(0, 1), part.shape[0])
        else:
            self._add_(adapter, module, self.batch_index % 2, x, size)

    def _at_sums(self, x: Tensor) -> Tensor:
        """Inputs are elsewhere only for layers on the host of a model whose blocks are brought to another device."""
        return x if self._on_host else x.to(self.sums.device)

    def _add_(self, adapter: LayerAdapter, module: nn.Module, half: int, x: Tensor, samples: int) -> None:
        if not adapter.lookup:
            with self._on_device(self.sums[half], x) as sums, sampled_positions(self._sample, samples):
                adapter.accumulate_(module, sums, x)
        elif self.rows is not None:
            with self._on_device(self.rows[half], x) as rows:
                adapter.count_rows_(module, rows, x)

    @contextmanager
    def _on_device(self, sums: Tensor, x: Tensor) -> Iterator[Tensor]:
        """Sums to add to where ``x`` is: themselves, or a copy that is written back."""
        if not self._on_host:
            yield sums
            return
        copy = sums.to(x.device, copy=True)
        yield copy
        sums.copy_(copy)

    def _without_padding(self, x: Tensor, module: nn.Module) -> Tensor:
        if self._token_mask is None:
            return x
        return self._adapter_of(module).without_padding(module, x, self._token_mask.to(x.device))

    def _adapter_of(self, module: nn.Module) -> LayerAdapter:
        adapter = adapter_for(module)
        if adapter is None or adapter.shape(module) != self.shape:
            raise UnsupportedLayerError(
                f"Layer {self.name!r} shares its weight with a module of another kind",
                got=type(module).__name__,
                expected=f"a module that sees the weight as {self.shape}",
                remedy="exclude the layer",
            )
        return adapter

    @property
    def estimate(self) -> bool:
        """True once positions were left out."""
        return self._estimate or (self._sample is not None and self._sample.dropped)

    def finite(self) -> Tensor:
        """Scalar bool tensor: no NaN or Inf has come in. Costs one look at the diagonal, and no synchronisation."""
        return self.sums.diagonal(dim1=-2, dim2=-1).isfinite().all()

    def raise_if_not_finite(self) -> None:
        """Raise NonFiniteError, naming the layer and the last batch, when NaN or Inf has come in."""
        if not self.finite():
            raise NonFiniteError(
                f"The inputs of layer {self.name!r} are not finite",
                got=f"NaN or Inf in calibration batch {self.batch_index}",
                expected="finite activations",
                remedy="check that batch of the calibration data, and the layers before this one",
            )

    def all_sums(self) -> list[Tensor]:
        """What is added up over ranks, beside ``samples``."""
        return [self.sums] if self.rows is None else [self.sums, self.rows]

    def merge(self, other: HessianAccumulator) -> None:
        """Add the sums and counts of another accumulator of the same layer; ``other`` stays as it is.

        Raises:
            ShapeError: The other accumulator belongs to a layer of another shape.
        """
        if other.shape != self.shape:
            raise ShapeError(
                "Statistics of different layers cannot be merged", got=other.shape, expected=str(self.shape)
            )
        self.sums.add_(other.sums.to(self.sums.device))
        if self.rows is not None and other.rows is not None:
            self.rows.add_(other.rows.to(self.rows.device))
        self._estimate = self.estimate or other.estimate
        self.samples = [mine + theirs for mine, theirs in zip(self.samples, other.samples, strict=True)]

    def finalise(self) -> Hessian:
        """The statistic for the engine; the accumulator can go on afterwards.

        Raises:
            NonFiniteError: NaN or Inf has come in.
        """
        self.raise_if_not_finite()
        with torch.inference_mode(False):
            rows = None if self.rows is None else self.rows.clone()
            return Hessian(symmetrise_(self.sums.clone()), self._counts, self.estimate, rows)

    def release(self) -> Hessian:
        """The statistic without a copy of the sums; the accumulator must not be used afterwards.

        Raises:
            NonFiniteError: NaN or Inf has come in.
        """
        self.raise_if_not_finite()
        with torch.inference_mode(False):
            return Hessian(symmetrise_(self.sums), self._counts, self.estimate, self.rows)

    @property
    def _counts(self) -> tuple[int, int]:
        return self.samples[0], self.samples[1]


def check_finite(statistics: Mapping[str, Hessian | PairedHessian]) -> None:
    """Raise NonFiniteError, naming the layers, when a statistic holds NaN or Inf."""
    bad = [name for name, statistic in statistics.items() if not _finite(statistic)]
    if bad:
        raise NonFiniteError(
            "Calibration statistics hold NaN or Inf",
            got=f"layers {', '.join(bad)}",
            expected="finite activations",
            remedy="check the calibration data and the model's outputs in evaluation mode",
        )


def _finite(statistic: Hessian | PairedHessian) -> bool:
    if isinstance(statistic, PairedHessian):
        return _finite(statistic.hessian) and bool((statistic.cross.isfinite() & statistic.difference.isfinite()).all())
    return bool(torch.isfinite(statistic.halves).all())
