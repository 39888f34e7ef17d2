"""The table of layers: small networks that use each of them, and what is really multiplied with their weights.

The oracle is PyTorch itself. Every call of ``F.linear``, ``F.conv2d``, ``F.embedding`` … with the weight in question is
recorded in the dense network and repeated with the compressed weight. Modules that multiply inside of one fused call
(attention, recurrent layers) are written out with the same parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import pack_padded_sequence
from torch.overrides import TorchFunctionMode

from lightning_obc.layers import adapter_for, select_layers

Products = Callable[[nn.Module, Any], dict[str, Tensor]]


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        make: The network.
        inputs: One batch of four samples, as the network takes it.
        products: Of fused modules: by name of a layer, what its problems are multiplied with, ``[g, n, d]``.
        exact: False where writing a weight rounds (parametrizations).
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    products: Products | None = None
    exact: bool = True


class Net(nn.Module):
    """The layer between two things that keep it busy."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Any) -> Tensor:
        found = self.layer(x)
        return torch.tanh(found[0] if isinstance(found, tuple) else found)


class Doubled(nn.Linear):
    """A subclass that keeps the semantics of its parent."""

    def extra_repr(self) -> str:
        return "doubled"


class Shared(nn.Module):
    """One module called twice, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.again = self.layer

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.layer(x).relu())


class Tied(nn.Module):
    """Two modules with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
        self.other.weight = self.layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.layer(x).relu())


