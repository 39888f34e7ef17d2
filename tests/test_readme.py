"""Python examples of README and of docs/ run; README's commands are the ones CI and the package know."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from children import script

import lightning_obc as obc

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [
    ROOT / "README.md",
    *(
        ROOT / "docs" / f"{page}.md"
        for page in (
            "calibration",
            "engine",
            "format",
            "layers",
            "search",
            "training",
            "companions",
        )
    ),
]
EXAMPLES = {
    f"{page.name} {index}": example
    for page in PAGES
    for index, example in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL))
}


def test_there_are_examples() -> None:
    for page, least in zip(PAGES, (2, 2, 2, 1, 3, 2, 1, 1), strict=True):
        assert sum(name.startswith(page.name) for name in EXAMPLES) >= least


@pytest.mark.parametrize("name", list(EXAMPLES)[1:])
def test_example_runs(name: str, tmp_path: Path) -> None:
    done = script(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{EXAMPLES[name]}", folder=tmp_path)
    assert done.code == 0, done.text()


def test_the_first_example_runs_in_a_fresh_interpreter(tmp_path: Path) -> None:
    command = [sys.executable, "-c", next(iter(EXAMPLES.values()))]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


def test_an_example_that_fails_is_seen(tmp_path: Path) -> None:
    done = script("import lightning_obc as obc\nobc.Prune('2:5:7')", folder=tmp_path)
    assert done.code == 1
    assert "SpecError: A pattern cannot be read" in done.text()


def test_every_public_name_is_documented_and_in_the_changelog() -> None:
    documents = "\n".join(page.read_text() for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
    # In code, where a name that is also an English word means the name.
    written = {
        place: set(re.findall(r"\w+", " ".join(re.findall(r"```.*?```|`[^`]+`", text, flags=re.DOTALL))))
        for place, text in (("documents", documents), ("changelog", (ROOT / "CHANGELOG.md").read_text()))
    }
    public = set(obc.__all__) - {"__version__"}
    assert {place: sorted(public - words) for place, words in written.items()} == {"documents": [], "changelog": []}


def test_commands_name_what_exists() -> None:
    commands = re.search(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    assert commands is not None
    first, second = commands.group(1).strip().splitlines()
    config = re.search(r"--config (\S+)", first)
    assert config is not None
    assert (ROOT / config.group(1)).is_file()
    install, _, test = second.partition(" && ")
    assert test == "pytest"
    extra = re.search(r"\.\[(\w+)\]", install)
    assert extra is not None
    # CI runs the same installation in a fresh environment.
    assert f".[{extra.group(1)}]" in (ROOT / ".ci" / "run").read_text()


DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks" / "results").glob("*.md")]


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.name)
def test_links_and_named_files_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    links = [page.parent / link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    named = re.findall(r"\b(?:configs|examples|benchmarks|tests|docs|lightning_obc)/[\w/.-]*\.(?:py|yaml|md)\b", text)
    # A file that a command writes when a GPU is there.
    missing = {str(path) for path in [*links, *(ROOT / name for name in named)] if not path.exists()}
    assert missing <= {str(ROOT / "benchmarks" / "results" / "gpu.md")}


def test_subcommands_in_the_documents_exist() -> None:
    from lightning_obc.cli.artifacts import _SUBCOMMANDS
    from lightning_obc.cli.commands import OBCCLI

    text = "\n".join(page.read_text() for page in DOCUMENTS)
    used = set(re.findall(r"^lightning-obc (\w+)", text, flags=re.MULTILINE))
    assert used <= set(OBCCLI.subcommands()) | set(_SUBCOMMANDS)
    assert {"fit", "compress", "search", "apply", "export", "report", "benchmark"} <= used
