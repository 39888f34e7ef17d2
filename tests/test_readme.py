"""README's Python examples run, and its commands are the ones CI and the package know."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 3


@pytest.mark.parametrize("index", range(len(EXAMPLES)))
def test_example_runs(index: int, tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{EXAMPLES[index]}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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
