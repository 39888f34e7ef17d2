from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_obc.calibration import collect_hessians
from lightning_obc.errors import (
    CalibrationError,
    EmptyCalibrationError,
    LayerNotReachedError,
    NonFiniteError,
    UnsupportedLayerError,
)
from lightning_obc.layers import adapter_for, select_layers


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.5)
        self.depthwise = nn.Conv2d(6, 6, 3, groups=6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.norm(self.conv(x)).relu())
        return self.head(self.depthwise(x).mean((2, 3)))


@pytest.fixture
def model() -> Network:
    torch.manual_seed(0)
    return Network()


def data(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 3, 8, 8, generator=generator) for size in sizes]


def squared_error(model: nn.Module, name: str, batches: list[Tensor], delta: Tensor) -> float:
    """Mean squared output error per sample of one layer, measured on its real inputs."""
    layer, errors = model.get_submodule(name), []
    changed = copy.deepcopy(layer)
    adapter_for(changed).write_weight_(changed, adapter_for(layer).weight_matrix(layer) + delta)
    handle = layer.register_forward_hook(lambda _, args, out: errors.append((changed(args[0]) - out).square().sum()))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    return float(sum(errors)) / sum(len(batch) for batch in batches)


def test_losses_equal_the_output_errors_of_the_real_layers(model: Network) -> None:
    batches = data(5, 3, 4)
    hessians = collect_hessians(model, select_layers(model), batches)
    assert list(hessians) == ["conv", "depthwise", "head"]
    model.eval()
    for name, hessian in hessians.items():
        assert sum(hessian.samples) == 12
        delta = torch.randn_like(adapter_for(model.get_submodule(name)).weight_matrix(model.get_submodule(name)))
        predicted = 0.5 * torch.einsum("gri,gij,grj->", delta.double(), hessian.full(), delta.double())
        assert predicted.item() == pytest.approx(squared_error(model, name, batches, delta), rel=1e-4)


def test_halves_are_the_even_and_odd_samples_of_the_round(model: Network) -> None:
    batches = data(5, 3, 4)
    samples = torch.cat(batches)
    layers = select_layers(model)
    whole = collect_hessians(model, layers, batches)
    for half in (0, 1):
        alone = collect_hessians(model, layers, [samples[half::2]])
        for name in layers:
            assert whole[name].samples == (6, 6)
            torch.testing.assert_close(whole[name].halves[half], alone[name].halves.sum(0), rtol=1e-5, atol=1e-4)


def test_every_round_counts_and_keeps_the_halves(model: Network) -> None:
    layers, batches = select_layers(model), data(3, 2)
    one, three = (collect_hessians(model, layers, batches, rounds=r) for r in (1, 3))
    for name in layers:
        assert one[name].samples == (3, 2)
        assert three[name].samples == (9, 6)
        torch.testing.assert_close(three[name].halves, 3 * one[name].halves)
        torch.testing.assert_close(three[name].full(), one[name].full())


def test_rounds_are_announced_to_the_batches(model: Network) -> None:
    seen: list[int] = []

    class Rounds(list[Tensor]):
        def set_round(self, number: int) -> None:
            seen.append(number)

    collect_hessians(model, select_layers(model), Rounds(data(2)), rounds=3)
    assert seen == [0, 1, 2, 0]  # And back, so that other passes see the first augmentation.


def test_the_model_and_the_random_states_are_undisturbed(model: Network) -> None:
    model.train()
    model.norm.eval()
    model.register_buffer("calls", torch.zeros(1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]

    def noisy(network: Network, batch: Tensor) -> None:
        assert not any(module.training for module in network.modules())
        assert not torch.is_grad_enabled()
        network.calls += 1
        network(batch + torch.rand(1) + np.random.rand() + random.random())

    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    collect_hessians(model, select_layers(model), data(4, 4), forward=noisy)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks or module._forward_pre_hooks_with_kwargs for module in model.modules())


def test_everything_is_put_back_after_an_error(model: Network) -> None:
    model.train()

    def failing(network: nn.Module, batch: Tensor) -> None:
        network(batch)
        raise RuntimeError("in the middle")

    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="in the middle"):
        collect_hessians(model, select_layers(model), data(2), forward=failing)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_inference_mode_gives_the_same_and_nothing_poisoned(model: Network) -> None:
    layers, batches = select_layers(model), data(3)
    expected = collect_hessians(model, layers, batches)
    with torch.inference_mode():
        hessians = collect_hessians(model, layers, batches)
    for name in layers:
        assert torch.equal(hessians[name].halves, expected[name].halves)
        assert not hessians[name].halves.is_inference()
    model(data(2)[0]).sum().backward()


