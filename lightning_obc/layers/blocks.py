"""Which layers belong to one block of a network, read off its containers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lightning_obc.layers.selection import normalise_name

_CONTAINERS = (nn.Sequential, nn.ModuleList)


def blocks_of(model: nn.Module, names: Sequence[str]) -> list[list[str]]:
    """Layers by block, in the order in which the names reach them.

    A block is the outermost module around a layer that is an element of a plain ``nn.Sequential`` or
    ``nn.ModuleList`` and no such container itself: a residual block, an encoder layer. A layer outside of all blocks
    is one of its own.

    Args:
        model: The model.
        names: Names of layers, as :func:`~lightning_obc.layers.select_layers` returns them.
    """
    modules = {normalise_name(name): module for name, module in model.named_modules()}
    blocks: dict[str, list[str]] = {}
    for name in names:
        blocks.setdefault(_block_of(modules, name), []).append(name)
    return list(blocks.values())


def block_of(model: nn.Module, name: str) -> tuple[str, nn.Module] | None:
    """Name and module of the block that a layer lies in, None outside of all blocks."""
    modules = {normalise_name(other): module for other, module in model.named_modules()}
    block = _block_of(modules, name)
    inside = block != name or type(modules.get(block.rpartition(".")[0])) in _CONTAINERS
    return (block, modules[block]) if inside and block in modules else None


def modules_outside_blocks(model: nn.Module) -> list[nn.Module]:
    """The model itself and all modules inside it, from outside to inside, that are neither blocks nor inside of one."""
    found: list[nn.Module] = []

    def visit(module: nn.Module, in_container: bool) -> None:
        inner = getattr(module, "_orig_mod", module)  # what torch.compile wraps
        container = type(inner) in _CONTAINERS
        if in_container and not container:
            return
        found.extend([module] if inner is module else [module, inner])
        for child in inner.children():
            visit(child, container)

    visit(model, False)
    return found


def _block_of(modules: dict[str, nn.Module], name: str) -> str:
    parts = name.split(".")
    for depth in range(len(parts)):
        around, inside = ".".join(parts[:depth]), ".".join(parts[: depth + 1])
        if type(modules.get(around)) in _CONTAINERS and type(modules.get(inside)) not in _CONTAINERS:
            return inside
    return name
