"""Fake quantization of layer inputs through forward pre-hooks: no wrapper, no buffer, no new state-dict key."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_obc.activation_spec import ActivationGrid
from lightning_obc.activations.inputs import InputGrid, InputQuantization, first_tensor
from lightning_obc.activations.ranges import RangeObserver
from lightning_obc.calibration import call_forward
from lightning_obc.calibration.collect import eager_forward, undisturbed
from lightning_obc.calibration.rng import preserved_rng
from lightning_obc.distributed import Ranks, SingleProcess, exchange
from lightning_obc.errors import (
    EmptyCalibrationError,
    LayerNotFoundError,
    SpecError,
    UnsupportedLayerError,
)
from lightning_obc.grids import Grid
from lightning_obc.layers import adapter_for, is_lookup, select_layers
from lightning_obc.layers.parts import LayerPart

EDGE_BITS = 8


class ActivationQuantizer:
    """Quantizes the inputs of layers while it is enabled.

    Use: ``observe`` batches, ``freeze`` the ranges, ``enable``. Bit widths can be changed after freezing, as long as
    the observations are there. Everything lives in this object: the model keeps its keys and its ``forward``, can be
    copied and pickled, and loads and saves the same checkpoints as before.

    Args:
        model: The model.
        layers: Names, globs or type names; None means every layer that is a module of its own.
        bits: One bit width, or one for each layer by name; None leaves a layer's input as it is.
        spec: How ranges are found; its bit width is replaced by ``bits``.
        exclude: Names, globs or type names to leave out.
        edges_at_8: Keep the first and the last supported layer of the model at 8 bits.

    Raises:
        LayerNotFoundError: A name that matches no layer.
        UnsupportedLayerError: A chosen layer is one weight among several of its module (attention, recurrent layers),
            so that no hook sees its input.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str] | None = None,
        bits: int | Mapping[str, int | None] = 8,
        *,
        spec: ActivationGrid | None = None,
        exclude: Sequence[str] | None = None,
        edges_at_8: bool = False,
    ) -> None:
        self._model = model
        self._layers = _hookable(select_layers(model, layers, exclude), explicit=layers is not None)
        self.spec = spec or ActivationGrid()
        everything = [name for name, module in select_layers(model).items() if not is_lookup(module)]
        self._edges = {everything[0], everything[-1]} if edges_at_8 else set()
        self._observers = {
            name: RangeObserver(self.spec.granularity, name=name, seed=index) for index, name in enumerate(self._layers)
        }
        self._grids: dict[str, Grid] = {}
        self._fitted: dict[tuple[str, int], Grid] = {}
        self._frozen = False
        self._handles: list[RemovableHandle] = []
        self._bits: dict[str, int | None] = {}
        self.set_bits(bits)

    @property
    def bits(self) -> dict[str, int | None]:
        """Bit width by layer; None where the input stays as it is."""
        return dict(self._bits)

    @property
    def grids(self) -> dict[str, Grid]:
        """Frozen grids by layer: ``scale`` and ``zero_point`` ``[1, C, 1]``, zero points within ``0 .. max_code``."""
        return dict(self._grids)

    @property
    def enabled(self) -> bool:
        return bool(self._handles)

    def axis(self, name: str) -> int | None:
        """Dimension of a layer's input, counted from the end, that its ranges run along; None for one range."""
        return _channel_axis(self._layers[name]) if self.spec.granularity == "channel" else None

    def set_bits(self, bits: int | Mapping[str, int | None]) -> None:
        """Change bit widths; ranges are fitted again where they were frozen already.

        Raises:
            LayerNotFoundError: A layer that this quantizer does not have.
        """
        wanted = dict.fromkeys(self._layers, bits) if isinstance(bits, int) else dict(bits)
        unknown = sorted(set(wanted) - set(self._layers))
        if unknown:
            raise LayerNotFoundError(
                "Bit widths name layers that are not quantized here",
                got=unknown,
                expected=f"some of {list(self._layers)[:12]}",
            )
        chosen = {name: self._bits_at(name, wanted.get(name)) for name in self._layers}
        for width in chosen.values():
            if width is not None:
                self.spec.with_bits(width)
        self._bits = chosen
        if self._frozen:
            self.freeze()

    def _bits_at(self, name: str, bits: int | None) -> int | None:
        return max(bits, EDGE_BITS) if bits is not None and name in self._edges else bits

    def observe(
        self,
        batches: Iterable[Any],
        *,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        ranks: Ranks | None = None,
    ) -> ActivationQuantizer:
        """Run batches through the unquantized model in evaluation mode and note the inputs' ranges.

        With ``ranks`` each runs batches of its own, and all know the ranges of all batches afterwards.

        Raises:
            EmptyCalibrationError: There are no batches.
        """
        run = forward or call_forward
        count = 0
        with ExitStack() as stack:
            for context in (preserved_rng(), undisturbed(self._model), eager_forward(), torch.no_grad()):
                stack.enter_context(context)
            stack.enter_context(self.observing())
            for batch in batches:
                run(self._model, batch)
                count += 1
        together = ranks or SingleProcess()
        if sum(exchange(together, count)) == 0:
            raise EmptyCalibrationError(
                "No batch was given to find activation ranges", got="no batch", expected="at least one batch"
            )
        for observer in self._observers.values():
            observer.share_(together)
        return self

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Inputs that pass through the layers inside are observed, unquantized."""
        enabled = self.enabled
        self.disable()
        self._fitted.clear()
        handles = [
            module.register_forward_pre_hook(_Observe(observer, _channel_axis(module)), with_kwargs=True)
            for (module, observer) in zip(self._layers.values(), self._observers.values(), strict=True)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            if enabled:
                self.enable()

    def check_model(self, model: nn.Module) -> None:
        """Refuse to be switched on for ``model`` when the hooks would go to another one, such as what it is a copy of.

        Raises:
            SpecError: The layers are not those of ``model``.
        """
        inside = {id(module) for module in model.modules()}
        foreign = [name for name, module in self._layers.items() if id(module) not in inside]
        if foreign:
            raise SpecError(
                "The activation quantizer belongs to another model object",
                got=f"layers {', '.join(foreign[:8])} of another object",
                expected="the model that it was made for",
                remedy="use that model and copy it afterwards (copies stay quantized), or attach(model, frozen())",
            )

    def freeze(self) -> ActivationQuantizer:
        """Fit the grids to what was observed.

        Raises:
            CalibrationError: A layer to be quantized that no batch reached.
            NonFiniteError: NaN or Inf was observed.
        """
        self._grids = {name: self._fit(name, bits) for name, bits in self._bits.items() if bits is not None}
        self._frozen = True
        if self.enabled:
            self.enable()
        return self

    def _fit(self, name: str, bits: int) -> Grid:
        # A search switches bit widths all the time; fitting a range takes far longer than a forward pass.
        if (name, bits) not in self._fitted:
            self._fitted[name, bits] = self._observers[name].fit(self.spec.with_bits(bits))
        return self._fitted[name, bits]

    def enable(self) -> ActivationQuantizer:
        """Quantize from now on.

        Raises:
            SpecError: The ranges are not frozen yet.
        """
        missing = [name for name, bits in self._bits.items() if bits is not None and name not in self._grids]
        if missing:
            raise SpecError(
                "Activation ranges are not known yet",
                got=missing[:8],
                expected="observed and frozen ranges",
                remedy="call observe(batches) and freeze() first",
            )
        self.disable()
        for name in self._grids:
            hook = InputQuantization(self._inputs(name))
            self._handles.append(self._layers[name].register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def disable(self) -> ActivationQuantizer:
        """Take the hooks off: the model computes as it did before."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        return self

    def frozen(self) -> dict[str, InputGrid]:
        """Frozen ranges of the layers whose inputs are quantized; see :func:`~lightning_obc.activations.attach`."""
        return {name: self._inputs(name) for name in self._grids}

    def _inputs(self, name: str) -> InputGrid:
        grid = self._grids[name]
        return InputGrid(self.spec.with_bits(grid.spec.bits), grid, self.axis(name))


def _hookable(layers: Mapping[str, nn.Module], explicit: bool) -> dict[str, nn.Module]:
    hookable = {
        name: module for name, module in layers.items() if not (isinstance(module, LayerPart) or is_lookup(module))
    }
    hidden = sorted(set(layers) - set(hookable))
    if hidden and (explicit or not hookable):
        raise UnsupportedLayerError(
            "The inputs of some layers cannot be quantized",
            got=", ".join(hidden),
            expected="layers that are modules of their own",
            remedy="exclude them; they are embeddings, or single weights of attention or recurrent modules",
        )
    return hookable


def _channel_axis(module: nn.Module) -> int:
    """Input channels counted from the end: linear layers have them last, convolutions before the spatial axes."""
    adapter = adapter_for(module)
    assert adapter is not None
    return 1 - adapter.current(module).dim()


class _Observe:
    """A pre-hook that shows the input to an observer."""

    def __init__(self, observer: RangeObserver, axis: int) -> None:
        self.observer, self.axis = observer, axis

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = first_tensor(args, kwargs)
        if x is not None:
            self.observer.update(x, self.axis)
