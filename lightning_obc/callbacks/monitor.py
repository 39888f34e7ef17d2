"""``CompressionMonitor``: what the weights of any sparse or quantized model look like, in every log."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from lightning_obc.callbacks import compat
from lightning_obc.callbacks.display import say
from lightning_obc.errors import SpecError
from lightning_obc.metrics import ModelInspection, inspect_model
from lightning_obc.report import render


class CompressionMonitor(Callback):
    """Log sparsity, bits, N:M conformity and compression ratio of a model, however it was compressed.

    The figures are read off the weights: no :class:`OBCCallback`, no masks and no other record is needed. They are
    logged before the first step, after every epoch, at the end of training, and in ``trainer.validate`` and
    ``trainer.test``. Figures of the whole model also go through ``self.log``, so that other callbacks can monitor
    them: ``compression/sparsity``, ``compression/bits``, ``compression/ratio`` (float32 size of all parameters over
    their compressed size), ``compression/2to4``.

    Args:
        patterns: N:M patterns whose conformity is logged: the share of groups with at most ``n`` non-zeros.
        layers: Names, globs or type names; None means every layer that an adapter handles.
        exclude: Entries of the same kinds to leave out.
        group_size: Input channels that share a scale, where grids have groups.
        per_layer: Also log every layer, as ``compression/<layer>/sparsity`` and so on.
        every_n_epochs: Epochs between two measurements in training.
        verbose: Print the table of layers at the end of training, validation and test.
        prefix: First part of all names.

    Raises:
        SpecError: A pattern is no N:M pattern, or ``every_n_epochs`` is below 1.
    """

    def __init__(
        self,
        patterns: list[str] = ["2:4"],  # noqa: B006 (a list, so that YAML can write it; only read)
        layers: Optional[list[str]] = None,
        exclude: Optional[list[str]] = None,
        group_size: Optional[int] = None,
        per_layer: bool = True,
        every_n_epochs: int = 1,
        verbose: bool = False,
        prefix: str = "compression",
    ) -> None:
        super().__init__()
        if every_n_epochs < 1:
            raise SpecError("every_n_epochs is too small", got=every_n_epochs, expected="at least 1")
        self.patterns, self.layers, self.exclude, self.group_size = list(patterns), layers, exclude, group_size
        self.per_layer, self.every_n_epochs, self.verbose, self.prefix = per_layer, every_n_epochs, verbose, prefix
        self.inspection: Optional[ModelInspection] = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look(pl_module)  # What cannot be looked for is said before anything runs.

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            found = self._look(pl_module)
            pl_module.log_dict(self._of_model(found))
            if self.per_layer:
                compat.log_now(trainer, self._of_layers(found))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, pl_module, show=self.verbose)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._write(trainer, pl_module, show=self.verbose)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, pl_module, show=self.verbose)

    def table(self) -> str:
        """The last measurement as text; empty before the first one."""
        return "" if self.inspection is None else _table(self.inspection, self.patterns)

    def _look(self, module: LightningModule) -> ModelInspection:
        options = {"layers": self.layers, "exclude": self.exclude, "group_size": self.group_size}
        self.inspection = inspect_model(module, patterns=self.patterns, **options)  # type: ignore[arg-type]
        return self.inspection

    def _write(self, trainer: Trainer, module: LightningModule, *, show: bool = False) -> None:
        found = self._look(module)
        compat.log_now(trainer, self._of_model(found) | (self._of_layers(found) if self.per_layer else {}))
        if show:
            say(module, f"\n{self.table()}")

    def _of_model(self, found: ModelInspection) -> dict[str, float]:
        conformity = {_named(pattern): share for pattern, share in found.conformity.items()}
        values = {"sparsity": found.sparsity, "bits": found.bits, "ratio": found.compression_ratio, **conformity}
        return {f"{self.prefix}/{name}": float(value) for name, value in values.items()}

    def _of_layers(self, found: ModelInspection) -> dict[str, float]:
        values: dict[str, float] = {}
        for layer in found.layers:
            own = {"sparsity": layer.sparsity, "bits": float(layer.bits)}
            own |= {_named(pattern): share for pattern, share in layer.conformity.items()}
            values |= {f"{self.prefix}/{layer.name}/{name}": value for name, value in own.items()}
        return values


def _named(pattern: str) -> str:
    """A colon is no letter for the tags of several loggers."""
    return pattern.replace(":", "to")


def _table(found: ModelInspection, patterns: Sequence[str]) -> str:
    columns = ("layer", "type", "weight", "sparsity [%]", "bits", *(f"{pattern} groups [%]" for pattern in patterns))
    rows = [
        [
            layer.name,
            layer.type,
            "×".join(map(str, layer.shape)),
            f"{100 * layer.sparsity:.1f}",
            str(layer.bits),
            *(f"{100 * layer.conformity[p]:.1f}" if p in layer.conformity else "–" for p in patterns),
        ]
        for layer in found.layers
    ]
    total = f"sparsity {100 * found.sparsity:.1f} %, {found.bits:.2f} bits on average"
    title = f"Weights of {len(rows)} layers: {total}"
    ratio = f"all parameters: {found.compression_ratio:.2f}× smaller than dense float32"
    return f"{render(title, columns, rows)}\n{ratio}"
