"""The weights of layers as they were before they were compressed, put back for single forward passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_obc.layers import adapter_for


class DenseWeights:
    """Copies of the parameters of layers, made before these change.

    A pass through the model as it was needs no second model, only what has changed since.
    """

    def __init__(self) -> None:
        self._kept: dict[int, tuple[nn.Parameter, Tensor]] = {}

    def keep(self, module: nn.Module) -> None:
        """Remember the parameters of a layer as they are now, unless they are remembered already."""
        adapter = adapter_for(module)
        owner = module if adapter is None else adapter.owner(module)
        with torch.inference_mode(False):
            for parameter in owner.parameters():
                if id(parameter) not in self._kept:
                    self._kept[id(parameter)] = (parameter, parameter.detach().clone())

    @torch.no_grad()
    def disturb_(self, seed: int = 0) -> None:
        """Add noise of each parameter's own size to the live parameters; :meth:`put_back_` undoes it."""
        generator = torch.Generator().manual_seed(seed)
        for parameter, value in self._kept.values():
            noise = torch.randn(value.shape, generator=generator).to(value)
            parameter.copy_(value + noise * (value.float().square().mean().sqrt() + 1e-3).to(value))

    @torch.no_grad()
    def put_back_(self) -> None:
        """The remembered values are in the model again."""
        for parameter, value in self._kept.values():
            parameter.copy_(value)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """The remembered values are in the model inside, what it held before afterwards."""
        with torch.inference_mode(False), torch.no_grad():
            now = [(parameter, parameter.detach().clone()) for parameter, _ in self._kept.values()]
        try:
            with torch.inference_mode(False), torch.no_grad():
                for parameter, value in self._kept.values():
                    parameter.copy_(value)
            yield
        finally:
            with torch.no_grad():
                for parameter, value in now:
                    parameter.copy_(value)
