"""Export of a compressed checkpoint, inside a validation run that has loaded it and scored it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lightning_obc.activations import attach, attached, inputs_from_state
from lightning_obc.calibration import calibration_batches, inputs_of, takes_each
from lightning_obc.callbacks import compat
from lightning_obc.callbacks.held import HeldWeights
from lightning_obc.callbacks.state import PREFIX
from lightning_obc.errors import ExportError, FingerprintError
from lightning_obc.export import (
    CompressedWeight,
    LinearKernel,
    PackedFile,
    Shrunk,
    export_onnx,
    named_layers,
    save_compressed_tensors,
    save_packed,
    shrink,
)
from lightning_obc.export.compressed_tensors import CONFIG, WEIGHTS
from lightning_obc.files import check_target, require
from lightning_obc.layers import adapter_for
from lightning_obc.specs import Calibration

Format = Literal["onnx", "packed", "compressed-tensors"]


def format_of(path: Path) -> Format:
    """The format that the ending of a name stands for.

    Raises:
        ExportError: It stands for none.
    """
    known: dict[str, Format] = {".onnx": "onnx", ".safetensors": "packed"}
    if path.suffix.lower() not in known:
        raise ExportError(
            "The name does not say in which format to export",
            got=str(path),
            expected="a name that ends in .onnx or .safetensors (packed)",
            remedy="choose one with --format: onnx, packed or compressed-tensors (a folder)",
        )
    return known[path.suffix.lower()]


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: The file, or the folder of compressed-tensors.
        size: Bytes of it.
        layers: Names of the compressed layers.
        notes: What stayed as it was although its layer was compressed, and warnings.
    """

    path: Path
    size: int
    layers: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class ExportOptions:
    """The options of ``lightning-obc export``; see :meth:`OBCTrainer.export`."""

    path: Path
    format: Format = "onnx"
    integer: bool = False
    activation_bits: int = 8
    calibration: Calibration = field(default_factory=Calibration)
    dynamic_batch: bool = True
    overwrite: bool = False
    linear: LinearKernel = "dequantize"
    shrink: bool = False

    def check(self) -> None:
        """Refuse a target that exists, and options that do not go together, before anything runs."""
        if self.format != "compressed-tensors":
            check_target(self.path, self.overwrite)
        elif not self.path.parent.is_dir() or (self.path.exists() and not self.path.is_dir()):
            raise ExportError(
                "The folder cannot be made", got=str(self.path), expected="a folder, or a name in an existing one"
            )
        elif self.path.is_dir():
            for name in (WEIGHTS, CONFIG):
                check_target(self.path / name, self.overwrite)
        if self.integer and self.format != "onnx":
            raise ExportError(
                "Only ONNX files compute with integers", got=f"integer with format {self.format}", expected="onnx"
            )
        if self.linear != "dequantize" and (self.format != "onnx" or self.integer):
            raise ExportError(
                "Linear layers compute from packed codes in ONNX files alone, with inputs in floating point",
                got=f"linear {self.linear} with format {self.format}, integer {self.integer}",
                expected="format onnx, integer false",
            )
        if self.shrink and self.format == "compressed-tensors":
            raise ExportError(
                "Sizes of smaller layers have no place in the layout of compressed-tensors",
                got="shrink with format compressed-tensors",
                expected="onnx or packed",
            )
        for package in ("onnx", "onnxscript") if self.format == "onnx" else ():
            require(package, "onnx")


