"""Networks as people write them: what a plan promises is done, in the plainest mode and in the most involved one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import lightning_obc as obc
from lightning_obc.errors import CalibrationError, LayerNotFoundError, LayerNotReachedError
from lightning_obc.layers import adapter_for, select_layers


class Vision(nn.Module):
    """Patches, tokens and scales that are parameters of the model itself, and attention by one packed linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(4, 16, 4, 4)
        self.position, self.token = nn.Parameter(torch.randn(1, 17, 16)), nn.Parameter(torch.zeros(1, 1, 16))
        self.gamma = nn.Parameter(torch.full((16,), 0.5))
        self.norm, self.qkv, self.project = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        x = x + self.gamma * self.project(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head((x + self.mlp(x))[:, 0])


class Encoder(nn.Module):
    """``nn.TransformerEncoder`` on padded sentences; takes and returns mappings."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 16)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
        self.head = nn.Linear(16, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        states = self.encoder(self.words(input_ids), src_key_padding_mask=attention_mask == 0)
        return {"logits": self.head(states[:, 0])}


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.GroupNorm(4, 8), nn.SiLU())
        self.middle = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.up = nn.ConvTranspose2d(16, 8, 3, 2, 1, output_padding=1)
        self.out = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        return self.out(torch.cat([self.up(self.middle(skip)), skip], 1))


class Tagger(nn.Module):
    """Packed sentences through an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8, padding_idx=0)
        self.lstm = nn.LSTM(8, 8, 2, bidirectional=True, batch_first=True, dropout=0.1)
        self.tags = nn.Linear(16, 4)

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.words(words), lengths, batch_first=True, enforce_sorted=False)
        return self.tags(pad_packed_sequence(self.lstm(packed)[0], batch_first=True)[0])


class Language(nn.Module):
    """An output layer tied to the embedding, and one block that is called again and again."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.block = nn.Embedding(20, 8), nn.Sequential(nn.Linear(8, 8), nn.GELU())
        self.blocks = nn.ModuleList([self.block] * 3)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class Experts(nn.Module):
    """Tokens are sent to the expert that a layer chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.choose, self.head = nn.Linear(8, 3), nn.Linear(8, 4)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        choice, y = self.choose(x).argmax(-1), torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            if bool((choice == index).any()):
                y[choice == index] = expert(x[choice == index])
        return self.head(y)


def plain(**options: Any) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.Flatten(),
        nn.Linear(72, 4),
    ).to(**options)  # fmt: skip


def vocoder() -> nn.Module:
    layers = nn.Conv1d(4, 8, 3), nn.ConvTranspose1d(8, 8, 4, 2), nn.Conv1d(8, 4, 3)
    first, second, third = (parametrizations.weight_norm(layer) for layer in layers)
    return nn.Sequential(first, nn.LeakyReLU(), second, nn.LeakyReLU(), third)


def sentences() -> dict[str, Tensor]:
    mask = (torch.arange(9) < torch.randint(4, 10, (8, 1))).long()
    return {"input_ids": torch.randint(0, 20, (8, 9)), "attention_mask": mask, "labels": torch.zeros(8)}


def tagged() -> dict[str, Tensor]:
    return {"words": torch.randint(0, 20, (8, 9)), "lengths": torch.tensor([9, 3, 4, 5, 6, 7, 8, 9])}


def images() -> Tensor:
    return torch.randn(8, 4, 8, 8)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], list[str]]] = {
    "vision": (Vision, lambda: torch.randn(8, 4, 16, 16), [""]),
    "encoder": (Encoder, sentences, []),
    "u-net": (UNet, images, []),
    "tagger": (Tagger, tagged, []),
    "language": (Language, lambda: torch.randint(0, 20, (8, 6)), []),
    "vocoder": (vocoder, lambda: torch.randn(8, 4, 12), []),
    "compiled": (lambda: torch.compile(plain(), backend="eager"), images, []),
    "channels last": (lambda: plain(memory_format=torch.channels_last), images, []),
    "bfloat16": (lambda: plain(dtype=torch.bfloat16), lambda: images().bfloat16(), []),
    "frozen": (lambda: plain().requires_grad_(False), images, []),
}
CALIBRATIONS = [obc.Calibration(), obc.Calibration(mode="asymmetric", together="block", bias=True, cache="10 MiB")]


