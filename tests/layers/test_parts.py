"""Modules that own several weights: attention and recurrent layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_obc.calibration import collect_hessians
from lightning_obc.layers import LayerPart, adapter_for, select_layers, sharing_modules, unsupported_layers


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, **options)
        self.arguments: dict[str, Any] = {}

    def forward(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        query, key, value = batch
        return self.attention(query, key, value=value, **self.arguments)[0]


def attention_inputs(batch_first: bool = True, kdim: int = 6, vdim: int = 6) -> list[Tensor]:
    tensors = [torch.randn(3, length, size).double() for length, size in ((4, 6), (5, kdim), (5, vdim))]
    return tensors if batch_first else [x.transpose(0, 1).contiguous() for x in tensors]


def moment(x: Tensor, n: int) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    return 2 / n * flat.T @ flat


def predicted(hessian: Tensor, delta: Tensor) -> Tensor:
    return 0.5 * torch.einsum("gri,gij,grj->", delta, hessian, delta)


ATTENTION = [
    {},
    {"batch_first": True},
    {"batch_first": True, "bias": False},
    {"batch_first": True, "kdim": 4, "vdim": 3},
    {"kdim": 4},
    {"batch_first": True, "add_bias_kv": True, "add_zero_attn": True},
]


@pytest.mark.parametrize("options", ATTENTION)
def test_attention(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Attention(**options).double().eval()
    batch = attention_inputs(options.get("batch_first", False), options.get("kdim", 6), options.get("vdim", 6))
    layers = select_layers(model)
    packed = "kdim" not in options
    names = ["in_proj"] if packed else ["q_proj", "k_proj", "v_proj"]
    assert list(layers) == [f"attention.{name}" for name in (*names, "out_proj")]
    # The batch is what the collector counts: three samples, wherever they lie in the attention's inputs.
    hessians = collect_hessians(model, layers, [(torch.zeros(3), batch)], forward=lambda m, b: m(b[1]))
    assert all(sum(hessian.samples) == 3 for hessian in hessians.values())
    found = torch.cat([hessians[f"attention.{name}"].full() for name in names]) if packed else None
    for index, name in enumerate(("q", "k", "v")):
        expected = moment(batch[index], 3)
        got = found[index] if found is not None else hessians[f"attention.{name}_proj"].full()[0]
        torch.testing.assert_close(got, expected)

    part = layers["attention.out_proj"]
    delta = torch.randn(1, 6, 6).double()
    changed = copy.deepcopy(model)
    target = select_layers(changed)["attention.out_proj"]
    adapter_for(target).write_weight_(target, adapter_for(part).weight_matrix(part) + delta)
    error = (changed(batch) - model(batch)).square().sum() / 3
    torch.testing.assert_close(predicted(hessians["attention.out_proj"].full(), delta), error.detach())


def test_packed_rows_are_query_key_value_and_the_parameter_stays() -> None:
    model = Attention()
    part = select_layers(model, ["attention.in_proj"])["attention.in_proj"]
    adapter, parameter = adapter_for(part), model.attention.in_proj_weight
    matrix = adapter.weight_matrix(part)
    matrix[1] = 0
    adapter.write_weight_(part, matrix)
    assert model.attention.in_proj_weight is parameter is adapter.weight(part)
    assert parameter[6:12].abs().sum() == 0
    assert bool((parameter[:6] != 0).all())
    assert bool((parameter[12:] != 0).all())


def test_self_attention_with_masks_inside_an_encoder_layer() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True).double().eval()
    x = torch.randn(3, 4, 6).double()
    mask = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 1, 1]]).bool()
    layers = select_layers(layer)
    assert list(layers) == ["self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2"]
    hessians = collect_hessians(layer, layers, [x], forward=lambda m, b: m(b, src_key_padding_mask=mask))
    for group in range(3):
        torch.testing.assert_close(hessians["self_attn.in_proj"].full()[group], moment(x, 3))
    for half in (0, 1):
        even = x[half::2].reshape(-1, 6)
        torch.testing.assert_close(hessians["self_attn.in_proj"].halves[half, 2], even.T @ even)
    attention = layer.self_attn
    changed = copy.deepcopy(attention)
    delta = torch.randn(1, 6, 6).double()
    with torch.no_grad():
        changed.out_proj.weight += delta[0]
        error = changed(x, x, x, key_padding_mask=mask)[0] - attention(x, x, x, key_padding_mask=mask)[0]
    torch.testing.assert_close(predicted(hessians["self_attn.out_proj"].full(), delta), error.square().sum() / 3)
    assert torch.backends.mha.get_fastpath_enabled()


def test_the_weights_and_hooks_of_attention_are_undisturbed() -> None:
    model = Attention(batch_first=True).double()
    before = copy.deepcopy(model.state_dict())
    calls: list[int] = []
    model.attention.register_forward_hook(lambda *_: calls.append(1))
    collect_hessians(model, select_layers(model), [tuple(attention_inputs())], forward=lambda m, b: m(b))
    assert calls == [1]
    assert isinstance(model.attention.out_proj, nn.Linear)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.attention._forward_pre_hooks


def reference_run(module: Any, x: Tensor, hx: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
    """The recurrences written out: the outputs, and what every projection is multiplied with, ``[N, L, columns]``."""
    lstm, n = isinstance(module, nn.LSTM), x.shape[0]
    directions = ["", "_reverse"] if module.bidirectional else [""]
    seen: dict[str, Tensor] = {}
    for layer in range(module.num_layers):
        outputs = []
        for index, suffix in enumerate(directions):
            end = f"_l{layer}{suffix}"
            state = layer * len(directions) + index
            w_ih, w_hh = getattr(module, "weight_ih" + end), getattr(module, "weight_hh" + end)
            b_ih = getattr(module, "bias_ih" + end, torch.zeros(()))
            b_hh = getattr(module, "bias_hh" + end, torch.zeros(()))
            h = x.new_zeros(n, w_hh.shape[1]) if hx is None else (hx[0] if lstm else hx)[state]
            c = x.new_zeros(n, module.hidden_size) if hx is None or not lstm else hx[1][state]
            steps: list[Tensor] = [torch.empty(0)] * x.shape[1]
            before: list[Tensor] = [torch.empty(0)] * x.shape[1]
            inner: list[Tensor] = [torch.empty(0)] * x.shape[1]
            order = range(x.shape[1]) if not suffix else reversed(range(x.shape[1]))
            for t in order:
                before[t] = h
                gates_x, gates_h = x[:, t] @ w_ih.T + b_ih, h @ w_hh.T + b_hh
                if lstm:
                    i, f, g, o = (gates_x + gates_h).chunk(4, -1)
                    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                    h = o.sigmoid() * c.tanh()
                    inner[t] = h
                    h = h @ getattr(module, "weight_hr" + end).T if module.proj_size else h
                else:
                    (rx, zx, nx), (rh, zh, nh) = gates_x.chunk(3, -1), gates_h.chunk(3, -1)
                    r, z = (rx + rh).sigmoid(), (zx + zh).sigmoid()
                    h = (1 - z) * (nx + r * nh).tanh() + z * h
                steps[t] = h
            seen["weight_ih" + end], seen["weight_hh" + end] = x, torch.stack(before, 1)
            if lstm and module.proj_size:
                seen["weight_hr" + end] = torch.stack(inner, 1)
            outputs.append(torch.stack(steps, 1))
        x = torch.cat(outputs, -1)
    return x, seen


RECURRENT: list[tuple[type[nn.Module], dict[str, Any]]] = [
    (nn.LSTM, {}),
    (nn.LSTM, {"batch_first": True, "num_layers": 2}),
    (nn.LSTM, {"num_layers": 2, "bidirectional": True, "bias": False, "dropout": 0.5}),
    (nn.LSTM, {"num_layers": 2, "proj_size": 2, "batch_first": True}),
    (nn.LSTM, {"num_layers": 2, "proj_size": 3, "bidirectional": True, "bias": False}),
    (nn.GRU, {"batch_first": True}),
    (nn.GRU, {"num_layers": 3, "bidirectional": True}),
]


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize(("kind", "options"), RECURRENT)
def test_recurrent(kind: type[nn.Module], options: dict[str, Any], with_state: bool) -> None:
    torch.manual_seed(0)
    module: Any = kind(3, 4, **options).double().eval()
    x, n = torch.randn(3, 5, 3).double(), 3
    states = module.num_layers * (2 if module.bidirectional else 1)
    hidden, cell = (torch.randn(states, n, size).double() for size in (module.proj_size or 4, 4))
    hx = None if not with_state else (hidden, cell) if kind is nn.LSTM else hidden
    given = x if module.batch_first else x.transpose(0, 1)
    outputs, expected = reference_run(module, x, hx)
    real = module(given, hx)[0]
    torch.testing.assert_close(outputs, real if module.batch_first else real.transpose(0, 1))
    layers = select_layers(module)
    assert list(layers) == [name for name in module._flat_weights_names if name.startswith("weight_")]
    hessians = collect_hessians(module, layers, [x], forward=lambda m, b: m(given, hx))
    for name, hessian in hessians.items():
        torch.testing.assert_close(hessian.full()[0], moment(expected[name].detach(), n))
        even = expected[name][0::2].detach()
        torch.testing.assert_close(hessian.halves[0, 0], moment(even, 2))


@pytest.mark.parametrize(("kind", "options"), [(nn.LSTM, {}), (nn.LSTM, {"proj_size": 2}), (nn.GRU, {})])
def test_packed_sequences_are_taken_as_long_as_they_are(kind: type[nn.Module], options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module: Any = kind(3, 4, num_layers=2, bidirectional=True, batch_first=True, **options).double().eval()
    x, lengths = torch.randn(3, 5, 3).double(), torch.tensor([2, 5, 3])
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    hessians = collect_hessians(module, select_layers(module), [packed])
    alone = [reference_run(module, x[i : i + 1, :length])[1] for i, length in enumerate(lengths)]
    for name, hessian in hessians.items():
        expected = sum(moment(seen[name].detach(), 3) for seen in alone)
        torch.testing.assert_close(hessian.full()[0], expected)
        torch.testing.assert_close(hessian.halves[1, 0], moment(alone[1][name].detach(), 2))


def test_selection_of_parts() -> None:
    model = nn.ModuleDict(
        {"mha": nn.MultiheadAttention(4, 2), "rnn": nn.LSTM(4, 4, proj_size=2), "fc": nn.Linear(4, 4)}
    )
    everything = ["mha.in_proj", "mha.out_proj", "rnn.weight_ih_l0", "rnn.weight_hh_l0", "rnn.weight_hr_l0", "fc"]
    assert list(select_layers(model)) == everything
    assert list(select_layers(model, ["mha"])) == everything[:2]
    assert list(select_layers(model, ["MultiheadAttention"])) == everything[:2]
    assert list(select_layers(model, ["*.weight_hh*"])) == ["rnn.weight_hh_l0"]
    assert list(select_layers(model, exclude=["torch.nn.LSTM", "mha.in_proj"])) == ["mha.out_proj", "fc"]
    assert unsupported_layers(model) == {}
    assert all(not others for others in sharing_modules(model, select_layers(model)).values())


def test_a_part_is_no_part_of_the_model() -> None:
    model = Attention()
    part = select_layers(model)["attention.in_proj"]
    assert isinstance(part, LayerPart)
    assert part.owner is model.attention
    assert list(part.parameters()) == []
    assert list(part.children()) == []


def test_an_attention_with_a_forward_of_its_own_is_listed() -> None:
    class Own(nn.MultiheadAttention):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x, x, x)[0]

    model = nn.Sequential(Own(4, 2), nn.Linear(4, 4))
    assert "overrides the forward of MultiheadAttention" in unsupported_layers(model)["0"]
