"""The file of a packed model: named tensors and a manifest in safetensors, with little around them, and a checksum.

An entry of a safetensors header takes some 75 bytes, and quotes within quotes three each. Tensors below 8 KiB therefore
share one entry, and the manifest that lists them is compressed. Files of version 1, which did neither, are read too.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_obc.checksum import checksum
from lightning_obc.errors import ExportError
from lightning_obc.files import PathLike, write_whole

FORMAT, VERSION = "lightning_obc.packed", 2
MANIFEST, SMALL = "manifest", "small"
# An entry of its own costs at most a hundredth of the tensor from here on.
_SMALL_BYTES = 8192


def write_packed(target: Path, manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Manifest and CPU tensors as a packed file; equal ones give equal files.

    Raises:
        ExportError: It cannot be written; an existing file is untouched.
    """
    is_small = {name: one.numel() * one.element_size() < _SMALL_BYTES for name, one in tensors.items()}
    small = sorted(name for name in tensors if is_small[name])
    stored = {name: one for name, one in tensors.items() if not is_small[name]}
    if small:
        manifest = {**manifest, SMALL: [[name, *_form(tensors[name])] for name in small]}
        stored[SMALL] = torch.cat([_as_bytes(tensors[name]) for name in small])
    stored[MANIFEST] = torch.frombuffer(bytearray(zlib.compress(_json(manifest).encode(), 9)), dtype=torch.uint8)
    # One entry, because safetensors does not keep the order of several.
    write_tensors(target, stored, {FORMAT: _json({"version": VERSION, "sha256": checksum("", stored)})})


def write_tensors(target: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """One safetensors file, whole or not at all.

    Raises:
        ExportError: It cannot be written; an existing file is untouched.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    def write(part: Path) -> None:
        try:
            save_file(dict(tensors), part, metadata=dict(metadata))
        except SafetensorError as error:
            # The library reports a full disk as an error of its own.
            raise OSError(str(error)) from error

    write_whole(target, write)


def read_packed(path: PathLike) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Manifest and tensors of a packed file, after its checksum was verified.

    Raises:
        ExportError: No such file, not a packed file, a newer version, truncated or tampered.
    """
    from safetensors import SafetensorError, safe_open

    source = Path(path)
    if not source.is_file():
        raise ExportError("The packed file does not exist", got=str(source), expected="a file of save_packed")
    try:
        with safe_open(source, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ExportError(
            "The packed file cannot be read",
            got=f"{source}: {error}",
            expected="a complete safetensors file",
            remedy="it is truncated or damaged; copy or write it again",
        ) from error
    envelope = _envelope(source, metadata)
    text = str(envelope.get("manifest")) if envelope["version"] == 1 else ""
    if checksum(text, tensors) != envelope.get("sha256"):
        raise ExportError(
            "The packed file's checksum does not match its contents",
            got=str(source),
            expected=f"sha256 {envelope.get('sha256')}",
            remedy="it was changed or damaged after it was written; use another copy",
        )
    manifest: dict[str, Any] = json.loads(text or zlib.decompress(tensors.pop(MANIFEST).numpy().tobytes()))
    return manifest, _taken_apart(manifest.pop(SMALL, []), tensors)


def _envelope(source: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        envelope = json.loads(metadata.get(FORMAT, "null"))
    except ValueError:
        envelope = None
    version = envelope.get("version") if isinstance(envelope, dict) else None
    if not isinstance(envelope, dict) or version not in range(1, VERSION + 1):
        raise ExportError(
            "The file is not a packed model that this version reads",
            got=f"{source}: {'no packed model' if version is None else f'version {version}'}",
            expected=f"{FORMAT}, version 1 to {VERSION}",
        )
    return envelope


def _taken_apart(index: list[list[Any]], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with those that share an entry under their own names."""
    data, start = (tensors.pop(SMALL) if index else torch.zeros(0, dtype=torch.uint8)), 0
    for name, dtype, shape in index:
        kind = getattr(torch, dtype)
        stop = start + math.prod(shape) * kind.itemsize
        # A copy begins where every dtype may begin.
        tensors[name] = data[start:stop].clone().view(kind).reshape(shape)
        start = stop
    return tensors


def _form(tensor: Tensor) -> tuple[str, list[int]]:
    return str(tensor.dtype).removeprefix("torch."), list(tensor.shape)


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
