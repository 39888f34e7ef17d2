"""The console script, in this process and through the shell, on the digits example."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import lightning_obc as obc

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "configs" / "digits.yaml"
SHORT = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=4", "--trainer.enable_progress_bar=false"]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the command line in this process, with its output under ``tmp_path``."""
    from lightning_obc.cli import main

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["lightning-obc"])

    def call(subcommand: str, *args: str, config: Path | None = DIGITS):
        given = [f"--config={config}"] if config else []
        return main([subcommand, *given, f"--trainer.default_root_dir={tmp_path}", *args])

    return call


def recipe(tmp_path: Path, *stages: dict) -> Path:
    """The digits configuration with other stages."""
    config = yaml.safe_load(DIGITS.read_text())
    callback = config["trainer"]["callbacks"][0]["init_args"]
    callback["stages"], callback["calibration"] = list(stages), {"samples": 64}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def prune(**args) -> dict:
    return {"class_path": "lightning_obc.Prune", "init_args": {"pattern": "2:4", "exclude": ["stem.0"]} | args}


def quantize(**args) -> dict:
    return {"class_path": "lightning_obc.Quantize", "init_args": {"grid": 4} | args}


def test_compress_gives_the_weights_of_the_callback_and_of_the_function(run, tmp_path):
    """Three ways to the same bits: in training, on its checkpoint from the shell's side, and without a Trainer."""
    from examples.digits import DigitsClassifier, DigitsData

    config = recipe(tmp_path, prune(at="train_end"), quantize(at="train_end"))
    dense = tmp_path / "dense.ckpt"
    run("fit", *SHORT, "--trainer.callbacks=null", config=config).trainer.save_checkpoint(dense)
    inside = run("fit", *SHORT, config=config)
    outside = run(
        "compress",
        f"--ckpt_path={dense}",
        "--trainer.enable_progress_bar=false",
        f"--output={tmp_path}/small.ckpt",
        config=config,
    )
    plain = DigitsClassifier.load_from_checkpoint(dense, strict=True)
    data = DigitsData()
    data.setup("fit")
    stages = inside.trainer.callbacks[0].stages
    obc.compress(plain, data.train_dataloader(), stages, calibration=obc.Calibration(samples=64))
    saved = torch.load(tmp_path / "small.ckpt", weights_only=True)["state_dict"]
    for name, value in plain.state_dict().items():
        assert torch.equal(value, inside.model.state_dict()[name]), name
        assert torch.equal(value, outside.model.state_dict()[name]), name
        assert torch.equal(value, saved[name]), name
    assert any(not torch.equal(v, torch.load(dense, weights_only=True)["state_dict"][k]) for k, v in saved.items())


def test_compress_takes_stages_of_its_own(run, tmp_path):
    cli = run(
        "compress",
        "--trainer.callbacks=null",
        "--trainer.enable_progress_bar=false",
        f"--stages=[{prune()}]".replace("'", '"'),
        "--calibration.samples=32",
        "--output=false",
    )
    weight = cli.model.stages[0].conv1.weight
    assert (weight == 0).double().mean() == 0.5
    assert not list(tmp_path.rglob("*.ckpt"))


def test_compress_keeps_to_the_settings_of_the_callback(run, tmp_path, capsys):
    """Above all its store: without it, whoever kills the process loses every layer solved so far."""
    config = recipe(tmp_path, quantize(at="validate", layers=["head"]))
    content = yaml.safe_load(config.read_text())
    settings = {"store": str(tmp_path / "layers"), "compare": False, "verbose": False, "save_report": False}
    content["trainer"]["callbacks"][0]["init_args"] |= settings
    config.write_text(yaml.safe_dump(content))
    quiet = ["--trainer.enable_progress_bar=false", f"--output={tmp_path}/small.ckpt"]
    run("compress", *quiet, config=config)
    assert list((tmp_path / "layers").rglob("*.safetensors"))
    assert "Plan of" not in (printed := capsys.readouterr().out)
    assert "Dense against" not in printed
    assert not list(tmp_path.glob("small.report.*"))
    run("compress", *quiet, f"--store={tmp_path}/others", config=config)
    assert list((tmp_path / "others").rglob("*.safetensors"))


def test_a_checkpoint_that_has_the_stages_behind_it_is_not_silently_left_alone(run, tmp_path):
    config = recipe(tmp_path, quantize(at="validate", layers=["head"]))
    quiet = ["--trainer.enable_progress_bar=false"]
    run("compress", *quiet, f"--output={tmp_path}/small.ckpt", config=config)
    again = [*quiet, f"--ckpt_path={tmp_path}/small.ckpt", f"--output={tmp_path}/again.ckpt"]
    with pytest.raises(SystemExit, match=r"ScheduleError: Nothing was compressed.*1 of these stages behind it"):
        run("compress", *again, config=config)
    assert not (tmp_path / "again.ckpt").exists()
    with pytest.raises(SystemExit, match=r"ScheduleError: Nothing was compressed.*no validation"):
        run("compress", *quiet, "--trainer.limit_val_batches=0", config=config)


def test_a_checkpoint_that_a_script_has_saved_is_compressed(run, tmp_path):
    """Its hyperparameters name no class, and may hold more than the arguments of the class."""
    from lightning import Trainer

    from examples.digits import DigitsClassifier

    module = DigitsClassifier(widths=(8, 12, 16))
    module.save_hyperparameters({"note": "of the script"})
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=0, accelerator="cpu", **options)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "dense.ckpt")
    assert "_class_path" not in torch.load(tmp_path / "dense.ckpt", weights_only=True)["hyper_parameters"]
    config = recipe(tmp_path, quantize(at="validate", layers=["head"]))
    quiet = ["--trainer.enable_progress_bar=false", f"--output={tmp_path}/small.ckpt"]
    done = run("compress", *quiet, f"--ckpt_path={tmp_path}/dense.ckpt", "--model.lr=0.5", config=config)
    assert tuple(done.model.hparams["widths"]) == (8, 12, 16)
    for name, value in module.state_dict().items():
        assert torch.equal(value, done.model.state_dict()[name]) == (name != "head.weight"), name


