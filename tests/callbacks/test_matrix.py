"""Optimizers × Trainer settings × kinds of stages: what is held is held after every single step.

Every pair of an optimizer and a kind of stage is there, every pair of a setting and a kind, and every pair of an
optimizer and a setting; the full product is not. Strategies of several processes have tests of their own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from small import Small, TwoOptimizers, is_two_four, loader, quiet_trainer, weights
from torch import Tensor

import lightning_obc as obc
from lightning_obc.layers import adapter_for

SPEC = obc.Calibration(samples=16)
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "momentum": {"optimizer": torch.optim.SGD, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    "adam": {"optimizer": torch.optim.Adam, "lr": 0.02},
    "adamw": {"optimizer": torch.optim.AdamW, "lr": 0.02, "weight_decay": 0.2},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulate": {"accumulate_grad_batches": 2},
    "clip": {"gradient_clip_val": 0.1},
    "bf16": {"precision": "bf16-mixed"},
    "bf16-true": {"precision": "bf16-true"},
    # The Trainer neither accumulates nor clips in manual optimization.
    "manual": {},
    "manual bf16": {"precision": "bf16-mixed"},
}
KINDS: dict[str, list[Any]] = {
    "gradual": [obc.Prune(0.6, at={"step": 2}, schedule=obc.Gradual(3, every=2, initial=0.2))],
    "freeze": [obc.Prune("2:4", at={"step": 3}), obc.Quantize(3, at={"epoch": 1})],
    "train": [obc.Prune("2:4", at={"epoch": 1}), obc.Quantize(3, at={"step": 7}, after="train")],
    "edges": [obc.Quantize(3, at={"step": 3}, edges=8, overrides={"fc": {"after": "train"}})],
}
NAMES = list(OPTIMIZERS)
PAIRS = [
    (NAMES[(number + shift) % 3], setting, kind)
    for shift, kind in enumerate(KINDS)
    for number, setting in enumerate(SETTINGS)
]


class Held(Callback):
    """Wherever others could look: zeros of the masks, frozen weights bit for bit, trained weights on their grid."""

    def __init__(self, callback: obc.OBCCallback) -> None:
        self.callback, self.seen, self.frozen = callback, 0, {}

    def on_train_batch_start(self, trainer: Any, pl_module: LightningModule, *args: Any) -> None:
        self._look(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: LightningModule, *args: Any) -> None:
        self._look(pl_module)

    def on_validation_batch_end(self, trainer: Any, pl_module: LightningModule, *args: Any) -> None:
        self._look(pl_module)

    def _look(self, pl_module: LightningModule) -> None:
        for name, layer in self.callback._state.held.layers.items():
            self.seen += 1
            module = pl_module.get_submodule(name)
            adapter = adapter_for(module)
            assert adapter is not None
            matrix = adapter.weight_matrix(module)
            if layer.mask is not None:
                assert not matrix[~layer.mask].any(), f"{name} lost its zeros"
                assert not torch.signbit(matrix[~layer.mask]).any(), "a negative zero"
            if layer.grid is not None and layer.latent is None:
                assert torch.equal(matrix, self.frozen.setdefault(name, matrix.clone())), f"{name} moved"
            elif layer.grid is not None:
                nearest = layer.grid.quantize(matrix.float())
                error = 4 * torch.finfo(matrix.dtype).eps * nearest.abs()
                assert bool(((nearest - matrix).abs() <= error).all()), f"{name} left its grid"


@pytest.mark.parametrize(("optimizer", "setting", "kind"), PAIRS)
def test_what_is_held_is_held_after_every_step(tmp_path: Path, optimizer: str, setting: str, kind: str) -> None:
    module = (TwoOptimizers if setting.startswith("manual") else Small)(**OPTIMIZERS[optimizer])
    callback = obc.OBCCallback(KINDS[kind], SPEC, verbose=False, save_checkpoint=False, compare=False)
    held = Held(callback)
    before: dict[str, Tensor] = {}

    class Moves(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: LightningModule) -> None:
            if trainer.current_epoch == 2:
                before.update(weights(pl_module))

    quiet_trainer(tmp_path, callback, held, Moves(), **SETTINGS[setting]).fit(module, loader(shuffle=False), loader(1))
    assert held.seen >= 20
    after = weights(module)
    frozen = {"freeze": {"conv.weight", "fc.weight"}, "edges": {"conv.weight"}}.get(kind, set())
    for name in ("conv.weight", "fc.weight", "fc.bias"):
        # In bfloat16 a step may be smaller than half a unit in the last place; bit widths of 8 hide small steps.
        if name in frozen:
            assert torch.equal(before[name], after[name])
        elif name != "fc.bias" and kind in ("gradual", "edges") and setting != "bf16-true":
            assert not torch.equal(before[name], after[name]), f"{name} no longer trains"


def test_edges_of_a_run_that_only_validates(tmp_path: Path) -> None:
    class Longer(Small):
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))  # type: ignore[assignment]

        def train_dataloader(self) -> Any:
            return loader()

    callback = obc.OBCCallback([obc.Prune("2:4", at="validate", edges="skip")], SPEC, save_checkpoint=False)
    model = Longer()
    quiet_trainer(tmp_path, callback).validate(model, loader(1, shuffle=False), verbose=False)
    assert [is_two_four(layer.weight) for layer in (model.conv, *model.fc)] == [False, True, False]
