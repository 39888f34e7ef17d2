"""Models of transformers: small, with random weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_obc as obc
from lightning_obc.layers import select_layers, unsupported_layers

transformers = pytest.importorskip("transformers", reason="needs the extra 'transformers'")


def bert() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    return transformers.BertModel(transformers.BertConfig(vocab_size=50, max_position_embeddings=12, **sizes)).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 12}
    config = transformers.GPT2Config(vocab_size=50, use_cache=False, **sizes)
    return transformers.GPT2LMHeadModel(config).eval()


def batches() -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    ids = torch.randint(1, 50, (48, 10))
    mask = (torch.arange(10) < torch.randint(4, 11, (48, 1))).long()
    return [{"input_ids": a, "attention_mask": b} for a, b in zip(ids.split(16), mask.split(16), strict=True)]


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(**batch)[0][batch["attention_mask"].bool()] for batch in batches()])


@pytest.mark.parametrize("make", [bert, gpt2])
def test_every_weight_is_covered(make: Any) -> None:
    model = make()
    assert unsupported_layers(model) == {}
    weights = {id(p) for p in model.parameters() if p.dim() > 1}
    assert {id(module.weight) for module in select_layers(model).values()} == weights


@pytest.mark.parametrize("make", [bert, gpt2])
@pytest.mark.parametrize("mode", ["independent", "sequential", "asymmetric"])
def test_modes(make: Any, mode: Any) -> None:
    model, dense = make(), make()
    spec = obc.Calibration(mode=mode, together="block", cache=None if mode == "independent" else "1 MiB")
    stages = [obc.Prune("2:4"), obc.Quantize(8)]
    report = obc.compress(model, batches(), stages, calibration=spec, on_failure="raise")
    assert list(model.state_dict()) == list(dense.state_dict())
    assert any("looked up" in reason for reason in report.stages[0].skipped.values())
    for name, module in select_layers(model, exclude=["Embedding"]).items():
        matrix = module.weight.T if type(module).__name__ == "Conv1D" else module.weight
        assert bool(((matrix.reshape(-1, 4) == 0).sum(1) >= 2).all()), name
    change = (output(model) - output(dense)).square().sum() / output(dense).square().sum()
    assert 0 < float(change) < 0.5


def test_the_cache_changes_nothing() -> None:
    dense, found = bert(), []
    for cache in (None, "10 MiB"):
        model = copy.deepcopy(dense)
        spec = obc.Calibration(mode="asymmetric", cache=cache)
        obc.compress(model, batches(), obc.Quantize(3, layers=["encoder.*"]), calibration=spec, on_failure="raise")
        found.append(model.state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


@pytest.mark.parametrize("make", [bert, gpt2])
@pytest.mark.parametrize("mode", ["independent", "asymmetric"])
def test_blocks_that_compute_on_another_device_have_the_same_bits(make: Any, mode: Any) -> None:
    dense, found = make(), []
    dense.config.use_cache = True  # Keys and values of all blocks in one object that they hand on.
    for device in (None, "cpu:0"):
        model = copy.deepcopy(dense)
        spec = obc.Calibration(mode=mode, together="block", execution_device=device)
        obc.compress(model, batches(), obc.Quantize(3, solver="gptq"), calibration=spec, on_failure="raise")
        found.append(model.state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_an_output_layer_tied_to_the_embedding_is_one_problem_with_it() -> None:
    model, dense = gpt2(), gpt2()
    assert "lm_head" in select_layers(model)
    assert "transformer.wte" not in select_layers(model)
    report = obc.compress(model, batches(), obc.Quantize(4, layers=["lm_head"]))
    assert model.lm_head.weight is model.transformer.wte.weight
    delta = (model.lm_head.weight - dense.lm_head.weight).detach().double()
    error = 0.0
    for batch in batches():
        with torch.no_grad():
            hidden = dense.transformer(**batch)[0].double()
        real = batch["attention_mask"].bool()
        error += float((hidden[real] @ delta.T).square().sum() + delta[batch["input_ids"][real]].square().sum())
    assert report.layers["lm_head"].loss == pytest.approx(error / 48, rel=1e-5)


def test_a_forward_of_keywords_alone_is_exported(tmp_path: Path) -> None:
    """Its inputs' common length, which the trace checks, has no name in the traced signature."""
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = bert()

        def forward(self, **batch: Tensor) -> Tensor:
            return self.bert(**batch).last_hidden_state

    model = Module().eval()
    batch = {"input_ids": torch.randint(0, 50, (3, 8)), "attention_mask": torch.ones(3, 8, dtype=torch.long)}
    obc.export_onnx(model, batch, tmp_path / "bert.onnx")
    session = ort.InferenceSession(tmp_path / "bert.onnx", providers=["CPUExecutionProvider"])
    more = {key: torch.cat([value, value]) for key, value in batch.items()}
    (found,) = session.run(None, {key: value.numpy() for key, value in more.items()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), model(**more), rtol=1e-4, atol=1e-4)