def test_notes_on_the_model_that_is_taken(run, tmp_path, caplog, capsys):
    """A checkpoint of another class replaces the configured model; without a checkpoint nothing was trained."""
    config = recipe(tmp_path, quantize(at="validate", layers=["head"]))
    dense = tmp_path / "dense.ckpt"
    model = "examples.digits.DigitsClassifier"
    hparams = {"_class_path": model, "_instantiator": "lightning.pytorch.cli.instantiate_module"}
    torch.save({"hyper_parameters": hparams, "state_dict": {}}, dense)
    asked = ["--model=lightning.pytorch.demos.boring_classes.BoringModel", "--plan=true"]
    with caplog.at_level("INFO"), contextlib.suppress(SystemExit, Exception):
        run("compress", *asked, f"--ckpt_path={dense}", config=config)
    told = caplog.text + "".join(capsys.readouterr())
    assert f"its model is {model}; Lightning takes that, not lightning.pytorch.demos" in told
    with caplog.at_level("INFO"):
        run("compress", "--plan=true", config=config)
    assert "note: no --ckpt_path" in caplog.text + "".join(capsys.readouterr())


def test_a_training_without_its_stages_does_not_end_with_status_0(run, tmp_path):
    config = recipe(tmp_path, prune(at={"step": 99}))
    with pytest.raises(SystemExit, match=r"1 of the compression stages did not run.*Prune\(2:4\) at {'step': 99}"):
        run("fit", *SHORT, "--trainer.limit_val_batches=0", config=config)
    with pytest.raises(SystemExit, match="Nothing was trained, and no compression stage ran"):
        run("fit", *SHORT, "--trainer.limit_train_batches=0", config=config)


def test_other_subcommands(run):
    assert run("validate", "--trainer.callbacks=null").trainer.state.fn == "validate"
    assert "test_accuracy" in run("test", "--trainer.callbacks=null").trainer.callback_metrics
    run("predict", "--trainer.callbacks=null")


def test_print_config_round_trips(run, tmp_path, capsys):
    texts = []
    config = DIGITS
    for _ in range(2):
        with pytest.raises(SystemExit) as done:
            run("fit", "--print_config", config=config)
        assert not done.value.code
        texts.append(capsys.readouterr().out)
        config = tmp_path / "printed.yaml"
        config.write_text(texts[-1])
    assert texts[0] == texts[1]
    stage = yaml.safe_load(texts[0])["trainer"]["callbacks"][0]["init_args"]["stages"][0]
    assert stage["init_args"]["pattern"] == "2:4"


BAD = [
    (prune(pattern=124), r'write the pattern in quotes, "2:4"'),
    (prune(pattern="4:2"), "N:M pattern is not possible"),
    (prune(pattern=1.5), r"outside \[0, 1\)"),
    (prune(at="some day"), "time cannot be read"),
    (quantize(grid=9), "bit width is not supported"),
    (prune(patern="2:4"), "patern"),
    (prune(layers=["nothing"]), "nothing"),
    (prune(exclude=None), "stem.0"),
]


@pytest.mark.parametrize(("stage", "words"), BAD)
def test_mistakes_are_explained(run, tmp_path, capsys, stage, words):
    with pytest.raises(SystemExit) as stop:
        run("fit", *SHORT, config=recipe(tmp_path, stage))
    assert stop.value.code
    said = f"{stop.value.code} {capsys.readouterr().err}"

    assert re.search(words, said), said
    assert "Traceback" not in said


@pytest.mark.parametrize("subcommand", ["fit", "compress", "export"])
def test_a_checkpoint_that_is_not_there_is_named(run, subcommand):
    with pytest.raises(SystemExit, match=r"The checkpoint is not there. Got: ckpt_path=nowhere.ckpt, seen from"):
        run(subcommand, "--ckpt_path=nowhere.ckpt", *(["--path=x.onnx"] if subcommand == "export" else []))


def test_nothing_to_compress_with(run):
    with pytest.raises(SystemExit, match="nothing to compress with"):
        run("compress", "--trainer.callbacks=null")


def test_console_script_finds_the_examples_from_the_current_directory():
    """``main()`` puts the current directory on the path, which a console script does not have by itself."""
    code = "import sys; sys.path = [p for p in sys.path if p not in ('', sys.argv[1])]; sys.path.append(sys.argv[2]); "
    code += "from lightning_obc.cli import main; main(['fit', '--config=configs/digits.yaml', '--print_config'])"
    package = str(Path(obc.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT), package],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": ""},
        check=False,
    )
    assert "examples.digits.DigitsClassifier" in done.stdout, done.stderr


def test_the_installed_script_ends_with_status_0(monkeypatch, tmp_path):
    """What an entry point returns becomes the exit status, so that of ``lightning-obc`` must return nothing."""
    import tomllib
    from importlib import import_module

    script = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["lightning-obc"]
    module, _, name = script.partition(":")
    options = ["--config=configs/digits.yaml", "--trainer.callbacks=null", f"--trainer.default_root_dir={tmp_path}"]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["lightning-obc", "validate", *options])
    assert getattr(import_module(module), name)() is None
