"""``nn.LSTM`` and ``nn.GRU``: input, hidden and output projections of every layer and direction.

The error of an input or hidden projection is that of the gates before their nonlinearities.

Index legend: ``N`` samples, ``L`` steps, ``H`` hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from lightning_obc.layers.linear import OneProduct
from lightning_obc.layers.parts import LayerPart, PartAdapter


def recurrent_parts(module: Any) -> dict[str, LayerPart]:
    """``weight_ih_l0``, ``weight_hh_l0``, with ``proj_size`` ``weight_hr_l0``, …, as the module names them."""
    return {
        f"weight_{kind}_l{layer}{suffix}": LayerPart(
            module, f"weight_{kind}_l{layer}{suffix}", RecurrentAdapter(layer, bool(suffix), kind)
        )
        for layer in range(module.num_layers)
        for suffix in (("", "_reverse") if module.bidirectional else ("",))
        for kind in (("ih", "hh", "hr") if module.proj_size else ("ih", "hh"))
    }


class RecurrentAdapter(OneProduct, PartAdapter):
    """One projection of a recurrent layer.

    Args:
        layer: Index of the stacked layer.
        reverse: True for the backward direction.
        kind: ``"ih"``, the projection of the input, ``"hh"``, that of the hidden state, or ``"hr"``, that of an LSTM's
            output with ``proj_size``.
    """

    def __init__(self, layer: int, reverse: bool, kind: str) -> None:
        self._layer, self._reverse, self._kind = layer, reverse, kind

    def normalise_inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        return x

    @torch.no_grad()
    def inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """``[N, L, columns]``: what the projection is multiplied with at every step; zeros after a sequence's end."""
        owner: Any = self.owner(module)
        given = dict(zip(("input", "hx"), args, strict=False)) | kwargs
        x, lengths = _dense(owner, given["input"])
        states = _states(owner, given.get("hx"), x)
        for layer in range(self._layer):
            directions = (False, True) if owner.bidirectional else (False,)
            x = torch.cat([_run(owner, x, lengths, states, layer, reverse) for reverse in directions], dim=-1)
        if self._kind == "ih":
            return _masked(x, lengths)
        outputs = _run(owner, x, lengths, states, self._layer, self._reverse)
        if self._reverse:
            outputs = _flipped(outputs, lengths)
        index = _state_index(owner, self._layer, self._reverse)
        before = torch.cat([states[0][index].unsqueeze(1), outputs[:, :-1]], dim=1)
        if self._kind == "hh":
            return _masked(before, lengths)
        x = _flipped(x, lengths) if self._reverse else x
        suffix = _suffix(self._layer, self._reverse)
        return _masked(_before_projection(owner, x, before, states[1][index], suffix), lengths)


def _dense(owner: Any, x: Tensor | PackedSequence) -> tuple[Tensor, Tensor | None]:
    """The input as ``[N, L, features]``, and the lengths ``[N]`` of packed sequences."""
    if isinstance(x, PackedSequence):
        padded, lengths = pad_packed_sequence(x, batch_first=True)
        return padded, lengths.to(padded.device)
    if x.dim() == 2:
        return x.unsqueeze(0), None
    return (x if owner.batch_first else x.transpose(0, 1)), None


def _states(owner: Any, hx: Any, x: Tensor) -> tuple[Tensor, ...]:
    """Initial states, each ``[layers * directions, N, size]``: hidden, and cell of an LSTM."""
    sizes = (owner.proj_size or owner.hidden_size, owner.hidden_size)[: 2 if isinstance(owner, nn.LSTM) else 1]
    count = owner.num_layers * (2 if owner.bidirectional else 1)
    if hx is None:
        return tuple(x.new_zeros(count, x.shape[0], size) for size in sizes)
    given = hx if isinstance(hx, tuple) else (hx,)
    return tuple(state if state.dim() == 3 else state.unsqueeze(1) for state in given)


def _state_index(owner: Any, layer: int, reverse: bool) -> int:
    return layer * (2 if owner.bidirectional else 1) + int(reverse)


def _run(
    owner: Any, x: Tensor, lengths: Tensor | None, states: tuple[Tensor, ...], layer: int, reverse: bool
) -> Tensor:
    """Outputs ``[N, L, H]`` of one layer in one direction, in the order of time."""
    suffix = _suffix(layer, reverse)
    names = ["weight_ih", "weight_hh"] + (["bias_ih", "bias_hh"] if owner.bias else [])
    weights = [getattr(owner, name + suffix) for name in names + (["weight_hr"] if owner.proj_size else [])]
    index = _state_index(owner, layer, reverse)
    start = [state[index : index + 1].contiguous() for state in states]
    x = _flipped(x, lengths) if reverse else x
    if isinstance(owner, nn.LSTM):
        outputs = torch.lstm(x, start, weights, owner.bias, 1, 0.0, False, False, True)[0]
    else:
        outputs = torch.gru(x, start[0], weights, owner.bias, 1, 0.0, False, False, True)[0]
    return _flipped(outputs, lengths) if reverse else outputs


def _suffix(layer: int, reverse: bool) -> str:
    return f"_l{layer}" + ("_reverse" if reverse else "")


def _before_projection(owner: Any, x: Tensor, before: Tensor, cell: Tensor, suffix: str) -> Tensor:
    """``[N, L, H]`` of an LSTM with ``proj_size``: what the hidden state is before it is projected.

    Args:
        owner: The LSTM.
        x: Inputs ``[N, L, features]``, in the order of steps.
        before: Projected hidden states before every step, ``[N, L, proj_size]``; they are known, so that the gates of
            all steps need no recurrence.
        cell: First cell state ``[N, H]``.
        suffix: Of the parameters' names.
    """
    bias = (lambda name: getattr(owner, name + suffix)) if owner.bias else (lambda name: None)
    gates = F.linear(x, getattr(owner, "weight_ih" + suffix), bias("bias_ih"))
    gates = gates + F.linear(before, getattr(owner, "weight_hh" + suffix), bias("bias_hh"))
    enter, forget, new, out = gates.chunk(4, dim=-1)
    entering, forget = enter.sigmoid() * new.tanh(), forget.sigmoid()
    states = []
    for step in range(x.shape[1]):
        cell = forget[:, step] * cell + entering[:, step]
        states.append(cell)
    return out.sigmoid() * torch.stack(states, dim=1).tanh()


def _flipped(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Every sequence of ``[N, L, features]`` back to front; what lies behind its end stays there."""
    if lengths is None:
        return x.flip(1)
    steps = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    mirrored = lengths.unsqueeze(1) - 1 - steps
    return x.gather(1, torch.where(mirrored >= 0, mirrored, steps).unsqueeze(-1).expand_as(x))


def _masked(x: Tensor, lengths: Tensor | None) -> Tensor:
    if lengths is None:
        return x
    steps = torch.arange(x.shape[1], device=x.device)
    return x * (steps < lengths.unsqueeze(1)).unsqueeze(-1)
