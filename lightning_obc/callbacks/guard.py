"""``MaskGuard``: fine-tune a checkpoint that is pruned already, with its zeros staying zeros."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_obc.callbacks.held import HeldLayer, HeldWeights, is_computed
from lightning_obc.callbacks.step_hooks import StepHooks
from lightning_obc.errors import SpecError
from lightning_obc.layers import adapter_for, select_layers
from lightning_obc.metrics.functional import whole


class MaskGuard(Callback):
    """Keep the zeros of an already pruned model while it is trained on, whatever pruned it.

    The mask is taken when training starts: every exact zero in the weight of a layer that carries weights (linear
    layers, convolutions, …; never biases or norms). It holds through every optimizer step, is written into
    checkpoints as state of this callback, and comes back on a resume. State-dict keys of the model do not change.

    Layers that hold nothing but zeros are left free, and named in a warning: they are fresh (an adapter that starts
    from zero, say), not pruned.

    Args:
        layers: Names, globs or type names; None means every layer that an adapter handles.
        exclude: Entries of the same kinds to leave out.
        min_sparsity: Layers with a smaller fraction of zeros count as dense, and are left free.

    Raises:
        SpecError: ``min_sparsity`` lies outside [0, 1).
    """

    def __init__(
        self,
        layers: Optional[list[str]] = None,
        exclude: Optional[list[str]] = None,
        min_sparsity: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= min_sparsity < 1:
            raise SpecError("min_sparsity lies outside [0, 1)", got=min_sparsity, expected="a fraction of zeros")
        self.layers, self.exclude, self.min_sparsity = layers, exclude, min_sparsity
        self._held = HeldWeights()
        self._restored = False
        self._hooks = StepHooks()

    @property
    def masks(self) -> dict[str, torch.Tensor]:
        """What is held, by layer: bool ``[g, R, d]`` on the CPU, True = free to train."""
        return {name: layer.mask for name, layer in self._held.layers.items() if layer.mask is not None}

    @property
    def state_key(self) -> str:
        return self._generate_state_key(layers=self.layers, exclude=self.exclude)

    def state_dict(self) -> dict[str, Any]:
        return {"layers": self._held.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._held.load_state_dict(state_dict["layers"])
        self._restored = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Every fit takes its masks anew, unless it resumes: then the state is loaded after this hook.
        self._restored = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        select_layers(pl_module, self.layers, self.exclude)  # A misspelt name is said before anything runs.

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._restored:
            self._take(pl_module)
        self._held.bind(pl_module)
        self._hooks.attach(trainer, lambda touched: self._held.apply_(touched))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Optimizers without hooks, and modules that edit their weights themselves.
        self._held.apply_()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._held.apply_()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._hooks.detach()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._hooks.detach()
        self._held.unbind()

    def _take(self, module: LightningModule) -> None:
        masks, empty = _zeros(select_layers(module, self.layers, self.exclude), self.min_sparsity)
        if empty:
            rank_zero_warn(f"MaskGuard leaves layers free that hold nothing but zeros: {', '.join(empty)}")
        if not masks:
            rank_zero_warn("MaskGuard found no zeros to keep: was the pruned checkpoint loaded?")
        self._held = HeldWeights()
        self._held.layers = {name: HeldLayer(mask=mask) for name, mask in masks.items()}
        zeros, total = sum(int((~mask).sum()) for mask in masks.values()), sum(m.numel() for m in masks.values())
        if masks:
            rank_zero_info(f"MaskGuard keeps {zeros} zeros in {len(masks)} layers ({100 * zeros / total:.1f} %)")


def _zeros(layers: Mapping[str, nn.Module], min_sparsity: float) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Masks of the layers with zeros, True = not zero, and the names of those with nothing else."""
    masks: dict[str, torch.Tensor] = {}
    empty: list[str] = []
    for name, layer in layers.items():
        adapter = adapter_for(layer)
        assert adapter is not None
        if is_computed(layer):
            continue
        mask = adapter.to_matrix_layout(layer, whole(adapter.current(layer)) != 0).cpu()
        sparsity = 1 - float(mask.double().mean())
        if sparsity == 1:
            empty.append(name)
        elif sparsity > 0 and sparsity >= min_sparsity:
            masks[name] = mask.clone()
    return masks, empty
