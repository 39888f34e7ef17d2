"""Statistics in host memory: what stays on the device, that it stays below the limit, and that nothing changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import lightning_obc as obc
from lightning_obc.calibration import Collector, DenseWeights, on_host, statistic_bytes
from lightning_obc.calibration.statistic import HessianAccumulator
from lightning_obc.layers import ProblemShape, select_layers
from lightning_obc.planning import plan_stage


def shape(columns: int, groups: int = 1) -> ProblemShape:
    return ProblemShape(groups, 3, columns, columns)


def test_the_largest_that_fit_stay() -> None:
    shapes = {"small": shape(4), "large": shape(16), "middle": shape(8, groups=2)}
    whole = sum(statistic_bytes(value, False) for value in shapes.values())
    assert on_host(shapes, obc.Calibration()) == set()
    assert on_host(shapes, obc.Calibration(device_memory=whole)) == set()
    # Without the small one there is room for its working copy: it alone leaves.
    assert on_host(shapes, obc.Calibration(device_memory=whole - 1)) == {"small"}
    assert on_host(shapes, obc.Calibration(device_memory=1)) == set(shapes)


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=6),
    st.integers(1, 80_000),
    st.sampled_from(["independent", "sequential"]),
)
def test_what_stays_and_one_working_copy_fit(columns: list[int], limit: int, mode: Any) -> None:
    spec = obc.Calibration(device_memory=limit, mode=mode)
    shapes = {str(index): shape(d) for index, d in enumerate(columns)}
    away = on_host(shapes, spec)
    stays = sum(statistic_bytes(value, spec.paired) for name, value in shapes.items() if name not in away)
    copies = [statistic_bytes(shapes[name], False) // 2 for name in away]
    # A single copy may be larger than the limit; then nothing stays.
    assert stays + max(copies, default=0) <= limit or not stays


@pytest.mark.parametrize("mode", ["independent", "asymmetric"])
def test_the_result_is_the_same_below_the_limit(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is played by those sums that are not marked as living on the host, and by the working copies."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.Flatten(), nn.Linear(96, 20), nn.ReLU(), nn.Linear(20, 5))
    batches = list(torch.randn(10, 3, 6, 6).split(4))
    layers = select_layers(model)
    resident, copies = [0], [0]
    make, bring = HessianAccumulator._zeros, HessianAccumulator._on_device

    def counted(size: tuple[int, ...], device: torch.device, away: bool) -> Tensor:
        tensor = make(size, device, away)
        resident[0] += 0 if away else tensor.nbytes * (2 if mode == "asymmetric" else 1)
        return tensor

    @contextmanager
    def watched(self: HessianAccumulator, sums: Tensor, x: Tensor) -> Iterator[Tensor]:
        with bring(self, sums, x) as work:
            if work is not sums:
                copies[0] = max(copies[0], work.nbytes)
            yield work

    monkeypatch.setattr(HessianAccumulator, "_zeros", staticmethod(counted))
    monkeypatch.setattr(HessianAccumulator, "_on_device", watched)

    def collected(spec: obc.Calibration) -> dict[str, Any]:
        resident[0] = copies[0] = 0
        collect = Collector(model, batches, spec)
        return dict(collect.paired(layers, DenseWeights()) if spec.paired else collect(layers))

    expected = collected(obc.Calibration(mode=mode))
    whole = resident[0]
    assert copies[0] == 0
    for limit in (whole - 1, whole // 2, 96 * 96 * 8, 1):
        found = collected(obc.Calibration(mode=mode, device_memory=limit))
        assert copies[0] > 0
        assert resident[0] + copies[0] <= limit or (resident[0] == 0 and copies[0] == 96 * 96 * 8)
        for name, statistic in found.items():
            for part in ("cross", "difference") if mode == "asymmetric" else ("halves",):
                assert torch.equal(getattr(statistic, part), getattr(expected[name], part))


def test_a_run_and_its_plan() -> None:
    torch.manual_seed(0)
    x, states = torch.randn(40, 8), []
    for spec in (obc.Calibration(), obc.Calibration(device_memory="3 KiB")):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))
        plan = plan_stage(model, obc.Quantize(3), spec)
        obc.compress(model, x, obc.Quantize(3), calibration=spec)
        states.append(model.state_dict())
    assert plan.on_host == {"0"}
    assert "1 layers' statistics in host memory, to keep 3 KiB of the device" in str(plan)
    assert all(torch.equal(value, states[0][name]) for name, value in states[1].items())
