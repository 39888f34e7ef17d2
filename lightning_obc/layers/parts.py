"""Modules that own several weights: each weight becomes a layer of its own, a *part*."""

from __future__ import annotations

from torch import nn

from lightning_obc.layers.base import LayerAdapter


class LayerPart(nn.Module):
    """One weight of a module that owns several, in the place of a layer.

    It is a handle, no part of the model: it holds no parameters of its own and is never called.

    Args:
        owner: The module that owns the weight.
        parameter: Dotted name of the weight in ``owner``.
        adapter: The adapter of this weight.
    """

    def __init__(self, owner: nn.Module, parameter: str, adapter: LayerAdapter) -> None:
        super().__init__()
        # In a tuple, so that the owner does not become a child of its part.
        self._owner = (owner,)
        self.parameter, self.adapter = parameter, adapter

    @property
    def owner(self) -> nn.Module:
        """The module that owns the weight, and whose forward pass receives the inputs."""
        return self._owner[0]

    @property
    def weight(self) -> nn.Parameter:
        """The live weight."""
        return self.owner.get_parameter(self.parameter)


class PartAdapter(LayerAdapter):
    """Base of the adapters of parts: hooks go to the owner."""

    def owner(self, module: nn.Module) -> nn.Module:
        assert isinstance(module, LayerPart)
        return module.owner