class ExportRun(Callback):
    """Writes the artifact at the end of validation."""

    def __init__(self, options: ExportOptions) -> None:
        self.options = options
        self.result: Exported | None = None
        self._states: list[Mapping[str, Any]] = []

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        states = checkpoint.get("callbacks") or {}
        self._states = [state for key, state in states.items() if key.startswith(PREFIX)]

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The figures are those of the model as it was compressed, its activations quantized.
        for state in self._states:
            attach(pl_module, inputs_from_state(state.get("activations") or {}))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with torch.inference_mode(False), torch.no_grad():
            weights = compressed_weights(pl_module, self._states)
            self.result = self._write(trainer, pl_module, weights)

    def _write(self, trainer: Trainer, module: LightningModule, weights: Mapping[str, CompressedWeight]) -> Exported:
        options, layers = self.options, tuple(weights)
        shrunk = shrink(module, next(self._samples(trainer, module)), weights) if options.shrink else None
        if options.format == "onnx":
            notes = self._onnx(trainer, module, weights, shrunk)
        elif options.format == "packed":
            notes = _lines(self._packed(module, weights, shrunk).notes)
        else:
            with _folder(options.path):
                notes = _lines(save_compressed_tensors(module, weights, options.path, overwrite=options.overwrite))
        # Of a folder what was written: there may be other files in it.
        files = [options.path / name for name in (WEIGHTS, CONFIG)] if options.path.is_dir() else [options.path]
        notes = (*(str(shrunk).splitlines() if shrunk else ()), *notes)
        return Exported(options.path, sum(file.stat().st_size for file in files), layers, notes)

    def _samples(self, trainer: Trainer, module: LightningModule) -> Iterator[Any]:
        batches = calibration_batches(compat.calibration_source(trainer), self.options.calibration)
        return (onnx_sample(module, compat.to_device(trainer, batch)) for batch in batches)

    def _packed(
        self, module: LightningModule, weights: Mapping[str, CompressedWeight], shrunk: Shrunk | None
    ) -> PackedFile:
        path, overwrite = self.options.path, self.options.overwrite
        if shrunk is None:
            return save_packed(module, weights, path, overwrite=overwrite)
        return save_packed(shrunk.model, shrunk.solutions, path, sizes=shrunk.sizes, overwrite=overwrite)

    def _onnx(
        self,
        trainer: Trainer,
        module: LightningModule,
        weights: Mapping[str, CompressedWeight],
        shrunk: Shrunk | None,
    ) -> tuple[str, ...]:
        options = self.options
        samples = self._samples(trainer, module)
        sample = next(samples)
        model: nn.Module = module
        if shrunk is not None:
            model, weights = shrunk.model, shrunk.solutions
        grids = {name: inputs.grid for name, inputs in attached(model).items()}
        notes: tuple[str, ...] = ()
        if options.linear != "dequantize" and grids:
            notes = (f"ranges of {len(grids)} inputs are left out: linear layers take inputs in floating point",)
            grids = {}
        if not options.integer and grids and (left := set(grids) - _quantized(weights)):
            grids = {name: grid for name, grid in grids.items() if name not in left}
            notes = tuple(f"{name}: activations stay in floating point, as its weight does" for name in sorted(left))
        done = export_onnx(
            model,
            sample,
            options.path,
            solutions=weights,
            activations=grids,
            calibration=[sample, *samples] if options.integer else None,
            activation_bits=options.activation_bits,
            linear=options.linear,
            dynamic_batch=options.dynamic_batch,
            overwrite=options.overwrite,
        )
        return (*notes, *done.notes)


@contextmanager
def _folder(path: Path) -> Iterator[None]:
    """A folder, which goes again when it was not there before and nothing comes into it."""
    made = not path.exists()
    path.mkdir(exist_ok=True)
    try:
        yield
    except BaseException:
        if made:
            with suppress(OSError):
                path.rmdir()
        raise


def _lines(notes: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(f"{name}: {reason}" for name, reason in notes.items())


def _quantized(weights: Mapping[str, CompressedWeight]) -> set[str]:
    return {name for name, weight in weights.items() if weight.codes is not None}


def onnx_sample(module: nn.Module, batch: Any) -> Any:
    """What the model's forward takes of a batch, in the form of an export's sample."""
    inputs = inputs_of(module, batch)
    if isinstance(inputs, (torch.Tensor, Mapping)):
        return inputs
    return tuple(inputs) if takes_each(module, inputs) else (inputs,)


def compressed_weights(module: nn.Module, states: list[Mapping[str, Any]]) -> dict[str, CompressedWeight]:
    """Masks, codes and grids of a checkpoint's compression, from its callbacks' states and the loaded weights.

    Args:
        module: The model with the checkpoint's weights.
        states: States of :class:`~lightning_obc.OBCCallback` in the checkpoint.

    Raises:
        FingerprintError: The states belong to another model. ExportError: A weight is off its grid.
    """
    found: dict[str, CompressedWeight] = {}
    modules = named_layers(module)
    for state in states:
        held = HeldWeights()
        held.load_state_dict(state["layers"])
        for name, layer in held.layers.items():
            adapter = adapter_for(modules[name]) if name in modules else None
            if adapter is None:
                raise FingerprintError(
                    "The checkpoint's compression belongs to another model",
                    got=f"a compressed layer {name!r}",
                    expected=f"one of {list(modules)[1:12]}",
                )
            matrix = adapter.weight_matrix(modules[name]).cpu()
            found[name] = CompressedWeight.from_weight(matrix, layer.mask, layer.grid)
    return found