@pytest.mark.parametrize("spec", CALIBRATIONS, ids=lambda spec: spec.mode)
@pytest.mark.parametrize("name", NETWORKS)
def test_what_the_plan_promises_is_done(name: str, spec: obc.Calibration) -> None:
    torch.manual_seed(0)
    make, batch, left = NETWORKS[name]
    model, batches = make(), [batch() for _ in range(2)]
    before = {key: (id(p), p.dtype, p.stride(), p.requires_grad) for key, p in model.named_parameters()}
    stages = [obc.Prune("2:4", misfit="skip"), obc.Quantize(4)]
    plan = obc.plan(model, stages, batches[0], calibration=spec)
    assert list(plan.left_dense) == left
    assert ("left dense: the model itself" in str(plan)) == (left == [""])
    report = obc.compress(model, batches, stages, calibration=spec, on_failure="raise")
    for promised, done in zip(plan.stages, report.stages, strict=True):
        assert [layer.name for layer in promised.plan.layers] == [layer.name for layer in done.layers]
        assert all(layer.compressed for layer in done.layers)
    assert {key: (id(p), p.dtype, p.stride(), p.requires_grad) for key, p in model.named_parameters()} == before
    pruned = {layer.name for layer in report.stages[0].layers}
    for key, module in select_layers(model).items():
        matrix = adapter_for(module).weight_matrix(module)
        assert key not in pruned or int((matrix.unflatten(-1, (-1, 4)) != 0).sum(-1).max()) <= 2
        points = (matrix * 1e5).round() if name == "vocoder" else matrix
        assert all(len(row.unique()) <= 16 for row in points.flatten(0, 1))


def test_layers_whose_inputs_are_chosen_by_compressed_ones_are_kept_and_the_run_goes_on() -> None:
    torch.manual_seed(0)
    model, x = Experts(), list(torch.randn(64, 8).split(16))
    dense = copy.deepcopy(model.state_dict())
    report = obc.compress(model, x, obc.Prune("2:4"), calibration=obc.Calibration(mode="sequential"))
    rows = report.layers
    kept = [name for name, row in rows.items() if not row.compressed]
    assert kept
    assert set(kept) <= {f"experts.{index}" for index in range(3)}
    for name in kept:
        assert 'use Calibration(mode="independent")' in rows[name].status
        assert torch.equal(model.state_dict()[f"{name}.weight"], dense[f"{name}.weight"])
    assert rows["choose"].compressed
    assert rows["head"].compressed
    fresh = Experts()
    fresh.load_state_dict(dense)
    with pytest.raises(obc.errors.OBCError, match="experts"):
        obc.compress(fresh, x, obc.Prune("2:4"), calibration=obc.Calibration(mode="sequential"), on_failure="raise")


def test_layers_never_reached_are_all_named_before_anything_changes() -> None:
    model, x = Experts(), torch.randn(16, 8)
    with torch.no_grad():
        model.choose.bias.copy_(torch.tensor([100.0, 0.0, 0.0]))
    before = copy.deepcopy(model.state_dict())
    for spec in CALIBRATIONS:
        with pytest.raises(LayerNotReachedError, match=r"experts\.1, experts\.2"):
            obc.compress(model, x, obc.Quantize(4), calibration=spec)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_errors_of_the_model_say_what_it_was_called_with() -> None:
    with pytest.raises(CalibrationError, match=r"same dtype.*pass forward=") as caught:
        obc.compress(nn.Sequential(nn.Linear(4, 4).bfloat16()), torch.randn(8, 4), obc.Quantize(4))
    assert "it fails in layer '0' (Linear), which gets [8, 4] float32" in str(caught.value)
    assert type(caught.value.__cause__) is RuntimeError


def test_a_model_without_supported_layers_says_why() -> None:
    with pytest.raises(LayerNotFoundError, match="0: its weight is not initialised yet; run one batch first"):
        obc.compress(nn.Sequential(nn.LazyLinear(4)), torch.randn(8, 4), obc.Quantize(4))
