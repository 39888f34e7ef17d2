"""Embeddings: rounded to their grids, never pruned; tied to an output layer they are one problem with it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_obc as obc
from lightning_obc.calibration import DenseWeights, collect_hessians, collect_paired
from lightning_obc.errors import LayerNotFoundError, UnsupportedLayerError
from lightning_obc.export import load_packed, save_packed
from lightning_obc.grid_fitting import fit_grid
from lightning_obc.hessian import Hessian
from lightning_obc.layers import select_layers, unsupported_layers
from lightning_obc.metrics import AverageBits, Storage
from lightning_obc.obs import quantize
from lightning_obc.solving import solve_layer
from lightning_obc.specs import IntGrid

VOCABULARY, FEATURES = 11, 6


class Tied(nn.Module):
    """Token embeddings, a layer, and logits by the same weights, as a module or by ``F.linear``."""

    def __init__(self, functional: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, FEATURES)
        self.mix = nn.Linear(FEATURES, FEATURES)
        if not functional:
            self.head = nn.Linear(FEATURES, VOCABULARY, bias=False)
            self.head.weight = self.embedding.weight

    def hidden(self, tokens: Tensor) -> Tensor:
        return torch.tanh(self.mix(self.embedding(tokens)))

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.hidden(tokens), self.embedding.weight)


class TiedModule(Tied):
    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.hidden(tokens))


def tokens_of(samples: int, seed: int = 0) -> Tensor:
    """Some frequent, some rare, and the last two never."""
    generator = torch.Generator().manual_seed(seed)
    weights = 1.0 / torch.arange(1, VOCABULARY - 1).double() ** 2
    return torch.multinomial(weights, samples * 5, replacement=True, generator=generator).reshape(samples, 5)


def embedding_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(VOCABULARY, FEATURES), nn.Linear(FEATURES, 3))


@pytest.mark.parametrize("grid", [3, IntGrid(3, granularity="tensor"), IntGrid(4, granularity="group", group_size=3)])
def test_an_embedding_goes_to_the_nearest_points_and_its_loss_is_the_output_error(grid: Any) -> None:
    model, tokens = embedding_model(), tokens_of(40)
    dense = copy.deepcopy(model)
    report = obc.compress(model, [tokens[:16], tokens[16:]], obc.Quantize(grid, layers=["Embedding"]))
    assert list(model.state_dict()) == list(dense.state_dict())
    row = report.stages[0].layers[0]
    with torch.no_grad():
        error = (model[0](tokens) - dense[0](tokens)).double().square().sum() / len(tokens)
        total = dense[0](tokens).double().square().sum() / len(tokens)
    assert row.loss == pytest.approx(float(error), rel=1e-6)
    assert row.relative_error == pytest.approx(float(error / total), rel=1e-6)
    spec = obc.Quantize(grid).parsed
    nearest = fit_grid(dense[0].weight.detach()[None], spec).quantize(dense[0].weight.detach()[None])[0]
    assert torch.equal(model[0].weight, nearest)
    assert row.bits == spec.bits


def test_padded_tokens_are_not_counted() -> None:
    model, tokens = embedding_model(), tokens_of(6)
    mask = torch.arange(5) < torch.tensor([5, 3, 1, 5, 2, 4])[:, None]
    batch = {"input": tokens, "attention_mask": mask.long()}
    statistic = collect_hessians(model, {"0": model[0]}, [batch])["0"]
    counts = torch.bincount(tokens[mask], minlength=VOCABULARY).double()
    assert torch.equal(statistic.rows.sum(0)[0], counts)
    assert torch.equal(statistic.rows[0, 0], torch.bincount(tokens[::2][mask[::2]], minlength=VOCABULARY).double())
    torch.testing.assert_close(statistic.full()[0], torch.eye(FEATURES).double() * 2 * counts.mean() / 6)


def test_pruning_leaves_embeddings_and_says_so() -> None:
    model, tokens = embedding_model(), tokens_of(16)
    before = model[0].weight.detach().clone()
    plan = obc.plan(model, obc.Prune(0.5), tokens)
    assert "looked up" in plan.left_dense["0"]
    assert "looked up" in str(plan)
    report = obc.compress(model, tokens, obc.Prune(0.5))
    assert [row.name for row in report.stages[0].layers] == ["1"]
    assert torch.equal(model[0].weight, before)
    with pytest.raises(LayerNotFoundError, match="looked up"):
        obc.compress(model, tokens, obc.Prune(0.5, layers=["Embedding"]))


def tied(functional: bool) -> tuple[Tied, str]:
    torch.manual_seed(1)
    return (Tied(True), "embedding") if functional else (TiedModule(), "head")


@pytest.mark.parametrize(
    ("stage", "functional"),
    [
        (obc.Quantize(3), False),
        (obc.Quantize(3), True),
        (obc.Quantize(IntGrid(3, granularity="tensor")), False),
        (obc.Quantize(3, refine=True, damping="auto"), False),
        (obc.Prune(0.4), False),
    ],
)
def test_tied_weights_are_one_problem_with_the_error_of_both_outputs(stage: Any, functional: bool) -> None:
    (model, name), tokens = tied(functional), tokens_of(30)
    dense = copy.deepcopy(model)
    report = obc.compress(model, [tokens[:17], tokens[17:]], stage, calibration=obc.Calibration(memory="100 KiB"))
    rows = {row.name: row for row in report.stages[0].layers}
    assert set(rows) == {name, "mix"}
    hidden = dense.hidden(tokens).detach()
    delta = model.embedding.weight.detach().double() - dense.embedding.weight.detach().double()
    error = (hidden.double() @ delta.T).square().sum() + delta[tokens].square().sum()
    assert rows[name].loss == pytest.approx(float(error) / len(tokens), rel=1e-6)
    assert functional or model.head.weight is model.embedding.weight
    assert torch.equal(F.linear(model.hidden(tokens), model.embedding.weight), model(tokens))


def test_rows_of_tied_weights_are_solved_with_their_own_hessians() -> None:
    """Exactly as the engine solves each row alone; with less joint error than without the embedding's part."""
    torch.manual_seed(3)
    rows, columns, samples = 120, 16, 50
    x, weight = torch.randn(columns, 200).double(), torch.randn(1, rows, columns)
    x *= torch.logspace(0, -2, columns).double()[:, None]
    # A row that is looked up at all is so once, ten times or a hundred times per unit of the products' diagonal.
    scale = (x @ x.T).diagonal().mean()
    counts = scale * torch.tensor([0.0, 0.1, 1.0, 10.0]).double().repeat(rows // 4)
    statistic = Hessian(torch.stack([x @ x.T] * 2)[:, None], (25, 25), rows=torch.stack([counts] * 2)[:, None])
    hessians = 2 * (2 / samples) * (x @ x.T + counts[:, None, None] * torch.eye(columns).double())

    def error(solved: Tensor) -> float:
        delta = (solved - weight)[0].double()
        return float(torch.einsum("ri,rij,rj->", delta, hessians, delta) / 2)

    joint = solve_layer(obc.Quantize(3), weight, statistic, columns)
    alone = [quantize(weight[:, [row]], hessians[row], 3) for row in range(rows)]
    assert torch.equal(joint.weight, torch.cat([solution.weight for solution in alone], 1))
    assert joint.loss == pytest.approx(error(joint.weight), rel=1e-6)
    assert joint.loss == pytest.approx(sum(solution.loss for solution in alone), rel=1e-6)
    assert torch.equal(joint.grid.dequantize(joint.codes), joint.weight)
    assert joint.loss < error(quantize(weight, 2 * (2 / samples) * x @ x.T, 3).weight)


@pytest.mark.parametrize("mode", ["sequential", "asymmetric"])
@pytest.mark.parametrize("functional", [False, True])
def test_behind_compressed_layers(mode: Any, functional: bool) -> None:
    (model, name), tokens = tied(functional), tokens_of(60)
    dense = copy.deepcopy(model)
    report = obc.compress(model, tokens, obc.Quantize(3), calibration=obc.Calibration(mode=mode), on_failure="raise")
    row = next(row for row in report.stages[0].layers if row.name == name)
    assert row.compressed
    assert row.loss > 0
    with torch.no_grad():
        assert float((model(tokens) - dense(tokens)).square().mean()) < float(dense(tokens).square().mean())


def test_indices_that_depend_on_earlier_layers_are_refused() -> None:
    class Chooses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score, self.embedding = nn.Linear(4, VOCABULARY), nn.Embedding(VOCABULARY, FEATURES)

        def forward(self, x: Tensor) -> Tensor:
            return self.embedding(self.score(x).argmax(-1))

    model, x = Chooses(), torch.randn(20, 4)
    dense = DenseWeights()
    dense.keep(model.score)
    with torch.no_grad():
        model.score.weight.neg_()
    with pytest.raises(UnsupportedLayerError, match="other rows"):
        collect_paired(model, {"embedding": model.embedding}, [x], dense)


def test_an_embedding_that_rescales_its_rows_is_listed() -> None:
    model = nn.Sequential(nn.Embedding(4, 3, max_norm=1.0), nn.Linear(3, 2))
    assert list(select_layers(model)) == ["1"]
    assert "max_norm" in unsupported_layers(model)["0"]


@pytest.mark.parametrize("functional", [False, True])
def test_packed_file_and_metrics_hold_it(functional: bool, tmp_path: Path) -> None:
    (model, name), tokens = tied(functional), tokens_of(30)
    report = obc.compress(model, tokens, obc.Quantize(4))
    save_packed(model, report.solutions, tmp_path / "small.safetensors")
    other, _ = tied(functional)
    load_packed(other, tmp_path / "small.safetensors")
    assert torch.equal(other.embedding.weight, model.embedding.weight)
    assert torch.equal(other(tokens), model(tokens))
    bits = AverageBits()
    bits.update({name: model.embedding.weight}, {name: Storage(4, None, VOCABULARY)})
    assert 4 <= float(bits.compute()) < 32


@pytest.mark.parametrize("functional", [False, True])
def test_onnx_file_computes_the_same(functional: bool, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    (model, _), tokens = tied(functional), tokens_of(30)
    report = obc.compress(model, tokens, obc.Quantize(4))
    obc.export_onnx(model, tokens[:1], tmp_path / "small.onnx", solutions=report.solutions)
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = runtime.InferenceSession(tmp_path / "small.onnx", options)
    found = session.run(None, {session.get_inputs()[0].name: tokens[:1].numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), model(tokens[:1]).detach(), rtol=1e-5, atol=1e-5)
