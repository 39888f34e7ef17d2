"""The inputs of layers while batches go through a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_obc.calibration.functional import FunctionalCalls
from lightning_obc.layers import LayerPart, adapter_for, is_lookup, sharing_modules
from lightning_obc.layers.linear import LinearAdapter

Receive = Callable[[str, nn.Module, Tensor], None]


def looked_up(model: nn.Module, layers: Mapping[str, nn.Module]) -> set[str]:
    """Names of the layers that are embeddings, or share their weight with one."""
    others = sharing_modules(model, layers)
    return {name for name, module in layers.items() if any(is_lookup(m) for m in (module, *others[name]))}


class LayerInputs:
    """Hands every input of the chosen layers on, from all modules that share their weights.

    Args:
        layers: Layers by name.
        receive: Called as ``receive(name, module, x)`` for every call: the module that was called, and its input as
            :meth:`~lightning_obc.layers.LayerAdapter.inputs` returns it.
    """

    def __init__(self, layers: Mapping[str, nn.Module], receive: Receive) -> None:
        self._layers, self._receive = layers, receive
        self._functional_calls = FunctionalCalls(layers, self._called_functionally)

    @contextmanager
    def watched(self, model: nn.Module) -> Iterator[None]:
        """Hooks are there inside, and gone afterwards."""
        with ExitStack() as stack:
            for name, others in sharing_modules(model, self._layers).items():
                for module in (self._layers[name], *others):
                    stack.callback(self._attach(name, module).remove)
            yield

    @contextmanager
    def one_batch(self) -> Iterator[None]:
        """Around the forward pass of each batch."""
        with self._functional_calls:
            yield

    def _attach(self, name: str, module: nn.Module) -> RemovableHandle:
        adapter = adapter_for(module) or adapter_for(self._layers[name])
        assert adapter is not None

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not adapter.lookup:
                self._functional_calls.module_called(name)
            self._receive(name, module, adapter.inputs(module, args, kwargs))

        return adapter.owner(module).register_forward_pre_hook(hook, with_kwargs=True)

    def _called_functionally(self, name: str, x: Tensor) -> None:
        module = self._layers[name]
        if is_lookup(module):
            # The weight of an embedding, multiplied with: what an output layer does that has none of its own.
            module = LayerPart(module, "weight", LinearAdapter())
        adapter = adapter_for(module)
        assert adapter is not None
        self._receive(name, module, adapter.inputs(module, (x,), {}))
