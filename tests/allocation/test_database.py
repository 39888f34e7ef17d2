"""The database against solving every level apart, and everything that can happen to its files."""

from __future__ import annotations

import copy
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from children import script
from torch import Tensor, nn

from lightning_obc import obs
from lightning_obc.allocation import build as build_module
from lightning_obc.allocation import solve as solve_module
from lightning_obc.allocation.build import build_database
from lightning_obc.allocation.database import Database
from lightning_obc.allocation.levels import Level, block_ladder, product, unstructured_ladder
from lightning_obc.allocation.record import LayerRecord, check_mask
from lightning_obc.allocation.solve import Recipe
from lightning_obc.allocation.storage import from_triangle, pack, read_tensors, triangle, unpack, write_tensors
from lightning_obc.calibration import collect_hessians
from lightning_obc.errors import (
    DamagedFileError,
    DatabaseError,
    FingerprintError,
    LayerNotFoundError,
    NotPositiveDefiniteError,
    PatternError,
    SpecError,
)
from lightning_obc.layers import adapter_for
from lightning_obc.obs import structured
from lightning_obc.specs import NM, Block, IntGrid, Structured, Unstructured

Collect = Callable[..., Any]


def weight_of(module: nn.Module) -> Tensor:
    adapter = adapter_for(module)
    assert adapter is not None
    return adapter.weight_matrix(module)