class Words(nn.Module):
    """Token embeddings, with an output layer of the same weight if it is tied."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.layer, self.mix = nn.Embedding(12, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 12, bias=False)
        if tied:
            self.head.weight = self.layer.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.layer(tokens))))


class Functional(nn.Module):
    """The weight of a linear layer, used by ``F.linear``."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.layer.weight, self.layer.bias)


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(8, 2, **options)

    def forward(self, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return self.layer(*inputs)[0]


def attention_products(module: Any, inputs: Any) -> dict[str, Tensor]:
    """Attention written out: what its input and output projections multiply."""
    mha = module.layer if isinstance(module, Attention) else module.layer.self_attn
    query, key, value = inputs if isinstance(inputs, tuple) else (inputs,) * 3
    seen = [x if mha.batch_first else x.transpose(0, 1) for x in (query, key, value)]
    packed = mha.in_proj_weight is not None
    names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    weights = mha.in_proj_weight.chunk(3) if packed else [getattr(mha, name) for name in names]
    biases = (None,) * 3 if mha.in_proj_bias is None else mha.in_proj_bias.chunk(3)
    q, k, v = (F.linear(x, w, b) for x, w, b in zip(seen, weights, biases, strict=True))
    heads = [x.unflatten(-1, (mha.num_heads, -1)).transpose(1, 2) for x in (q, k, v)]
    mixed = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    prefix = "layer" if isinstance(module, Attention) else "layer.self_attn"
    flat = [x.flatten(0, 1) for x in seen]
    if packed:
        length = max(len(x) for x in flat)
        # Rows of zeros add nothing to an error.
        found = {"in_proj": torch.stack([F.pad(x, (0, 0, 0, length - len(x))) for x in flat])}
    else:
        found = {f"{label}_proj": x[None] for label, x in zip("qkv", flat, strict=True)}
    found["out_proj"] = mixed.flatten(0, 1)[None]
    return {f"{prefix}.{name}": x for name, x in found.items()}


def recurrent_products(net: Any, inputs: Any) -> dict[str, Tensor]:
    """The recurrences written out step by step: what every projection multiplies."""
    module, found = net.layer, {}
    if isinstance(inputs, nn.utils.rnn.PackedSequence):
        padded, lengths = nn.utils.rnn.pad_packed_sequence(inputs, batch_first=True)
        sequences = [x[:length] for x, length in zip(padded, lengths, strict=True)]
    else:
        sequences = list(inputs if module.batch_first else inputs.transpose(0, 1))
    for sequence in sequences:
        for name, x in _one_sequence(module, sequence).items():
            found.setdefault(f"layer.{name}", []).append(x)
    return {name: torch.cat(parts)[None] for name, parts in found.items()}


def _one_sequence(module: Any, x: Tensor) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    for layer in range(module.num_layers):
        outputs = []
        for suffix in ("", "_reverse") if module.bidirectional else ("",):
            end = f"_l{layer}{suffix}"
            h, c = x.new_zeros(module.proj_size or module.hidden_size), x.new_zeros(module.hidden_size)
            steps: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
            for t in reversed(range(len(x))) if suffix else range(len(x)):
                before = h
                h, inner, c = _step(module, end, x[t], h, c)
                steps[t] = before, inner, h
            before, inner, hidden = (torch.stack([steps[t][i] for t in range(len(x))]) for i in range(3))
            seen |= {f"weight_ih{end}": x, f"weight_hh{end}": before}
            if module.proj_size:
                seen[f"weight_hr{end}"] = inner
            outputs.append(hidden)
        x = torch.cat(outputs, -1)
    return seen


def _step(module: Any, end: str, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden state after one step, the same before its projection, and the cell state."""
    get = lambda name: getattr(module, name + end)  # noqa: E731
    from_x, from_h = get("weight_ih") @ x + get("bias_ih"), get("weight_hh") @ h + get("bias_hh")
    if isinstance(module, nn.GRU):
        (reset, update, new), (reset_h, update_h, new_h) = from_x.chunk(3), from_h.chunk(3)
        gate = torch.sigmoid(update + update_h)
        h = (1 - gate) * torch.tanh(new + torch.sigmoid(reset + reset_h) * new_h) + gate * h
        return h, h, c
    enter, forget, new, out = (from_x + from_h).chunk(4)
    c = forget.sigmoid() * c + enter.sigmoid() * new.tanh()
    inner = out.sigmoid() * c.tanh()
    return (get("weight_hr") @ inner if module.proj_size else inner), inner, c


class Recorded(TorchFunctionMode):
    """Keeps every call of a function of PyTorch in which a weight takes part."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self._weight = weight
        self.calls: list[tuple[Any, list[Any], dict[str, Any]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # Reading an attribute, such as the shape, is a call too.
        if any(value is self._weight for value in args) and getattr(func, "__name__", "") != "__get__":
            self.calls.append((func, list(args), kwargs))
        return func(*args, **kwargs)


@torch.no_grad()
def measured_error(row: Row, dense: nn.Module, small: nn.Module, name: str, batches: list[Any]) -> float:
    """Squared error, per sample, of all that is made with one layer's weight, for the inputs of the dense network."""
    layer, changed = select_layers(dense)[name], select_layers(small)[name]
    adapter, total = adapter_for(layer), 0.0
    for batch in batches:
        if row.products is not None and name in (found := row.products(dense, batch)):
            delta = adapter.weight_matrix(changed) - adapter.weight_matrix(layer)
            total += float((found[name] @ delta.mT).square().sum())
            continue
        # Cached, a parametrized weight is the same tensor here and in the forward pass.
        with parametrize.cached():
            weight = adapter.current(layer)
            with Recorded(weight) as record:
                dense(batch)
        assert record.calls, "the oracle saw no use of the weight"
        for func, args, kwargs in record.calls:
            again = [adapter.current(changed) if value is weight else value for value in args]
            total += float((func(*again, **kwargs) - func(*args, **kwargs)).square().sum())
    return total / (4 * len(batches))


def _images(*size: int, channels: int = 8) -> Callable[[], Tensor]:
    return lambda: torch.randn(4, channels, *size)


def _conv(kind: Any, size: tuple[int, ...], out: int = 8, **options: Any) -> Row:
    return Row(lambda: Net(kind(8, out, **options)), _images(*size))


def _sequence(kind: Any, packed: bool = False, **options: Any) -> Row:
    def inputs() -> Any:
        x = torch.randn(*((4, 5) if options.get("batch_first") else (5, 4)), 8)
        lengths = torch.tensor([5, 2, 4, 1])
        return pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False) if packed else x

    def make() -> nn.Module:
        return PackedNet(kind(8, 8, **options)) if packed else Net(kind(8, 8, **options))

    return Row(make, inputs, recurrent_products)


class PackedNet(Net):
    def forward(self, x: Any) -> Tensor:
        return torch.tanh(self.layer(x)[0].data)


def _attention(kdim: int = 8, vdim: int = 8, same: bool = False, **options: Any) -> Row:
    batch_first = options.get("batch_first", False)
    sizes = {} if (kdim, vdim) == (8, 8) else {"kdim": kdim, "vdim": vdim}

    def inputs() -> Any:
        tensors = [torch.randn(4, length, size) for length, size in ((5, 8), (6, kdim), (6, vdim))]
        tensors = tensors if batch_first else [x.transpose(0, 1) for x in tensors]
        return (tensors[0],) * 3 if same else tuple(tensors)

    return Row(lambda: Attention(**options, **sizes), inputs, attention_products)


def _transformers_conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(8, 8)
    nn.init.normal_(layer.weight, std=0.5)
    return Net(layer)


ROWS: dict[str, Row] = {
    "Linear": Row(lambda: Net(nn.Linear(8, 6)), lambda: torch.randn(4, 8)),
    "Linear, tokens": Row(lambda: Net(nn.Linear(8, 6, bias=False)), lambda: torch.randn(4, 3, 5, 8)),
    "Linear subclass": Row(lambda: Net(Doubled(8, 6)), lambda: torch.randn(4, 8)),
    "Linear, called twice": Row(Shared, lambda: torch.randn(4, 8)),
    "Linear, tied": Row(Tied, lambda: torch.randn(4, 8)),
    "Linear, by F.linear": Row(Functional, lambda: torch.randn(4, 3, 8)),
    "Linear, weight norm": Row(
        lambda: Net(parametrizations.weight_norm(nn.Linear(8, 6))), lambda: torch.randn(4, 8), exact=False
    ),
    "Conv1d": _conv(nn.Conv1d, (9,), kernel_size=3, stride=2, dilation=2, padding=3),
    "Conv1d, weight norm": Row(lambda: Net(parametrizations.weight_norm(nn.Conv1d(8, 8, 3))), _images(7), exact=False),
    "Conv2d": _conv(nn.Conv2d, (6, 5), kernel_size=3, padding=1),
    "Conv2d, 1x1": _conv(nn.Conv2d, (4, 3), kernel_size=1, bias=False),
    "Conv2d, stride and dilation": _conv(nn.Conv2d, (7, 6), kernel_size=(3, 2), stride=(1, 2), dilation=(2, 1)),
    "Conv2d, same": _conv(nn.Conv2d, (5, 6), kernel_size=(3, 5), padding="same"),
    "Conv2d, reflect": _conv(nn.Conv2d, (5, 4), kernel_size=3, padding=1, padding_mode="reflect"),
    "Conv2d, replicate": _conv(nn.Conv2d, (5, 6), kernel_size=3, padding=(2, 1), padding_mode="replicate", stride=2),
    "Conv2d, circular": _conv(nn.Conv2d, (4, 5), kernel_size=3, padding="same", padding_mode="circular"),
    "Conv2d, grouped": _conv(nn.Conv2d, (5, 5), kernel_size=3, padding=1, groups=2),
    "Conv2d, depthwise": _conv(nn.Conv2d, (5, 5), out=16, kernel_size=3, stride=2, groups=8),
    "Conv3d": _conv(nn.Conv3d, (3, 4, 2), kernel_size=(2, 3, 1), stride=(1, 2, 1), padding=(1, 0, 1)),
    "Conv3d, depthwise": _conv(nn.Conv3d, (3, 3, 3), kernel_size=2, groups=8),
    "ConvTranspose1d": _conv(nn.ConvTranspose1d, (5,), kernel_size=4, stride=2, padding=1, output_padding=1),
    "ConvTranspose2d": _conv(nn.ConvTranspose2d, (3, 4), kernel_size=(2, 3), stride=(2, 3)),
    "ConvTranspose2d, output padding": _conv(
        nn.ConvTranspose2d, (3, 3), kernel_size=2, stride=3, output_padding=(2, 1), bias=False
    ),
    "ConvTranspose2d, dilation": _conv(nn.ConvTranspose2d, (4, 3), kernel_size=3, dilation=2, padding=1, stride=2),
    "ConvTranspose2d, grouped": _conv(nn.ConvTranspose2d, (4, 3), kernel_size=3, stride=2, groups=2),
    "ConvTranspose2d, depthwise": _conv(nn.ConvTranspose2d, (3, 3), out=16, kernel_size=3, stride=2, groups=8),
    "ConvTranspose3d": _conv(nn.ConvTranspose3d, (2, 3, 2), kernel_size=2, stride=(1, 2, 2), padding=(0, 1, 0)),
    "MultiheadAttention": _attention(),
    "MultiheadAttention, self, batch first": _attention(batch_first=True, same=True),
    "MultiheadAttention, no bias": _attention(batch_first=True, bias=False),
    "MultiheadAttention, kdim and vdim": _attention(kdim=4, vdim=12, batch_first=True),
    "TransformerEncoderLayer": Row(
        lambda: Net(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)),
        lambda: torch.randn(4, 5, 8),
        attention_products,
    ),
    "LSTM": _sequence(nn.LSTM),
    "LSTM, two layers both ways": _sequence(nn.LSTM, num_layers=2, bidirectional=True, batch_first=True),
    "LSTM, projected": _sequence(nn.LSTM, num_layers=2, proj_size=4, batch_first=True),
    "LSTM, packed": _sequence(nn.LSTM, packed=True, bidirectional=True, batch_first=True),
    "GRU": _sequence(nn.GRU, batch_first=True),
    "GRU, two layers both ways": _sequence(nn.GRU, num_layers=2, bidirectional=True),
    "transformers' Conv1D": Row(_transformers_conv1d, lambda: torch.randn(4, 3, 8)),
    "Embedding": Row(lambda: Words(False), lambda: torch.randint(0, 12, (4, 6))),
    "Embedding, tied to the output": Row(lambda: Words(True), lambda: torch.randint(0, 12, (4, 6))),
}
