"""Global tuning: its objective against one computed by hand, its bounds, and what it leaves alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_obc.correction import CorrectionReport, tune_global, tune_vectors
from lightning_obc.errors import (
    CalibrationError,
    EmptyCalibrationError,
    LayerNotFoundError,
    LayerNotReachedError,
    NonFiniteError,
    PatternError,
    ShapeError,
    SpecError,
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3)
        self.conv2, self.norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x), inplace=True)
        return self.head(self.drop(F.relu(x + self.norm(self.conv2(x))).mean((2, 3))))


def _nets() -> tuple[Net, Net, list[Tensor]]:
    """A dense net, a copy with half of its weights at zero, and batches."""
    torch.manual_seed(0)
    dense = Net().eval()
    small = copy.deepcopy(dense)
    with torch.no_grad():
        for module in (small.conv1, small.conv2, small.head):
            module.weight[module.weight.abs() < module.weight.abs().median()] = 0
    return dense, small, [torch.randn(6, 3, 8, 8) for _ in range(4)]


LAYERS = ("conv1", "conv2", "head")


def _errors(dense: Net, small: Net, batches: list[Tensor]) -> dict[str, float]:
    """``Σ‖y' - y‖² / Σ‖y‖²`` of each layer, every batch by hand."""

    def outputs(net: Net, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first = net.conv1(x)
        second = net.conv2(F.relu(first))
        return first, second, net.head(F.relu(F.relu(first) + net.norm(second)).mean((2, 3)))

    with torch.no_grad():
        x = torch.cat(batches)
        pairs = zip(LAYERS, outputs(dense, x), outputs(small, x), strict=True)
        return {name: float((got - wanted).square().sum() / wanted.square().sum()) for name, wanted, got in pairs}


def _state(net: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in net.state_dict().items()}


def _changed(before: dict[str, Tensor], net: nn.Module) -> set[str]:
    return {key for key, value in net.state_dict().items() if not torch.equal(value, before[key])}


def test_the_objective_is_the_mean_relative_error_on_held_out_batches() -> None:
    dense, small, batches = _nets()
    before = _errors(dense, small, batches[3:])
    report = tune_global(small, dense, batches, lr=1e-3, epochs=3)
    after = _errors(dense, small, batches[3:])
    assert [row.name for row in report.layers] == list(LAYERS)
    for row in report.layers:
        assert row.before == pytest.approx(before[row.name], rel=1e-4)
        assert row.after == pytest.approx(after[row.name], rel=1e-4)
    assert report.objective == pytest.approx((sum(before.values()) / 3, sum(after.values()) / 3), rel=1e-4)
    assert report.steps == 9


def test_tuning_lowers_the_error_on_fresh_data_and_keeps_every_zero() -> None:
    dense, small, batches = _nets()
    zeros = {name: small.get_parameter(f"{name}.weight") == 0 for name in LAYERS}
    state = _state(small)
    torch.manual_seed(7)
    fresh = [torch.randn(64, 3, 8, 8)]
    before = _errors(dense, small, fresh)
    tune_global(small, dense, batches, lr=3e-3, epochs=30)
    after = _errors(dense, small, fresh)
    assert sum(after.values()) < 0.8 * sum(before.values())
    for name, mask in zeros.items():
        assert torch.equal(small.get_parameter(f"{name}.weight") == 0, mask)
    assert _changed(state, small) == {f"{name}.weight" for name in LAYERS} | {"conv1.bias", "head.bias"}


def test_masks_are_applied_and_other_zeros_may_come_back() -> None:
    dense, small, batches = _nets()
    by_column = small.conv2.weight.detach().movedim(1, -1).reshape(1, 8, 72)
    mask = torch.ones(1, 8, 72, dtype=torch.bool)
    mask[:, :4] = by_column[:, :4] != 0
    zeros = by_column == 0
    tune_global(small, dense, batches, lr=1e-3, epochs=2, masks={"conv2": mask})
    after = small.conv2.weight.detach().movedim(1, -1).reshape(1, 8, 72)
    assert not after[~mask].any()
    assert (after[:, 4:] != 0).all()
    assert zeros[:, 4:].any()


def test_a_mask_that_the_weights_do_not_have_is_refused() -> None:
    dense, small, batches = _nets()
    before = _state(small)
    with pytest.raises(PatternError, match="'conv2'"):
        tune_global(small, dense, batches, masks={"conv2": torch.zeros(1, 8, 72, dtype=torch.bool)})
    assert not _changed(before, small)


def test_one_step_is_adam_on_the_gradient_of_the_objective() -> None:
    dense, small, batches = _nets()
    twin = copy.deepcopy(small)
    tune_global(small, dense, batches[:2], lr=1e-4, epochs=1)
    x = batches[0]
    loss = torch.zeros(())
    first, wanted_first = twin.conv1(x), dense.conv1(x)
    second, wanted_second = twin.conv2(F.relu(first)), dense.conv2(F.relu(wanted_first))
    third = twin.head(F.relu(F.relu(first) + twin.norm(second)).mean((2, 3)))
    wanted = dense.head(F.relu(F.relu(wanted_first) + dense.norm(wanted_second)).mean((2, 3)))
    for got, target in ((first, wanted_first), (second, wanted_second), (third, wanted)):
        loss = loss + (got - target).square().sum() / target.detach().square().sum() / 3
    gradient = torch.autograd.grad(loss, twin.conv2.weight)[0]
    # The first step of Adam is lr·g/(|g| + eps).
    stepped = twin.conv2.weight - 1e-4 * gradient / (gradient.abs() + 1e-8)
    stepped = torch.where(twin.conv2.weight == 0, 0.0, stepped)
    torch.testing.assert_close(small.conv2.weight, stepped, rtol=0, atol=1e-6)


def test_fixed_layers_keep_their_weights() -> None:
    dense, small, batches = _nets()
    before = _state(small)
    report = tune_global(small, dense, batches, lr=1e-3, epochs=2, fixed=["conv1", "conv2"])
    assert _changed(before, small) == {"conv1.bias", "head.weight", "head.bias"}
    notes = {row.name: row.note for row in report.layers}
    assert notes == {"conv1": "its weights stay (only its bias is tuned)", "conv2": "its weights stay", "head": ""}


def test_vectors_find_their_way_back() -> None:
    """Biases and norm layers that were disturbed: tuning them, and nothing else, repairs most of it."""
    dense, small, batches = _nets()
    small.load_state_dict(dense.state_dict())
    vectors = {"conv1.bias", "norm.weight", "norm.bias", "head.bias"}
    with torch.no_grad():
        for name in vectors:
            small.get_parameter(name).add_(0.3 * torch.randn_like(small.get_parameter(name)))
    before = _state(small)
    report = tune_vectors(small, dense, batches, lr=1e-2, epochs=100)
    assert _changed(before, small) == vectors
    assert report.objective is not None
    assert report.objective[1] < 0.1 * report.objective[0]


def test_never_worse_than_the_beginning() -> None:
    """A learning rate that destroys the model leaves it bit for bit as it was."""
    dense, small, batches = _nets()
    before = _state(small)
    report = tune_global(small, dense, batches, lr=100.0, epochs=20, patience=2)
    assert not _changed(before, small)
    assert report.objective is not None
    assert report.objective[0] == report.objective[1]
    assert report.steps <= 2 * 3
    assert "no improvement" in report.notes[0] or "not finite" in report.notes[0]


def test_the_time_limit_ends_it() -> None:
    dense, small, batches = _nets()
    report = tune_global(small, dense, batches, lr=1e-3, epochs=10**9, patience=10**9, time_limit=0.5)
    assert "time limit of 0.5 s" in report.notes[0]
    assert 0 < report.seconds < 5


def test_an_interruption_leaves_the_best_so_far() -> None:
    dense, small, batches = _nets()
    start = _errors(dense, small, batches[3:])
    epochs: list[Tensor] = []

    def stop(description: str, completed: float, total: float) -> None:
        if completed == 6:
            epochs.append(small.conv1.weight.detach().clone())
        if completed == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune_global(small, dense, batches, lr=1e-3, epochs=5, progress=stop)
    assert sum(_errors(dense, small, batches[3:]).values()) < sum(start.values())
    assert torch.equal(small.conv1.weight, epochs[0])


def test_nothing_else_changes() -> None:
    dense, small, batches = _nets()
    small.train()
    small.norm.eval()
    small.conv2.weight.requires_grad_(False)
    small.head.bias.grad = torch.full((4,), 3.0)
    modes = [module.training for module in small.modules()]
    untouched, random = _state(dense), torch.get_rng_state()
    running = {key: value for key, value in _state(small).items() if "running" in key or "num_" in key}
    tune_global(small, dense, batches, lr=1e-3, epochs=1)
    assert [module.training for module in small.modules()] == modes
    assert not _changed(untouched, dense)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(small.state_dict()[key], value) for key, value in running.items())
    assert [name for name, p in small.named_parameters() if not p.requires_grad] == ["conv2.weight"]
    assert torch.equal(small.head.bias.grad, torch.full((4,), 3.0))
    assert small.conv1.weight.grad is None
    assert all(p.grad is None for p in dense.parameters())