def test_compiled_modules_are_reached(model: Network) -> None:
    model.eval()
    layers, batches = select_layers(model), data(2)
    expected = collect_hessians(model, layers, batches)
    compiled = torch.compile(model, backend="eager")
    compiled(batches[0])
    hessians = collect_hessians(compiled, select_layers(compiled), batches)
    for name in layers:
        assert torch.equal(hessians[name].halves, expected[name].halves)


class TestForward:
    """How batches of different kinds find their way into the model."""

    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.seen: list[set[str]] = []

        def forward(self, values: Tensor, scale: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
            assert labels is None
            return self.linear(input=values if scale is None else values * scale)

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda x: x,
            lambda x: (x, torch.zeros(len(x))),
            lambda x: [x, torch.zeros(len(x)), "name"],
            lambda x: {"values": x, "labels": torch.zeros(len(x)), "other": "text"},
            lambda x: ({"values": x}, torch.zeros(len(x))),
        ],
    )
    def test_batches(self, wrap: Any) -> None:
        x = torch.randn(4, 3)
        model = self.Keywords()
        hessian = collect_hessians(model, {"linear": model.linear}, [wrap(x)])["linear"]
        torch.testing.assert_close(hessian.full()[0], (2 / 4 * x.T @ x).double(), rtol=1e-5, atol=1e-6)

    def test_calibration_step_comes_first(self) -> None:
        class Stepped(self.Keywords):
            def calibration_step(self, batch: dict[str, Tensor]) -> None:
                self(batch["anything"], scale=torch.tensor(2.0))

        x, model = torch.randn(4, 3), Stepped()
        hessian = collect_hessians(model, {"linear": model.linear}, [{"anything": x}])["linear"]
        torch.testing.assert_close(hessian.full()[0], (8 / 4 * x.T @ x).double(), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("container", [tuple, list])
    def test_a_forward_of_several_arguments_takes_each_element_of_the_first(self, container: Any) -> None:
        class Lengths(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(3, 3)

            def forward(self, x: Tensor, lengths: Tensor, scale: float = 1.0) -> Tensor:
                return self.linear(x * (torch.arange(x.shape[1]) < lengths[:, None])[..., None])

        x, lengths, model = torch.randn(4, 5, 3), torch.tensor([5, 2, 3, 1]), Lengths()
        batch = (container([x, lengths]), torch.zeros(4))
        hessian = collect_hessians(model, {"linear": model.linear}, [batch])["linear"]
        seen = torch.cat([sample[:length] for sample, length in zip(x, lengths, strict=True)])
        assert hessian.samples == (2, 2)
        torch.testing.assert_close(hessian.full()[0], (2 / 4 * seen.T @ seen).double(), rtol=1e-5, atol=1e-6)


def test_a_layer_called_twice_gathers_both_and_counts_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.linear(x))

    model, x = Twice(), torch.randn(4, 3)
    y = model.linear(x).detach()
    hessian = collect_hessians(model, {"linear": model.linear}, [x])["linear"]
    assert hessian.samples == (2, 2)
    torch.testing.assert_close(hessian.full()[0], (2 / 4 * (x.T @ x + y.T @ y)).double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("folded", "parity"), [(lambda x: x.flatten(0, 1), True), (lambda x: x[:, 0][1:], False)])
def test_leading_dimensions_that_are_not_the_batch(folded: Any, parity: bool) -> None:
    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(folded(x))

    model, batches = Folded(), [torch.randn(4, 2, 3), torch.randn(4, 2, 3)]
    hessian = collect_hessians(model, {"linear": model.linear}, batches)["linear"]
    if parity:
        even = torch.cat([batch[0::2].flatten(0, 1) for batch in batches])
    else:
        even = folded(batches[0])
    torch.testing.assert_close(hessian.halves[0, 0], (even.T @ even).double(), rtol=1e-5, atol=1e-6)
    assert hessian.samples == (4, 4)


class TestBadInput:
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("rounds", [1, 2])
    def test_non_finite_activations_name_the_layer_and_the_batch(
        self, model: Network, value: float, rounds: int
    ) -> None:
        batches = data(2, 2, 2)
        batches[1][0, 0, 3, 3] = value
        with pytest.raises(NonFiniteError, match=r"'conv'.*batch 1"):
            collect_hessians(model, select_layers(model), batches, rounds=rounds)

    def test_a_layer_that_makes_infinities_is_not_blamed(self, model: Network) -> None:
        with torch.no_grad():
            model.conv.bias.fill_(float("inf"))
        with pytest.raises(NonFiniteError, match=r"'depthwise'.*batch 0"):
            collect_hessians(model, select_layers(model), data(2))

    def test_no_batches(self, model: Network) -> None:
        with pytest.raises(EmptyCalibrationError, match="no sample"):
            collect_hessians(model, select_layers(model), [])

    def test_an_iterator_cannot_serve_two_rounds(self, model: Network) -> None:
        def once() -> Iterator[Tensor]:
            yield from data(2)

        with pytest.raises(CalibrationError, match="only once"):
            collect_hessians(model, select_layers(model), once(), rounds=2)

    def test_a_layer_never_reached(self, model: Network) -> None:
        model.spare = nn.Linear(2, 2)
        with pytest.raises(LayerNotReachedError, match="Got: spare"):
            collect_hessians(model, select_layers(model), data(2))

    def test_a_module_without_adapter(self, model: Network) -> None:
        with pytest.raises(UnsupportedLayerError, match="norm"):
            collect_hessians(model, {"norm": model.norm}, data(2))

    def test_a_batch_without_tensors(self, model: Network) -> None:
        with pytest.raises(CalibrationError, match="size of a batch"):
            collect_hessians(model, select_layers(model), ["text"])


def test_progress_counts_batches(model: Network) -> None:
    calls: list[tuple[str, float, float]] = []
    collect_hessians(model, select_layers(model), data(2, 2), rounds=2, progress=lambda *call: calls.append(call))
    assert calls == [("calibration", done, 4) for done in (1, 2, 3, 4)]


def test_the_same_batches_give_the_same_bits(model: Network) -> None:
    layers, batches = select_layers(model), data(3, 4)
    first, second = (collect_hessians(model, layers, batches) for _ in range(2))
    assert all(torch.equal(first[name].halves, second[name].halves) for name in layers)


class TestFunctionalUse:
    """Layers whose weight is used without a call of the module."""

    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = nn.functional.linear(self.first(x), self.second.weight, bias=self.second.bias)
            return nn.functional.linear(input=hidden, weight=self.first.weight)

    def test_all_uses_count_once(self) -> None:
        model, x = self.Functional().double(), torch.randn(4, 3, dtype=torch.float64)
        first = model.first(x).detach()
        second = model.second(first).detach()
        hessians = collect_hessians(model, select_layers(model), [x])
        torch.testing.assert_close(hessians["first"].full()[0], 2 / 4 * (x.T @ x + second.T @ second))
        torch.testing.assert_close(hessians["second"].full()[0], 2 / 4 * first.T @ first)
        assert hessians["second"].samples == (2, 2)

    def test_shifted_window_attention_is_reached(self) -> None:
        swin = pytest.importorskip("torchvision.models.swin_transformer")
        block = swin.SwinTransformerBlock(8, 2, window_size=[4, 4], shift_size=[2, 2]).eval()
        x, seen = torch.randn(2, 8, 8, 8), []
        hessians = collect_hessians(block, select_layers(block), [x])
        block.norm1.register_forward_hook(lambda _, args, out: seen.append(out.reshape(-1, 8)))
        block(x)
        moment = (seen[0].T @ seen[0]).detach().double()[None]
        torch.testing.assert_close(hessians["attn.qkv"].full(), moment, rtol=1e-5, atol=1e-4)
        assert "attn.proj" in hessians


@pytest.mark.parametrize("folded", [False, True])
def test_padded_tokens_add_nothing(folded: bool) -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.pooled = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            hidden = self.token(x.flatten(0, 1)).reshape(x.shape) if folded else self.token(x)
            return self.pooled(hidden[:, 0])

    model, x = Tokens().double(), torch.randn(3, 4, 3, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    batch = {"x": x, "attention_mask": mask, "labels": torch.zeros(3)}
    hessians = collect_hessians(model, select_layers(model), [batch])
    kept = x[mask.bool()]
    torch.testing.assert_close(hessians["token"].full()[0], 2 / 3 * kept.T @ kept)
    pooled = model.token(x)[:, 0].detach()
    torch.testing.assert_close(hessians["pooled"].full()[0], 2 / 3 * pooled.T @ pooled)
    assert hessians["token"].samples == (2, 1)
