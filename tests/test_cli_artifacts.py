"""``search``, ``export``, ``benchmark`` and ``report`` on one small run of the digits network."""

from __future__ import annotations

import copy
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from lightning_obc.export import load_packed, open_session, read_onnx_weights

ROOT = Path(__file__).parents[1]
BUDGETS = (0.02, 0.005)
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("jinja2")


def options(**values: object) -> list[str]:
    return [f"--{name.replace('__', '.')}={value}" for name, value in values.items()]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short search on a briefly trained network: the CLI's parts, the folder, and a function for more commands."""
    from lightning_obc.cli import main

    patch = pytest.MonkeyPatch()
    patch.chdir(ROOT)
    patch.setattr(sys, "argv", ["lightning-obc"])
    folder = tmp_path_factory.mktemp("cli")
    quiet = options(
        trainer__default_root_dir=folder, trainer__enable_progress_bar="false", trainer__enable_model_summary="false"
    )
    short = options(
        trainer__max_epochs=2,
        budgets=list(BUDGETS),
        levels__bits="[[null,null],[8,8],[4,4],[2,4]]",
        spdy__evaluations=4,
        calibration__samples=128,
        output=folder / "search",
        database=folder / "database",
    )
    cli = main(["search", "--config=configs/digits_search.yaml", *quiet, *short])

    def call(*args: object):
        extra = ["--config=configs/digits.yaml", "--trainer.callbacks=null", "--trainer.logger=false", *quiet]
        return main([str(args[0]), *extra, *map(str, args[1:])])

    yield cli, folder, call
    patch.undo()


@pytest.fixture(scope="module")
def onnx_files(run):
    """The dense model, the 4-bit one of the small budget with its own ranges, and with all tensors in integers."""
    cli, folder, call = run
    cli.trainer.save_checkpoint(folder / "dense.ckpt", weights_only=True)
    checkpoint = folder / "search" / f"compressed-{BUDGETS[1]:g}.ckpt"
    call("export", f"--ckpt_path={folder}/dense.ckpt", f"--path={folder}/dense.onnx")
    call("export", f"--ckpt_path={checkpoint}", f"--path={folder}/small.onnx")
    call("export", f"--ckpt_path={checkpoint}", f"--path={folder}/integer.onnx", "--integer=true")
    return [folder / f"{name}.onnx" for name in ("dense", "small", "integer")]


def images(cli) -> torch.Tensor:
    cli.datamodule.setup("test")
    return next(iter(cli.datamodule.test_dataloader()))[0]


def logits(path: Path, x: torch.Tensor) -> torch.Tensor:
    session = open_session(path, threads=1)
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def test_search_writes_the_curve_and_leaves_the_model_dense(run):
    cli, folder, _ = run
    result, search = cli.result, folder / "search"
    methods = {(point.budget, point.method) for point in result.points}
    assert methods >= {(budget, method) for budget in BUDGETS for method in ("dp", "spdy")}
    assert all(point.cost <= point.budget for point in result.points)
    curve = json.loads((search / "curve.json").read_text())
    assert curve["metric"] == "val_accuracy"
    assert "SPDY" in (search / "curve.svg").read_text()
    assert cli.trainer.validate(cli.model, cli.datamodule, verbose=False)[0]["val_accuracy"] == pytest.approx(
        result.dense_metric
    )
    assert not any(module._forward_pre_hooks for module in cli.model.modules())


def test_a_search_by_time_counts_the_whole_network(run, capsys):
    """Times of layers are measured one by one; the rest of the network is a fixed part of every budget."""
    cli, folder, call = run
    cli.trainer.save_checkpoint(folder / "dense.ckpt", weights_only=True)
    result = call(
        "search",
        *(
            f"--ckpt_path={folder}/dense.ckpt",
            "--cost=seconds",
            "--linear=packed-int8",
            "--metric=val_accuracy",
            "--budgets=[1.0]",
            "--methods=[dp]",
            "--scores=error",
        ),
        *("--levels.bits=[[null,null],[8,8]]", "--calibration.samples=128", f"--database={folder}/database"),
        f"--output={folder}/by-time",
    ).result
    assert 0 < result.point(1.0).cost <= 1
    (note,) = result.notes
    rest, layers = (float(found) for found in re.findall(r"([\d.e+-]+) ms", note))
    assert 1e3 * result.dense_cost == pytest.approx(rest + layers, rel=1e-3)
    assert layers > 0
    assert note in capsys.readouterr().out
    assert note in (folder / "by-time" / "curve.md").read_text()