def test_works_in_inference_mode() -> None:
    dense, small, batches = _nets()
    other = copy.deepcopy(small)
    with torch.inference_mode():
        tune_global(small, dense, [batch.clone() for batch in batches], lr=1e-3, epochs=2)
    tune_global(other, dense, batches, lr=1e-3, epochs=2)
    assert not _changed(_state(small), other)
    small.train()(batches[0]).sum().backward()


def test_attention_counts_where_it_returns() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    torch.manual_seed(0)
    dense, batches = Attention().eval(), [torch.randn(4, 6, 8) for _ in range(3)]
    small = copy.deepcopy(dense)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter[torch.rand_like(parameter) < 0.5] = 0
    before = _state(small)
    report = tune_global(small, dense, batches, lr=1e-3, epochs=5)
    assert [row.name for row in report.layers] == ["attention.out_proj"]
    assert {"attention.in_proj_weight", "attention.out_proj.weight"} <= _changed(before, small)
    assert report.objective is not None
    assert report.objective[1] < report.objective[0]


def _poisoned(batches: list[Tensor]) -> list[Tensor]:
    return [*batches[:3], torch.full_like(batches[3], float("nan"))]


class Unreached(Net):
    def __init__(self) -> None:
        super().__init__()
        self.never = nn.Linear(2, 2)


