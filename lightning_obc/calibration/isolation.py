"""What a pass over a model must not leave behind: train modes, buffers, compiled stances."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from lightning_obc.calibration.rng import preserved_rng
from lightning_obc.distributed import reshard_


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every module's train mode and every buffer as before afterwards.

    Flags are set directly: overridden ``train()`` methods may change weights.
    """
    modules = list(model.modules())
    training = [module.training for module in modules]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in modules
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        reshard_(model)
        for module, flag in zip(modules, training, strict=True):
            module.training = flag
        for module, name, buffer, value in buffers:
            module._buffers[name] = buffer
            # After an interrupt, a block may still be on another device than its buffers were copied on.
            if not torch.equal(buffer, value.to(buffer.device)):
                buffer.copy_(value)


@contextmanager
def eager_forward() -> Iterator[None]:
    """Compiled modules run eagerly inside: hooks added after compilation would not fire otherwise.

    Also keeps attention off its fused inference path, which calls no submodules.
    """
    fastpath = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # imported by the first torch.compile; importing it here takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fastpath)


@contextmanager
def traceless(model: nn.Module) -> Iterator[None]:
    """A pass without gradients that leaves modes, buffers and random states as they were."""
    with ExitStack() as stack:
        for context in (preserved_rng(), undisturbed(model), eager_forward(), torch.no_grad()):
            stack.enter_context(context)
        yield
