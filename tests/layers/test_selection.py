from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_obc.errors import LayerNotFoundError, SpecError, UnsupportedLayerError
from lightning_obc.layers import LayerAdapter, adapter_for, register_adapter, select_layers, unsupported_layers
from lightning_obc.layers.linear import LinearAdapter


class OwnForward(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class SameForward(nn.Linear):
    pass


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.layer1 = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1))
        self.layer2 = nn.ModuleDict({"conv": nn.Conv2d(8, 8, 3), "down": SameForward(8, 8)})
        self.again = self.stem
        self.head = nn.Linear(8, 4)


ALL = ["stem", "layer1.0", "layer1.2", "layer2.conv", "layer2.down", "head"]


@pytest.mark.parametrize(
    ("layers", "exclude", "expected"),
    [
        (None, None, ALL),
        (["head", "stem"], None, ["stem", "head"]),
        (["layer1.*"], None, ["layer1.0", "layer1.2"]),
        (["layer?.*"], None, ["layer1.0", "layer1.2", "layer2.conv", "layer2.down"]),
        (["Conv2d"], None, ["stem", "layer1.0", "layer1.2", "layer2.conv"]),
        (["torch.nn.Linear"], None, ["layer2.down", "head"]),
        (["SameForward"], None, ["layer2.down"]),
        (["layer1"], None, ["layer1.0", "layer1.2"]),
        (["again"], None, ["stem"]),
        (None, ["Conv2d"], ["layer2.down", "head"]),
        (None, ["layer?", "head"], ["stem"]),
        (["layer?"], ["*.down", "Sequential"], ["layer2.conv"]),
        (["Conv2d"], ["stem"], ["layer1.0", "layer1.2", "layer2.conv"]),
        (None, ["BatchNorm2d"], ALL),
        (["_orig_mod.stem"], None, ["stem"]),
    ],
)
def test_selection(layers: list[str] | None, exclude: list[str] | None, expected: list[str]) -> None:
    model = Network()
    selected = select_layers(model, layers, exclude)
    assert list(selected) == expected
    assert all(module is model.get_submodule(name) for name, module in selected.items())


@pytest.mark.parametrize("entry", ["haed", "layer9.*", "Conv7d", "layer1.0.weight"])
@pytest.mark.parametrize("excluding", [False, True])
def test_an_unknown_entry_is_named_with_close_matches(entry: str, excluding: bool) -> None:
    with pytest.raises(LayerNotFoundError, match="Got: '" + entry.replace("*", r"\*")) as caught:
        select_layers(Network(), **{"exclude" if excluding else "layers": [entry]})
    if entry == "haed":
        assert "'head'" in str(caught.value)


def test_nothing_left_is_an_error() -> None:
    with pytest.raises(LayerNotFoundError, match="No layer is left"):
        select_layers(Network(), ["head"], ["Linear"])
    with pytest.raises(LayerNotFoundError, match="No layer is left"):
        select_layers(nn.Sequential(nn.ReLU()))


def test_a_layer_without_adapter_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedLayerError, match=r"layer1\.1"):
        select_layers(Network(), ["layer1.1"])


def test_compiled_modules_are_seen_through() -> None:
    model = Network()
    model.layer1[0] = torch.compile(model.layer1[0])
    compiled = torch.compile(model)
    assert list(select_layers(compiled)) == ALL
    assert list(select_layers(compiled, ["layer1.0"])) == ["layer1.0"]


def test_modules_that_share_a_weight_are_one_layer() -> None:
    model = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4), "third": nn.Linear(4, 4)})
    model["second"].weight = model["first"].weight
    assert list(select_layers(model)) == ["first", "third"]
    assert list(select_layers(model, exclude=["second"])) == ["third"]


def test_what_no_adapter_handles_is_listed_with_the_reason() -> None:
    model = nn.ModuleDict(
        {
            "own": OwnForward(4, 4),
            "norm": nn.BatchNorm1d(4),
            "linear": nn.Linear(4, 4),
            "bilinear": nn.Bilinear(4, 4, 2),
            "lazy": nn.LazyLinear(3),
            "old_norm": torch.nn.utils.weight_norm(nn.Linear(4, 4)),
            "scale": nn.PReLU(4),
        }
    )
    reasons = unsupported_layers(model)
    assert set(reasons) == {"own", "bilinear", "lazy", "old_norm"}
    assert "overrides the forward of Linear" in reasons["own"]
    assert "Bilinear" in reasons["bilinear"]
    assert "not initialised" in reasons["lazy"]
    assert "no parameter" in reasons["old_norm"]


def test_of_an_embedding_and_its_output_layer_the_output_layer_is_named() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    model["head"].weight = model["embedding"].weight
    assert list(select_layers(model)) == ["head"]
    assert list(select_layers(model, ["embedding"])) == ["head"]
    assert unsupported_layers(model) == {}


def test_a_module_without_an_adapter_that_shares_a_weight_is_named() -> None:
    model = nn.ModuleDict({"bag": nn.EmbeddingBag(6, 4), "head": nn.Linear(4, 6, bias=False)})
    model["head"].weight = model["bag"].weight
    assert "shares the weight of 'head'" in unsupported_layers(model)["bag"]


def test_registering_an_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_obc.layers import registry

    monkeypatch.setattr(registry, "_ADAPTERS", dict(registry._ADAPTERS))

    class Mine(LinearAdapter):
        pass

    mine: LayerAdapter = Mine()
    assert adapter_for(OwnForward(2, 2)) is None
    register_adapter(OwnForward, mine)
    assert adapter_for(OwnForward(2, 2)) is mine
    with pytest.raises(SpecError, match="already has an adapter"):
        register_adapter(nn.Linear, mine)
    register_adapter(nn.Linear, mine, override=True)
    assert adapter_for(nn.Linear(2, 2)) is mine
