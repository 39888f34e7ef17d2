"""DDP with processes of their own (gloo, CPU); what ranks do without a Trainer is in ``tests/test_ranks.py``."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ddp_scenarios
import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from processes import run_processes
from small import Small, is_two_four, levels

import lightning_obc as obc
from lightning_obc.callbacks import compat
from lightning_obc.errors import StrategyError


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OBC_TEST_FOLDER", str(tmp_path_factory.mktemp("alone")))
        patch.delenv("OBC_TEST_RANKS", raising=False)
        found = {"agreement": ddp_scenarios.agreement(), "sharded": ddp_scenarios.sharded()}
        return found | {"shared work": ddp_scenarios.shared_work()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def two(folder: Path, alone: dict[str, Any]) -> list[dict[str, Any]]:
    # After the run on one device, which has compiled what ranks would otherwise keep each other waiting for.
    return run_processes("ddp_scenarios", "two_ranks", 2, folder)


def check_agreement(alone: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    for key, value in alone["weights"].items():
        assert all(torch.equal(rank["weights"][key], ranks[0]["weights"][key]) for rank in ranks), key
        torch.testing.assert_close(ranks[0]["weights"][key], value, rtol=1e-3, atol=1e-5)
    same = [(alone["masks"][name] == mask).flatten() for name, mask in ranks[0]["masks"].items()]
    assert torch.cat(same).double().mean() >= 0.999
    assert alone["samples"] == ranks[0]["samples"] == [44, 44]
    assert ranks[0]["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    assert all(rank["losses"] == ranks[0]["losses"] and rank["figures"] == ranks[0]["figures"] for rank in ranks)
    assert ranks[0]["figures"]["val_loss"] == pytest.approx(alone["figures"]["val_loss"], rel=1e-4)
    # Two layers: with two ranks each has one of them, and more than two have no more to do.
    for stage in ranks[0]["work"]:
        assert sorted(share["layers"] for share in stage) == [0] * (len(ranks) - 2) + [1, 1]


def test_two_ranks_agree_with_one_device(alone: dict[str, Any], two: list[dict[str, Any]]) -> None:
    check_agreement(alone["agreement"], [rank["agreement"] for rank in two])


@pytest.mark.slow
def test_four_ranks_agree_with_one_device_and_each_has_a_quarter_of_the_work(
    alone: dict[str, Any], tmp_path: Path
) -> None:
    four = run_processes("ddp_scenarios", "four_ranks", 4, tmp_path)
    check_agreement(alone["agreement"], [rank["agreement"] for rank in four])
    check_shared_work(alone["shared work"], [rank["shared work"] for rank in four])


def check_shared_work(alone: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    for key, value in alone["weights"].items():
        assert all(torch.equal(rank["weights"][key], ranks[0]["weights"][key]) for rank in ranks), key
        torch.testing.assert_close(ranks[0]["weights"][key], value, rtol=1e-4, atol=1e-6)
    same = [(alone["masks"][name] == mask).flatten() for name, mask in ranks[0]["masks"].items()]
    assert torch.cat(same).double().mean() >= 0.999
    assert alone["samples"] == ranks[0]["samples"] == [160, 160]
    for mine, theirs in zip(alone["losses"], ranks[0]["losses"], strict=True):
        assert theirs == pytest.approx(mine, rel=1e-4)
    # Nine equal layers: five and four, or three and three times two.
    most = -(-9 // len(ranks))
    for flops, layers in zip(ranks[0]["work"], ranks[0]["layers"], strict=True):
        assert sum(layers) == 9
        assert max(layers) == most
        assert max(flops) == pytest.approx(sum(flops) * most / 9)
        assert min(layers) >= 2


def test_two_ranks_share_the_layers_of_a_network(alone: dict[str, Any], two: list[dict[str, Any]]) -> None:
    check_shared_work(alone["shared work"], [rank["shared work"] for rank in two])


def test_stages_in_training(two: list[dict[str, Any]], folder: Path) -> None:
    first, second = (rank["fit"] for rank in two)
    assert all(torch.equal(second["weights"][key], value) for key, value in first["weights"].items())
    conv, fc = (first["weights"][key] for key in ("conv._orig_mod.weight", "fc.weight"))
    assert is_two_four(conv)
    assert (conv != 0).any()
    assert levels(conv) <= 16
    assert levels(fc) <= 16
    assert all(loss > 0 for loss in first["losses"].values())
    assert list(first["losses"]) == ["conv", "fc"]
    # One checkpoint, one store and one log for all ranks, tables and plans printed once.
    assert first["checkpoint"] == second["checkpoint"]
    checkpoint = torch.load(first["checkpoint"], weights_only=True)
    plain = Small()
    plain.load_state_dict({key.replace("_orig_mod.", ""): value for key, value in checkpoint["state_dict"].items()})
    assert torch.equal(plain.conv.weight, conv)
    assert len(list(folder.glob("solved/stage*.safetensors"))) == 3
    assert "Plan of" in two[0]["output"]
    assert "Plan of" not in two[1]["output"]
    assert "self.log('obc" not in two[0]["output"]  # Lightning's advice to reduce over ranks


def test_parameters_that_are_sharded_by_fully_shard(two: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    first, second = (rank["sharded"] for rank in two)
    assert "conv.weight" in first["sharded"]
    assert "fc.weight" in first["sharded"]
    assert all(torch.equal(second["weights"][key], value) for key, value in first["weights"].items())
    assert is_two_four(first["weights"]["conv.weight"])
    assert levels(first["weights"]["conv.weight"]) <= 16
    assert levels(first["weights"]["fc.weight"]) <= 16
    assert first["samples"] == [40, 40, 40]
    # The first stage comes before the first step of training, from the weights that one device has too.
    assert first["losses"][0] == pytest.approx(alone["sharded"]["losses"][0], rel=1e-4)
    assert set(first["refused"]) == {"mode", "correction", "after"}
    assert first["checkpoint"].exists()


def test_a_failure_or_a_difference_on_one_rank_stops_all_with_a_name(two: list[dict[str, Any]]) -> None:
    for rank in two:
        found = rank["failures"]
        assert found["broken"].startswith("NonFiniteError")
        assert "conv" in found["broken"]
        assert found["other"].startswith("RankError: The ranks hold different parameters. Got: fc.bias")
        assert found["broken is dense"]
        assert found["other is dense"]


def test_companions_on_two_ranks(two: list[dict[str, Any]]) -> None:
    first, second = (rank["companions"] for rank in two)
    assert all(torch.equal(second["weights"][key], value) for key, value in first["weights"].items())
    zeros = first["weights"]["fc.weight"] == 0
    assert torch.equal(zeros, (torch.arange(8) % 2 == 0).expand(4, 8))
    assert list(first["masks"]) == ["fc"]
    # The second value is no improvement: the stage runs before the third epoch, of three steps each, on both ranks.
    assert first["when"] == second["when"] == "just before the first stage (epoch 2, step 6)"
    assert levels(first["weights"]["conv.weight"]) <= 8
    # The best file is from behind the stage, and one for both, though each scores it on its own data.
    assert first["best"] == second["best"]
    assert first["score"] != second["score"]
    saved = torch.load(first["best"], weights_only=True)
    assert "stage=1" in first["best"]
    assert levels(saved["state_dict"]["conv.weight"]) <= 8
    assert torch.equal(saved["state_dict"]["fc.weight"] == 0, zeros)
    assert first["refused"].startswith("BatchNormReset works on one device")


@pytest.mark.parametrize(
    ("strategy", "reason"),
    [
        (FSDPStrategy(), "FSDPStrategy, whose flat parameters"),
        (ModelParallelStrategy(tensor_parallel_size=2), "Tensor parallelism"),
        (type("DeepSpeedStrategy", (), {})(), "DeepSpeedStrategy, whose engine"),
        (type("XLAStrategy", (), {})(), "XLAStrategy"),
    ],
)
def test_other_strategies_are_refused_by_name(strategy: Any, reason: str) -> None:
    with pytest.raises(StrategyError, match=reason):
        compat.check_strategy(SimpleNamespace(strategy=strategy, callbacks=[]))  # type: ignore[arg-type]


def test_public_name_of_the_ranks() -> None:
    ranks = obc.all_ranks()
    assert (ranks.rank, ranks.size) == (0, 1)
