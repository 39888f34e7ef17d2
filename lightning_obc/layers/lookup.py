"""``nn.Embedding``: rows that are looked up, not multiplied.

With ``c_r`` the times that row ``r`` is looked up, the squared output error per sample is ``Σ_r c_r ‖Δw_r‖² / n``:
the Hessian of a row is ``h_r I`` with ``h_r = 2 c_r / n``. It couples no two weights: nearest rounding on a grid per
row is optimal, and nothing can make up for a weight that is pruned.
"""

from __future__ import annotations

from torch import Tensor, nn

from lightning_obc.layers.linear import OneMatrix

_PADDED = -1


class LookupAdapter(OneMatrix):
    """``nn.Embedding``: one problem, a row per entry of the vocabulary, a column per feature."""

    lookup = True

    def normalise_inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        return x.unsqueeze(0) if x.dim() == 0 else x

    def without_padding(self, module: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
        return x if x.shape != mask.shape else x.masked_fill(~mask, _PADDED)

    def accumulate_(self, module: nn.Module, out: Tensor, x: Tensor) -> None:
        """Indices have no products; :meth:`count_rows_` is all there is."""

    def accumulate_cross_(self, module: nn.Module, out: Tensor, a: Tensor, b: Tensor) -> None:
        """Indices do not change with the layers before."""

    def count_rows_(self, module: nn.Module, out: Tensor, x: Tensor) -> None:
        indices = x.flatten()
        out[0].index_add_(0, indices.clamp(min=0), (indices != _PADDED).to(out.dtype))