# ------------------------------------------------------------------------------------------------ packing
@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_comes_back_and_is_small(bits: int) -> None:
    values = torch.randint(2**bits, (1001,), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    packed = pack(values, bits)
    assert packed.numel() == -(-1001 * bits // 8)
    assert torch.equal(unpack(packed, bits, 1001), values)
    with pytest.raises(DatabaseError, match="wrong size"):
        unpack(packed, bits, 1010)


def test_triangles_come_back_symmetric() -> None:
    x = torch.randn(2, 5, 9, dtype=torch.float64)
    full = (x @ x.mT).float().double()
    assert torch.equal(from_triangle(triangle(full), 5), full)
    with pytest.raises(DatabaseError, match="does not fit"):
        from_triangle(triangle(full), 6)


# ------------------------------------------------------------------------------------------------- levels
def test_every_level_is_what_the_engine_gives_alone(database: Database, model: Any) -> None:
    for name in database.layers:
        module = model.get_submodule(name)
        weight, hessian = weight_of(module), database.hessian(name)
        channels = adapter_for(module).shape(module).channels  # type: ignore[union-attr]
        for level in database.levels(name):
            found = database.solution(name, level)
            mask, alone = None, None
            if level.pattern is not None:
                alone = obs.prune(weight, hessian, level.pattern, channels=channels)
                mask = alone.mask
            if level.grid is not None:
                alone = obs.quantize(weight, hessian, level.grid, mask=mask, channels=channels)
                assert torch.equal(found.codes, alone.codes)  # type: ignore[arg-type]
                assert torch.equal(found.scale, alone.scale)  # type: ignore[arg-type]
            if alone is None:
                assert torch.equal(found.weight, weight)
                continue
            assert torch.equal(found.mask, alone.mask)
            torch.testing.assert_close(found.weight, alone.weight, rtol=0, atol=1e-6)
            assert found.loss == pytest.approx(alone.loss, rel=1e-4)
            assert found.damping_loss == pytest.approx(alone.damping_loss, rel=1e-3)
            assert found.reference == pytest.approx(alone.reference)
            assert bool((found.weight[~found.mask] == 0).all())


@pytest.mark.parametrize("selection", ["heap", "sorted", "hull"])
def test_all_selections_are_nested_and_losses_come_from_one_factorisation(
    selection: Any, model: Any, statistics: Collect, tmp_path: Path
) -> None:
    database = build_database(
        tmp_path, model, unstructured_ladder(0.05), statistics, layers=["mix"], recipe=Recipe(selection=selection)
    )
    record = database.record("mix")
    assert len(record.ladders) == 1
    assert [key for key in record.tensors if key.startswith("mask")] == []
    swept = obs.sweep(weight_of(model.mix), database.hessian("mix"))
    for level in database.levels("mix")[1:]:
        alone = swept.solution(level.pattern.sparsity, selection)  # type: ignore[union-attr]
        assert torch.equal(database.solution("mix", level).mask, alone.mask)
        stored = database.level_record("mix", level)
        assert stored.loss == pytest.approx(alone.loss, rel=1e-4)
        assert stored.damping_loss == pytest.approx(alone.damping_loss, rel=1e-4)
        assert stored.kept == int(alone.mask.sum())


def test_levels_that_do_not_fit_are_left_out_with_the_reason(database: Database) -> None:
    missing = database.missing()
    assert set(missing) == {"stem"}
    assert set(missing["stem"]) == {"2:4", "2:4+w8", "2:4+w4"}
    assert "1 input channels" in missing["stem"]["2:4"]
    assert "2:4+w8+a8" not in {level.name for level in database.levels("stem")}
    with pytest.raises(DatabaseError, match=r"no level '2:4\+w8\+a8'.*1 input channels"):
        database.solution("stem", "2:4+w8+a8")


def test_levels_of_activations_share_their_weights(database: Database) -> None:
    names = [level.name for level in database.levels("head")]
    assert names == [
        *("dense", "w8+a8", "w4+a4"),
        *("2:4", "2:4+w8+a8", "2:4+w4+a4"),
        *("0.5", "0.5+w8+a8", "0.5+w4+a4"),
        *("0.75", "0.75+w8+a8", "0.75+w4+a4"),
    ]
    assert database.solution("head", "w8+a8") is database.solution("head", Level(grid=IntGrid(8), activations=8))


def test_zeros_of_the_dense_weight_stay_and_count(model: Any, statistics: Collect, tmp_path: Path) -> None:
    with torch.no_grad():
        model.mix.weight[:, 0] = 0
    database = build_database(tmp_path, model, product([0.1, 0.6], [(None, None), (4, None)]), statistics)
    for level in database.levels("mix")[1:]:
        weight = database.solution("mix", level).weight
        assert bool((weight.reshape(2, 4, 9, 4)[..., 0] == 0).all())
    assert database.level_record("mix", Level(Unstructured(0.1))).kept == 8 * 4 * 9 * 3 // 4


def test_group_grids_come_back(model: Any, statistics: Collect, tmp_path: Path) -> None:
    grid = IntGrid(3, granularity="group", group_size=4)
    database = build_database(tmp_path, model, [Level(grid=grid), Level(NM(2, 4), grid)], statistics)
    assert set(database.missing()) == {"stem"}
    found = database.solution("head", "2:4+w3group4")
    assert found.scale is not None
    assert found.scale.shape == (1, 4, 2)
    mask = found.mask
    alone = obs.quantize(weight_of(model.head), database.hessian("head"), grid, mask=mask)
    torch.testing.assert_close(found.weight, alone.weight)


def test_damping_is_chosen_and_kept(model: Any, statistics: Collect, tmp_path: Path) -> None:
    database = build_database(tmp_path, model, [Level(NM(2, 4))], statistics, recipe=Recipe(damping="auto"))
    choices = {database.record(name).damping for name in database.layers}
    assert choices <= {1e-3, 1e-2, 3e-2, 1e-1, 0.3}
    again = build_database(tmp_path, model, [Level(NM(1, 4))], statistics, recipe=Recipe(damping="auto"))
    assert {again.record(name).damping for name in again.layers} == choices


# -------------------------------------------------------------------------------------------------- sizes
def test_forty_five_nested_levels_take_less_than_a_byte_per_weight(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 128)).eval()
    data = [torch.randn(64, 256) for _ in range(4)]
    levels = unstructured_ladder()
    assert len(levels) == 45
    database = build_database(tmp_path, model, levels, lambda layers: collect_hessians(model, layers, data))
    size = database.size()
    assert size.weights == 256 * 128 + 128 * 128
    assert len(size.by_level) == 45
    assert size.levels == sum(f.stat().st_size for f in [*(tmp_path / "levels").iterdir(), tmp_path / "index.json"])
    assert size.hessians == sum(f.stat().st_size for f in (tmp_path / "hessians").iterdir())
    assert size.levels < size.weights
    assert "per weight" in str(size)


def test_bytes_of_every_level_are_told(database: Database) -> None:
    by_level = database.size().by_level
    assert by_level["dense"] == 0
    # Codes of kept weights alone: half of them at 4 bits, with a float scale and a byte of zero point per row.
    layers = [name for name in database.layers if name != "stem"]
    weights = sum(database.record(name).weights for name in layers)
    rows = sum(database.record(name).shape[0] * database.record(name).shape[1] for name in layers)
    assert by_level["2:4+w4"] == weights / 2 * 4 / 8 + 5 * rows
    assert by_level["2:4"] == weights / 8


def test_sizes_follow_the_masks(database: Database) -> None:
    for name, by_level in database.sizes().items():
        for level, size in by_level.items():
            solution = database.solution(name, level)
            assert size.kept == int(solution.mask.sum())
            assert size.scales == (0 if solution.grid is None else solution.grid.scale.numel())


# ------------------------------------------------------------------------------------ going on, and damage
def test_more_levels_are_added_without_data(database: Database, model: Any, statistics: Any) -> None:
    calls, before = len(statistics.calls), {name: database.record(name) for name in database.layers}
    kept = {name: dict(record.tensors) for name, record in before.items()}
    more = build_database(database.path, model, [Level(Unstructured(0.9)), Level(grid=IntGrid(2))], statistics)
    assert len(statistics.calls) == calls
    for name in more.layers:
        tensors = more.record(name).tensors
        assert all(torch.equal(tensors[key], value) for key, value in kept[name].items())
        assert {"0.9", "w2", "w8+a8"} <= {level.name for level in more.levels(name)}
        assert more.solution(name, "0.9").sparsity > 0.85


def test_an_interrupted_build_goes_on(
    model: Any, statistics: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solved: list[str] = []
    original = build_module.solve_levels_

    def crash(record: Any, weight: Tensor, *rest: Any) -> None:
        solved.append(str(tuple(weight.shape)))
        if len(solved) == 2:
            raise KeyboardInterrupt
        original(record, weight, *rest)

    monkeypatch.setattr(build_module, "solve_levels_", crash)
    with pytest.raises(KeyboardInterrupt):
        build_database(tmp_path, model, product([0.5], [(None, None)]), statistics)
    with pytest.raises(DatabaseError, match="missing"):
        Database.open(tmp_path, model)
    database = build_database(tmp_path, model, product([0.5], [(None, None)]), statistics)
    assert len(solved) == 4, "the first layer was not solved again"
    assert len(statistics.calls) == 1, "nor was anything calibrated again"
    assert not list(tmp_path.rglob("*.part"))
    assert database.solution("head", "0.5").sparsity == 0.5


KILLED = """
import json, os, signal, sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[2])
from conftest import Tiny
from lightning_obc.allocation import Level, build
from lightning_obc.calibration import collect_hessians

original, solved = build.solve_levels_, []
def kill(*arguments):
    if solved:
        os.kill(os.getpid(), signal.SIGKILL)
    solved.append(original(*arguments))
if sys.argv[3] == "kill":
    build.solve_levels_ = kill
torch.manual_seed(0)
model = Tiny().eval()
batches = [torch.randn(16, 1, 6, 6, generator=torch.Generator().manual_seed(1))]
levels = [Level.from_dict(values) for values in json.loads(sys.argv[4])]
build.build_database(Path(sys.argv[1]), model, levels, lambda layers: collect_hessians(model, layers, batches))
"""


def test_a_killed_build_goes_on_to_the_files_of_an_undisturbed_one(model: Any, tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    levels = product([None, "2:4", 0.5], [(None, None), (4, 4)])

    def run(how: str) -> int | None:
        plain = json.dumps([level.to_dict() for level in levels])
        return script(KILLED, str(killed), str(Path(__file__).parent), how, plain, folder=tmp_path).code

    assert run("kill") == -signal.SIGKILL
    before = {file: file.stat().st_mtime_ns for file in killed.rglob("*.safetensors")}
    assert len(before) == 3 + 1, "all Hessians and the first layer"
    assert run("") == 0
    assert {file: file.stat().st_mtime_ns for file in before} == before, "none of them is written again"
    batches = [torch.randn(16, 1, 6, 6, generator=torch.Generator().manual_seed(1))]
    build_database(whole, model, levels, lambda layers: collect_hessians(model, layers, batches))
    written = {file.relative_to(whole): file.read_bytes() for file in whole.rglob("*.*")}
    assert written == {file.relative_to(killed): file.read_bytes() for file in killed.rglob("*.*")}


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "layer.safetensors"
    write_tensors(file, {"a": torch.ones(3)}, {"n": 1})

    def crash(handle: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", crash)
    with pytest.raises(OSError, match="no space"):
        write_tensors(file, {"a": torch.zeros(3)}, {"n": 2})
    tensors, metadata = read_tensors(file)
    assert metadata == {"n": 1}
    assert tensors["a"].tolist() == [1, 1, 1]
    assert list(tmp_path.iterdir()) == [file]


def files(database: Database, folder: str) -> list[Path]:
    return sorted((database.path / folder).iterdir())


@pytest.mark.parametrize("folder", ["levels", "hessians"])
def test_a_deleted_file_is_named_and_made_again(folder: str, database: Database, model: Any, statistics: Any) -> None:
    expected = database.solution("mix", "0.5").weight
    gone = files(database, folder)[1]
    gone.unlink()
    with pytest.raises(DatabaseError, match=r"missing.*mix"):
        Database.open(database.path, model)
    again = build_database(database.path, model, [Level()], statistics)
    assert gone.exists()
    assert statistics.calls[1:] == ([["mix"]] if folder == "hessians" else [])
    assert torch.equal(again.solution("mix", "0.5").weight, expected)


def test_a_damaged_file_is_named(database: Database, model: Any) -> None:
    file = files(database, "levels")[2]
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DatabaseError, match=r"damaged.*head"):
        Database.open(database.path, model).record("head")
    (database.path / "index.json").write_text('{"format": 1, "layers"')
    with pytest.raises(DatabaseError, match=r"damaged.*index\.json"):
        Database.open(database.path, model)
    (database.path / "index.json").write_text('{"format": 99}')
    with pytest.raises(DatabaseError, match="format 2"):
        Database.open(database.path, model)
    shutil.rmtree(database.path)
    with pytest.raises(DatabaseError, match="missing"):
        Database.open(database.path, model)


def flip(file: Path, needle: bytes | None = None) -> None:
    """Change one bit: that of the last byte, or the digit behind a text."""
    content = bytearray(file.read_bytes())
    content[-1 if needle is None else content.index(needle) + len(needle)] ^= 1
    file.write_bytes(bytes(content))


@pytest.mark.parametrize("how", ["bit", "header", "cut"])
@pytest.mark.parametrize("folder", ["levels", "hessians"])
def test_a_changed_file_is_named_and_made_again(
    folder: str, how: str, database: Database, model: Any, statistics: Any
) -> None:
    expected = database.solution("mix", "0.5").weight
    file = files(database, folder)[1]
    whole = file.read_bytes()
    if how == "cut":
        file.write_bytes(whole[:-7])
    else:
        flip(file, None if how == "bit" else b'\\"damping\\":0.0')
    fresh = Database.open(database.path, model)
    read: Callable[[str], object] = fresh.record if folder == "levels" else fresh.hessian
    with pytest.raises(DamagedFileError, match=r"damaged.*mix"):
        read("mix")
    with pytest.warns(UserWarning, match=r"made again.*damaged.*mix"):
        again = build_database(database.path, model, [Level()], statistics)
    assert file.read_bytes() == whole
    assert statistics.calls[1:] == ([["mix"]] if folder == "hessians" else [])
    assert torch.equal(again.solution("mix", "0.5").weight, expected)


def test_a_changed_index_is_refused_and_may_be_made_anew(database: Database, model: Any, statistics: Any) -> None:
    index = database.path / "index.json"
    flip(index, b'"damping":0.')
    for use in (Database.open, lambda path, model: build_database(path, model, [Level()], statistics)):
        with pytest.raises(DamagedFileError, match=r"damaged.*index\.json.*checksum"):
            use(database.path, model)
    before = {file: file.stat().st_mtime_ns for file in files(database, "levels")}
    index.unlink()
    same = product([None, "2:4", 0.5, 0.75], [(None, None), (8, 8), (4, 4)])
    build_database(database.path, model, same, statistics)
    assert {file: file.stat().st_mtime_ns for file in before} == before, "the same levels at the same places"
    index.unlink()
    with pytest.warns(UserWarning, match="written for another index"):
        other = build_database(database.path, model, product([0.25, 0.3, 0.4], [(None, None), (8, 8)]), statistics)
    assert other.solution("mix", "0.25").sparsity == pytest.approx(0.25, abs=0.01)
    assert len(statistics.calls) == 1


def test_another_model_is_refused(database: Database, model: Any, statistics: Any) -> None:
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.mix.weight[0, 0] += 1
    with pytest.raises(FingerprintError, match="other weights in mix"):
        Database.open(database.path, other)
    with pytest.raises(FingerprintError, match="other layers"):
        build_database(database.path, other, [Level()], statistics)
    with pytest.raises(FingerprintError, match="without the layers"):
        Database.open(database.path, nn.Sequential(nn.Linear(3, 3)))
    Database.open(database.path, model)


def test_other_recipes_and_calibrations_are_refused(database: Database, model: Any, statistics: Any) -> None:
    with pytest.raises(FingerprintError, match=r"other recipe.*damping: 0.1 instead of 0.01"):
        build_database(database.path, model, [Level()], statistics, recipe=Recipe(damping=0.1))
    with pytest.raises(FingerprintError, match="other calibration"):
        build_database(database.path, model, [Level()], statistics, calibration={"samples": 3})
    other = collect_hessians(model, {n: model.get_submodule(n) for n in database.layers}, [torch.randn(4, 1, 6, 6)])
    with pytest.raises(FingerprintError, match="another Hessian for layer 'stem'"):
        build_database(database.path, model, [Level()], other)
    before = json.loads((database.path / "index.json").read_text())
    same = statistics({n: model.get_submodule(n) for n in database.layers})
    build_database(database.path, model, [Level()], same)
    assert json.loads((database.path / "index.json").read_text()) == before


def test_swapped_files_are_refused(database: Database, model: Any) -> None:
    first, second = files(database, "levels")[:2]
    shutil.copy(first, second)
    with pytest.raises(FingerprintError, match="'mix' belongs to another model"):
        Database.open(database.path, model).record("mix")


def test_a_level_that_no_longer_fits_its_pattern_is_refused(database: Database, model: Any) -> None:
    file = files(database, "levels")[1]
    tensors, metadata = read_tensors(file)
    tensors["mask.2:4"] = torch.full_like(tensors["mask.2:4"], 255)
    write_tensors(file, tensors, metadata)
    fresh = Database.open(database.path, model)
    with pytest.raises(PatternError, match="no longer fits the pattern 2:4"):
        fresh.solution("mix", "2:4")
    assert fresh.solution("mix", "0.5").sparsity == 0.5


def test_masks_are_checked_by_pattern() -> None:
    mask, dense = torch.ones(1, 2, 8, dtype=torch.bool), torch.ones(1, 2, 8)
    mask[..., :2] = False
    for pattern, channels in ((NM(1, 4), 8), (Block(4, 0.5), 8), (NM(2, 4), 6)):
        with pytest.raises(PatternError):
            check_mask(mask, dense, pattern, channels, "layer")
    check_mask(mask, dense, Block(2, 0.25), 8, "layer")
    dense[..., :2] = 0
    check_mask(mask, dense, Block(4, 0.5), 8, "layer")


def test_blocks_leave_together_also_where_weights_are_zero_already(
    model: Any, statistics: Collect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.no_grad():
        model.head.weight[0, :3] = 0
    sweeps: list[int] = []
    original = solve_module.sweep_blocks_prepared

    def counted(problem: obs.Problem, size: int, *rest: Any) -> Any:
        sweeps.append(size)
        return original(problem, size, *rest)

    monkeypatch.setattr(solve_module, "sweep_blocks_prepared", counted)
    levels = [*block_ladder(4, 0.3, 0.6), *product([Block(2, 0.5), Block(4, 0.4)], [(8, 8)])]
    database = build_database(tmp_path, model, levels, statistics, layers=["mix", "head"])
    assert sorted(sweeps) == [2, 2, 4, 4], "one sweep for all blocks of a size, in each of two layers"
    assert len(database.record("mix").ladders) == 1
    for name in database.layers:
        weight, hessian = weight_of(model.get_submodule(name)), database.hessian(name)
        for level in database.levels(name)[1:]:
            found = database.solution(name, level)
            channels = 4 if name == "mix" else 8
            alone = obs.prune(weight, hessian, level.pattern, channels=channels)  # type: ignore[arg-type]
            assert torch.equal(found.mask, alone.mask)
            if level.grid is None:
                torch.testing.assert_close(found.weight, alone.weight, rtol=0, atol=1e-6)
                stored = database.level_record(name, level)
                assert stored.loss == pytest.approx(alone.loss, rel=1e-4, abs=1e-12)
                assert stored.damping_loss == pytest.approx(alone.damping_loss, rel=1e-3, abs=1e-12)
                assert stored.kept == int(alone.mask.sum())


def test_a_layer_that_cannot_be_solved_stays_dense(
    model: Any, statistics: Collect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = build_module.solve_levels_

    def fail(record: Any, weight: Tensor, *rest: Any) -> None:
        if weight.shape[0] == 2:
            raise NotPositiveDefiniteError("indefinite")
        original(record, weight, *rest)

    monkeypatch.setattr(build_module, "solve_levels_", fail)
    database = build_database(tmp_path, model, product([0.5], [(None, None)]), statistics)
    assert database.missing() == {"mix": {"0.5": "indefinite."}}
    assert [level.name for level in database.levels("mix")] == ["dense"]
    assert [level.name for level in database.levels("head")] == ["dense", "0.5"]


def test_unknown_layers_and_impossible_recipes(database: Database, model: Any, tmp_path: Path) -> None:
    with pytest.raises(LayerNotFoundError, match="nowhere"):
        database.solution("nowhere", "dense")
    with pytest.raises(SpecError, match="no Hessian"):
        build_database(tmp_path / "other", model, [Level()], {})
    for arguments in ({"damping": "some"}, {"damping": -1.0}, {"selection": "best"}):
        with pytest.raises(SpecError):
            Recipe(**arguments)  # type: ignore[arg-type]


def test_structured_levels_come_from_one_elimination(
    model: Any, statistics: Collect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.no_grad():
        model.head.weight[0, :3] = 0
    runs: list[int] = []
    original = structured.eliminate_channels

    def counted(problem: obs.Problem, channels: int, steps: int, *rest: Any, **options: Any) -> Any:
        runs.append(steps)
        return original(problem, channels, steps, *rest, **options)

    monkeypatch.setattr(structured, "eliminate_channels", counted)
    levels = [Level(Structured(sparsity)) for sparsity in (0.25, 0.5, 0.75)]
    levels += [Level(Structured(0.5), IntGrid(4))]
    database = build_database(tmp_path, model, levels, statistics, layers=["mix", "head"])
    assert runs == [6, 6], "one elimination for each of two layers, to the strongest of its levels"
    record = database.record("head")
    assert record.ladders == [["structured@0.25", "structured@0.5", "structured@0.75"]]
    assert record.tensors["ladder.0"].numel() == 4 * 8 * 2 // 8
    for name, channels in (("mix", 4), ("head", 8)):
        weight, hessian = weight_of(model.get_submodule(name)), database.hessian(name)
        for level in database.levels(name)[1:]:
            found, stored = database.solution(name, level), database.level_record(name, level)
            alone = obs.prune(weight, hessian, level.pattern, channels=channels)  # type: ignore[arg-type]
            assert torch.equal(found.mask, alone.mask)
            assert stored.kept == int(alone.mask.sum())
            if level.grid is None:
                torch.testing.assert_close(found.weight, alone.weight, rtol=0, atol=1e-6)
                assert stored.loss == pytest.approx(alone.loss, rel=1e-4)
                assert stored.damping_loss == pytest.approx(alone.damping_loss, rel=1e-3)
            else:
                alone = obs.quantize(weight, hessian, level.grid, mask=alone.mask, channels=channels)
                assert torch.equal(found.codes, alone.codes)  # type: ignore[arg-type]


def test_a_layer_is_inverted_once_for_all_its_levels(
    model: Any, statistics: Collect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    original = solve_module.prepare

    def counted(weight: Tensor, *rest: Any) -> Any:
        calls.append(weight.shape[-1])
        return original(weight, *rest)

    monkeypatch.setattr(solve_module, "prepare", counted)
    levels = product([None, "2:4", "1:4", 0.5, Block(4, 0.5), Structured(0.5)], [(None, None), (8, 8), (4, 4)])
    build_database(tmp_path, model, levels, statistics, layers=["mix", "head"])
    assert calls == [36, 8]


def test_masks_that_are_not_nested_are_stored_apart() -> None:
    record = LayerRecord((1, 1, 8), 1.0, 0.01)
    masks = {
        "a": torch.tensor([[[1, 1, 1, 1, 0, 0, 0, 0]]]).bool(),
        "b": torch.tensor([[[0, 0, 1, 1, 1, 0, 0, 0]]]).bool(),
    }
    record.add_masks(masks)
    assert record.ladders == []
    assert sorted(record.tensors) == ["mask.a", "mask.b"]
    assert record.bytes == 2