@pytest.mark.parametrize("budget", BUDGETS)
def test_the_recipe_makes_the_checkpoint_again(run, budget):
    """Weights, batch-norm statistics and activation ranges, from recipe, dense checkpoint and calibration data."""
    cli, folder, call = run
    point = cli.result.point(budget)
    cli.trainer.save_checkpoint(folder / "dense.ckpt", weights_only=True)
    recipe, output = folder / "search" / f"{point.method}-{budget:g}.yaml", folder / f"again-{budget:g}.ckpt"
    again = call("apply", f"--ckpt_path={folder}/dense.ckpt", f"--recipe={recipe}", f"--output={output}").result
    assert again.figures["val_accuracy"] == pytest.approx((cli.result.dense_metric, point.metric))
    saved, made = (
        torch.load(path, weights_only=True) for path in (folder / "search" / f"compressed-{budget:g}.ckpt", output)
    )
    for key, value in saved["state_dict"].items():
        assert torch.equal(value, made["state_dict"][key]), key
    (ranges,), (others,) = (
        [state["activations"] for key, state in x["callbacks"].items() if key.startswith("OBCCallback")]
        for x in (saved, made)
    )
    assert set(ranges) == set(others) != set()
    assert all(torch.equal(ranges[name]["scale"], others[name]["scale"]) for name in ranges)


def test_exported_codes_are_those_of_the_checkpoint(run, onnx_files):
    cli, _, _ = run
    point = cli.result.point(BUDGETS[1])
    quantized = {name for name, level in point.profile.items() if "w" in level}
    assert quantized
    assert read_onnx_weights(onnx_files[1]).keys() == {f"{name}.weight" for name in quantized}
    assert read_onnx_weights(onnx_files[0]) == {}
    x = images(cli)
    torch.testing.assert_close(logits(onnx_files[0], x), cli.model.eval()(x).detach(), rtol=1e-4, atol=1e-4)


def test_an_exported_file_computes_what_the_search_measured(run, onnx_files):
    """Weights and activations: the same predictions as the stitched model with its fake quantization."""
    cli, _, _ = run
    model, result = cli.model.eval(), cli.result
    dense = copy.deepcopy(model.state_dict())
    x = images(cli)
    result.apply_(model, result.point(BUDGETS[1]))
    expected = model(x).detach()
    result.quantizer.disable()
    model.load_state_dict(dense)
    agree = (logits(onnx_files[1], x).argmax(1) == expected.argmax(1)).double().mean()
    assert agree > 0.97


def test_packed_files_come_back_bit_for_bit(run):
    cli, folder, call = run
    checkpoint = folder / "search" / f"compressed-{BUDGETS[1]:g}.ckpt"
    done = call("export", f"--ckpt_path={checkpoint}", f"--path={folder}/small.safetensors", "--format=packed")
    assert done.result.size == (folder / "small.safetensors").stat().st_size
    other = type(cli.model)()
    load_packed(other, folder / "small.safetensors")
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert all(torch.equal(value, saved[name]) for name, value in other.state_dict().items())


@pytest.fixture(scope="module")
def structured(run):
    """The dense network without half of the input channels of its blocks, weights in 4 bits and inputs in 8."""
    cli, folder, call = run
    cli.trainer.save_checkpoint(folder / "dense.ckpt", weights_only=True)
    half = {"class_path": "lightning_obc.Structured", "init_args": {"sparsity": 0.5}}
    stages = [
        {"class_path": "lightning_obc.Prune", "init_args": {"pattern": half, "layers": ["stages.*.conv2"]}},
        {"class_path": "lightning_obc.Quantize", "init_args": {"grid": 4, "activations": 8}},
    ]
    for stage, solver in zip(stages, ("magnitude", "rtn"), strict=True):
        stage["init_args"]["solver"] = solver
    checkpoint = folder / "structured.ckpt"
    done = call(
        "compress",
        f"--ckpt_path={folder}/dense.ckpt",
        f"--stages={json.dumps(stages)}",
        "--calibration.samples=64",
        f"--output={checkpoint}",
    )
    return checkpoint, done.model.eval()


