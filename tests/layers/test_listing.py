"""Messages about many layers: one line for every reason, not for every layer."""

from __future__ import annotations

import torch
from torch import nn

import lightning_obc as obc
from lightning_obc.layers import by_reason
from lightning_obc.planning import plan_stage


def test_layers_with_one_reason_share_a_line() -> None:
    reasons = {f"dw{i}": "one channel" for i in range(17)} | {"": "its own"} | dict.fromkeys("abcd", "four")
    assert by_reason(reasons, "left as it was", "left as they were") == [
        "left as they were: 17 layers (one channel): dw0, dw1, dw2 and 14 more",
        "left as it was: the model itself (its own)",
        "left as they were: 4 layers (four): a, b, c, d",
    ]
    assert by_reason({}, "one", "several") == []


def test_a_network_of_depthwise_layers_does_not_flood_plan_and_table() -> None:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1)) for _ in range(7)]
    model = nn.Sequential(*blocks)
    stage = obc.Prune("2:4", misfit="skip")
    plan = plan_stage(model, stage)
    report = obc.compress(model, [torch.randn(4, 8, 5, 5)], stage)
    for text in (str(plan), report.table()):
        assert text.count("does not fit the layer") == 1
        assert "7 layers (The pattern 2:4 does not fit the layer" in text
        assert "0.0, 1.0, 2.0 and 4 more" in text
    assert list(report.stages[0].skipped) == [f"{i}.0" for i in range(7)]
