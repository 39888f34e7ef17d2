"""Checkpoints that are not there, damaged, or of another model, said in a line."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Optional, Union

from lightning_obc.errors import FingerprintError, SpecError

# What Lightning itself finds a checkpoint for.
_FOUND_BY_LIGHTNING = ("best", "last", "hpc", "registry")
# Files of PyTorch before 1.6 are pickles, which begin so; all others are archives, whose directory is at their end.
_PICKLE = b"\x80"


def check_checkpoint(ckpt_path: str) -> None:
    """Look for a checkpoint and whether it is complete, without reading it; folders of sharded ones may be anything.

    Raises:
        SpecError: There is no such file or folder, or the file is no checkpoint, or only the beginning of one.
    """
    if not ckpt_path or ckpt_path.partition(":")[0] in _FOUND_BY_LIGHTNING or "://" in ckpt_path:
        return
    path = Path(ckpt_path)
    if not path.exists():
        raise SpecError(
            "The checkpoint is not there",
            got=f"ckpt_path={ckpt_path}, seen from {Path.cwd()}",
            expected="a file that 'lightning-obc fit' or a Trainer has written",
            remedy="look below the run's folder, by default lightning_logs/version_N/checkpoints",
        )
    if path.is_file() and not zipfile.is_zipfile(path) and _first_byte(path) != _PICKLE:
        raise SpecError(
            "The checkpoint cannot be read",
            got=f"{ckpt_path}, {path.stat().st_size} bytes that are no whole checkpoint",
            expected="a file that 'lightning-obc fit' or a Trainer has written",
            remedy="it is truncated or damaged, or a file of another kind; copy or write it again",
        )


def _first_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(1)


@contextmanager
def loading(ckpt_path: Optional[Union[str, Path]]) -> Iterator[None]:
    """What goes wrong where a checkpoint meets a model becomes an error that names both.

    Raises:
        FingerprintError: The checkpoint has other weights than the model, or Lightning has not written it.
    """
    try:
        yield
    except RuntimeError as error:
        title, _, details = str(error).partition("\n")
        if ckpt_path is None or "loading state_dict" not in title:
            raise
        raise FingerprintError(
            "The checkpoint belongs to another model",
            got=f"{ckpt_path}: {'; '.join(line.strip() for line in details.splitlines()[:3])}",
            expected=f"the weights of {title.rpartition(' for ')[2].rstrip(':')}",
            remedy="name the model and its arguments as they were in training",
        ) from error
    except KeyError as error:
        if ckpt_path is None or error.args != ("pytorch-lightning_version",):
            raise
        raise FingerprintError(
            "The file is no checkpoint of Lightning",
            got=str(ckpt_path),
            expected="a file that 'lightning-obc fit' or a Trainer has written",
            remedy="load its weights into the model yourself and save that with Trainer.save_checkpoint",
        ) from error
