"""What keeps the outputs of finished blocks from being used again, for chains of ``stem``, ``blocks`` and ``head``."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class CallsABlockTwice(nn.Module):
    """Mixed into a chain: its first block comes again behind the last one."""

    stem: nn.Module
    blocks: nn.ModuleList
    head: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in (*self.blocks, self.blocks[0]):
            x = block(x)
        return self.head(x)


class DrawsNumbers(nn.Module):
    """Mixed into a chain: noise on its input, in evaluation mode too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.01 * torch.randn(x.shape))