def test_shrink_takes_unread_channels_out_of_exported_files(run, structured, capsys):
    """Files are smaller and compute the same; the code of the large model loads the packed one."""
    cli, folder, call = run
    checkpoint, large = structured
    files = {}
    for shrink in ("false", "true"):
        for kind in ("packed", "onnx"):
            path = files[kind, shrink] = folder / f"shrink-{shrink}.{kind}"
            call("export", f"--ckpt_path={checkpoint}", f"--path={path}", f"--format={kind}", f"--shrink={shrink}")
    told = capsys.readouterr().out
    assert told.count("stages.2.conv2: 32 input channels removed") == 2
    for kind in ("packed", "onnx"):
        assert files[kind, "true"].stat().st_size < 0.85 * files[kind, "false"].stat().st_size
    x = images(cli)
    small = type(cli.model)().eval()
    load_packed(small, files["packed", "true"])
    assert small.stages[2].conv1.out_channels == 32
    with torch.no_grad():
        torch.testing.assert_close(small(x), large(x), rtol=1e-4, atol=1e-4)
    found, expected = (logits(files["onnx", shrink], x) for shrink in ("true", "false"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_compressed_tensors_fill_a_folder(run):
    cli, folder, call = run
    checkpoint = folder / "search" / f"compressed-{BUDGETS[1]:g}.ckpt"
    if "w" not in cli.result.point(BUDGETS[1]).profile["head"]:
        pytest.skip("the search left the only linear layer dense")
    (folder / "small").mkdir()
    (folder / "small" / "README.md").write_text("mine")
    done = call("export", f"--ckpt_path={checkpoint}", f"--path={folder}/small", "--format=compressed-tensors")
    sizes = {file.name: file.stat().st_size for file in done.result.path.iterdir()}
    assert sorted(sizes) == ["README.md", "config.json", "model.safetensors"]
    assert done.result.size == sizes["config.json"] + sizes["model.safetensors"]
    assert any("stem" in note for note in done.result.notes)


def test_existing_files_are_refused_before_anything_runs(run, onnx_files):
    _, folder, call = run
    before = onnx_files[0].read_bytes()
    torch.save({}, folder / "unreadable.ckpt")  # no model can be loaded from it
    with pytest.raises(SystemExit, match="exists already"):
        call("export", f"--ckpt_path={folder}/unreadable.ckpt", f"--path={onnx_files[0]}")
    assert onnx_files[0].read_bytes() == before
    with pytest.raises(SystemExit, match="Only ONNX files"):
        call("export", f"--path={folder}/x", "--format=packed", "--integer=true")
    with pytest.raises(SystemExit, match="with format packed"):
        call("export", f"--path={folder}/x", "--format=packed", "--linear=packed")
    with pytest.raises(SystemExit, match="Sizes of smaller layers"):
        call("export", f"--path={folder}/x", "--format=compressed-tensors", "--shrink=true")


def test_linear_layers_from_packed_codes(run, onnx_files):
    cli, folder, call = run
    checkpoint = folder / "search" / f"compressed-{BUDGETS[1]:g}.ckpt"
    done = call("export", f"--ckpt_path={checkpoint}", f"--path={folder}/packed.onnx", "--linear=packed-int8")
    assert any("left out" in note for note in done.result.notes)
    operators = [node.op_type for node in onnx.load(str(folder / "packed.onnx")).graph.node]
    assert "MatMulNBits" in operators
    assert "QuantizeLinear" not in operators
    x = images(cli)
    same = logits(folder / "packed.onnx", x).argmax(1) == logits(onnx_files[1], x).argmax(1)
    assert float(same.float().mean()) >= 0.98


def test_files_of_a_folder_are_refused_before_anything_runs(run, tmp_path):
    _, folder, call = run
    torch.save({}, folder / "unreadable.ckpt")  # no model can be loaded from it
    (tmp_path / "config.json").write_text("mine")
    with pytest.raises(SystemExit, match=r"exists already.*config\.json"):
        call("export", f"--ckpt_path={folder}/unreadable.ckpt", f"--path={tmp_path}", "--format=compressed-tensors")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_a_full_disk_is_named_and_leaves_what_was_there(run, structured, tmp_path):
    """The operating system refuses files of more than 20 kB."""
    resource = pytest.importorskip("resource", reason="needs limits of the operating system")
    _, _, call = run
    for kind in ("onnx", "packed"):
        (tmp_path / kind).write_bytes(b"mine")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for kind in ("onnx", "packed", "compressed-tensors"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        try:
            with pytest.raises(SystemExit, match=r"ExportError.*cannot be written.*nothing was overwritten"):
                call(
                    "export",
                    f"--ckpt_path={structured[0]}",
                    f"--path={tmp_path / kind}",
                    f"--format={kind}",
                    "--overwrite=true",
                )
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"onnx": b"mine", "packed": b"mine"}


def test_an_operator_that_onnx_does_not_have_is_named(run, tmp_path):
    _, _, call = run
    path = tmp_path / "a.onnx"
    path.write_bytes(b"mine")
    with pytest.raises(SystemExit, match=r"ExportError.*cannot be translated.*bessel_j1"):
        call("export", "--model=unexportable.BesselClassifier", f"--path={path}", "--overwrite=true")
    assert path.read_bytes() == b"mine"
    assert list(tmp_path.iterdir()) == [path]


def test_checkpoints_that_are_damaged_or_of_another_model_are_named(run, tmp_path):
    """Cut off, a file of another kind, not of Lightning, other shapes, other names: status 1, and nothing written."""
    cli, _, call = run
    whole = tmp_path / "whole.ckpt"
    cli.trainer.save_checkpoint(whole, weights_only=True)
    data, content = whole.read_bytes(), torch.load(whole, weights_only=True)
    (tmp_path / "cut.ckpt").write_bytes(data[: len(data) // 2])
    (tmp_path / "kind.ckpt").write_bytes(b"\x10\x01\x00\x00{}" * 100)
    torch.save({"a": torch.ones(1)}, tmp_path / "plain.ckpt")
    weights = content["state_dict"]
    torch.save(content | {"state_dict": weights | {"head.weight": torch.ones(3, 3)}}, tmp_path / "shape.ckpt")
    torch.save(
        content | {"state_dict": {f"net.{key}": value for key, value in weights.items()}}, tmp_path / "name.ckpt"
    )
    expected = {
        "cut": r"SpecError: The checkpoint cannot be read.*truncated or damaged",
        "kind": r"SpecError: The checkpoint cannot be read.*file of another kind",
        "plain": r"FingerprintError: The file is no checkpoint of Lightning",
        "shape": r"FingerprintError: The checkpoint belongs to another model.*head\.weight.*\[3, 3\].*DigitsClassifier",
        "name": r"FingerprintError: The checkpoint belongs to another model.*Missing key",
    }
    for name, match in expected.items():
        with pytest.raises(SystemExit, match=match):
            call("export", f"--ckpt_path={tmp_path / name}.ckpt", f"--path={tmp_path}/a.onnx")
    assert not (tmp_path / "a.onnx").exists()


def test_benchmark_and_report(run, onnx_files, capsys):
    from lightning_obc.cli import main

    _, folder, _ = run
    times = folder / "times.json"
    rows = main(["benchmark", *map(str, onnx_files), "--rounds=3", "--memory=false", f"--output={times}"])
    assert [row.name for row in rows] == ["dense.onnx", "small.onnx", "integer.onnx"]
    assert rows[1].size < rows[0].size / 2
    assert "speed-up" in capsys.readouterr().out

    records = [folder / "search" / f"compressed-{budget:g}.report.json" for budget in BUDGETS]
    written = main(["report", str(records[1]), f"--benchmark={times}", f"--output={folder}/one"])
    page = written[0].read_text()
    assert "integer.onnx" in page
    assert page.count('class="dot series') >= 6
    assert "Weights of head" in page
    written = main(["report", *map(str, records), f"--output={folder}/both", "--formats=[md]"])
    assert [path.name for path in written] == ["both.md"]
    assert "compressed-0.005 " in written[0].read_text()


def test_report_says_what_it_cannot_read(tmp_path, run):
    from lightning_obc.cli import main

    _, folder, _ = run
    with pytest.raises(SystemExit, match=r"does not hold one record.*compressed-0.005.report.json"):
        main(["report", str(folder)])
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(SystemExit, match="cannot be read"):
        main(["report", str(tmp_path / "broken.json")])
    record = str(folder / "search" / "compressed-0.02.report.json")
    with pytest.raises(SystemExit, match="Measurements cannot be read"):
        main(["report", record, f"--benchmark={tmp_path}/broken.json"])


def test_a_search_without_a_figure_names_those_there_are(run):
    _, folder, call = run
    with pytest.raises(SystemExit, match=r"val_loss.*val_accuracy"):
        call("search", "--budgets=[0.1]", "--cost=bops", f"--output={folder}/other")
    with pytest.raises(SystemExit, match="BudgetError"):
        call("search", "--budgets=[1.5]")
    with pytest.raises(SystemExit, match="latency table cannot be read"):
        call("search", "--budgets=[0.5]", f"--cost={folder}/none.json")