def _run(**change: Any) -> Callable[[Net, Net, list[Tensor]], CorrectionReport]:
    return lambda dense, small, batches: tune_global(small, dense, batches, **change)


@pytest.mark.parametrize(
    ("error", "match", "run"),
    [
        (EmptyCalibrationError, "no batch", lambda dense, small, batches: tune_global(small, dense, [])),
        (CalibrationError, "two batches", lambda dense, small, batches: tune_global(small, dense, batches[:1])),
        (NonFiniteError, "conv1", lambda dense, small, batches: tune_global(small, dense, _poisoned(batches))),
        (LayerNotFoundError, "lacks", lambda dense, small, batches: tune_global(small, nn.Conv2d(3, 1, 1), batches)),
        (LayerNotReachedError, "never", lambda dense, small, batches: tune_global(Unreached(), Unreached(), batches)),
        (LayerNotFoundError, "'conv9'", _run(layers=["conv9"])),
        (LayerNotFoundError, "nothing to tune", _run(layers=["conv2"], fixed=["conv2"])),
        (ShapeError, "does not fit", _run(masks={"conv2": torch.ones(8, 72, dtype=torch.bool)})),
        (SpecError, "lr", _run(lr=0.0)),
        (SpecError, "epochs", _run(epochs=0)),
        (SpecError, "time_limit", _run(time_limit=-1)),
        (SpecError, "held_out", _run(held_out=1.0)),
    ],
)
def test_bad_input_is_named_and_changes_nothing(error: type[Exception], match: str, run: Callable[..., Any]) -> None:
    dense, small, batches = _nets()
    before = _state(small)
    with pytest.raises(error, match=match):
        run(dense, small, batches)
    assert not _changed(before, small)
    assert all(p.requires_grad for p in small.parameters())


def test_outputs_chosen_by_earlier_outputs_are_refused() -> None:
    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score, self.head = nn.Linear(4, 1), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x[self.score(x)[:, 0] > 0])

    torch.manual_seed(0)
    dense, small = Chosen(), Chosen()
    with pytest.raises(ShapeError, match="exclude layers whose inputs are chosen"):
        tune_global(small, dense, [torch.randn(9, 4) for _ in range(2)])
