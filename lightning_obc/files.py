"""Writing files whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Union

from lightning_obc.errors import ExportError, MissingExtraError

PathLike = Union[str, Path]


def check_target(path: PathLike, overwrite: bool) -> Path:
    """The path of a file to write.

    Raises:
        ExportError: It exists and ``overwrite`` is False, it is a directory, or its folder does not exist.
    """
    target = Path(path)
    if target.is_dir() or (target.exists() and not overwrite):
        raise ExportError(
            "The file exists already",
            got=str(target),
            expected="a new file",
            remedy="pass overwrite=True, or choose another path",
        )
    if not target.parent.is_dir():
        raise ExportError(
            "The folder does not exist", got=str(target.parent), expected="an existing folder", remedy="create it"
        )
    return target


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A new file beside ``target`` that takes its place when the block ends well, and is removed otherwise.

    Raises:
        ExportError: The file cannot be written (disk full, no permission); ``target`` is untouched then.
    """
    part = target.with_name(f".{target.name}.{secrets.token_hex(6)}.part")
    try:
        part.open("xb").close()
        mode = part.stat().st_mode
    except OSError as error:
        raise _unwritable(target, error) from error
    try:
        yield part
        # Libraries that make a file of their own there may keep it from everybody else (safetensors does).
        part.chmod(mode)
        _sync(part)
        os.replace(part, target)
    except OSError as error:
        raise _unwritable(target, error) from error
    finally:
        part.unlink(missing_ok=True)


def write_whole(target: Path, write: Callable[[Path], object]) -> Path:
    """Let ``write`` fill a temporary file, then rename it to ``target``."""
    with replacing(target) as part:
        write(part)
    return target


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _unwritable(target: Path, error: OSError) -> ExportError:
    return ExportError(
        "The file cannot be written",
        got=f"{target}: {error.strerror or error}",
        expected="a writable folder with enough free space",
        remedy="free some space or choose another folder; nothing was overwritten",
    )


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency.

    Raises:
        MissingExtraError: It is not installed; says which extra brings it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"The package {module.partition('.')[0]!r} is not installed",
            got=str(error),
            expected=f"the extra {extra!r}",
            remedy=f"pip install 'lightning-obc[{extra}]'",
        ) from error
