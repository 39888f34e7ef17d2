"""Bits, triangles and files of a database: packed small, written whole or not at all, never pickled."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_obc.checksum import checksum
from lightning_obc.errors import DamagedFileError, DatabaseError

_CHECKSUM = "sha256"
_AGAIN = "build the database again: what is damaged is made again, the rest is kept"
_WITHOUT = "delete it and build the database again: layers whose levels are still the same are kept"


def pack(values: Tensor, bits: int) -> Tensor:
    """Values ``[n]`` uint8 below ``2**bits`` in ``ceil(n · bits / 8)`` bytes."""
    shifts = np.arange(bits, dtype=np.uint8)
    planes = (values.cpu().numpy().reshape(-1, 1) >> shifts) & 1
    return torch.from_numpy(np.packbits(planes.reshape(-1)))


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The ``count`` values ``[count]`` uint8 of :func:`pack`.

    Raises:
        DatabaseError: There are not that many.
    """
    if packed.dtype != torch.uint8 or packed.numel() != -(-count * bits // 8):
        raise DatabaseError(
            "A packed tensor of a database has the wrong size",
            got=f"{packed.numel()} bytes of {packed.dtype}",
            expected=f"{-(-count * bits // 8)} bytes of uint8 for {count} values of {bits} bits",
            remedy="build the database again; solved layers that are whole are kept",
        )
    planes = np.unpackbits(packed.numpy(), count=count * bits).reshape(count, bits)
    shifts = np.arange(bits, dtype=np.uint8)
    return torch.from_numpy((planes << shifts).sum(1, dtype=np.uint8))


def triangle(hessian: Tensor) -> Tensor:
    """Upper triangle ``[g, d·(d+1)/2]`` float32 of ``[g, d, d]``."""
    rows, columns = torch.triu_indices(hessian.shape[-1], hessian.shape[-1], device=hessian.device)
    return hessian[:, rows, columns].float().cpu().contiguous()


def from_triangle(packed: Tensor, columns: int) -> Tensor:
    """The symmetric ``[g, d, d]`` float64 matrix of :func:`triangle`.

    Raises:
        DatabaseError: The triangle belongs to another size.
    """
    if packed.dim() != 2 or packed.shape[1] != columns * (columns + 1) // 2:
        raise DatabaseError(
            "A stored Hessian does not fit its layer",
            got=list(packed.shape),
            expected=f"[g, {columns * (columns + 1) // 2}] for {columns} columns",
        )
    full = packed.new_zeros(packed.shape[0], columns, columns, dtype=torch.float64)
    rows, cols = torch.triu_indices(columns, columns)
    full[:, rows, cols] = packed.double()
    full[:, cols, rows] = packed.double()
    return full


def tensor_hash(tensor: Tensor) -> str:
    """A short digest of shape, dtype and every byte."""
    data = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{list(data.shape)} {data.dtype}".encode())
    digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file with a checksum of its content, whole or not at all."""
    _replace(path, _text({**content, _CHECKSUM: checksum(_text(content), {})}).encode())


def read_json(path: Path) -> Any:
    """The content of :func:`write_json`, its checksum unchecked: see :func:`check_json`.

    Raises:
        DatabaseError: The file is missing or cannot be read.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise _missing(path) from None
    except (OSError, ValueError) as error:
        raise _damaged(path, error, _WITHOUT) from None


def check_json(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`read_json` has read, without its checksum.

    Raises:
        DamagedFileError: The checksum does not fit.
    """
    plain = {key: value for key, value in content.items() if key != _CHECKSUM}
    if content.get(_CHECKSUM) != checksum(_text(plain), {}):
        raise _damaged(path, ValueError("its checksum does not fit"), _WITHOUT)
    return plain


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write a safetensors file with JSON metadata and a checksum over both, whole or not at all."""
    from safetensors.torch import save

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # In one entry of the header: several would be written in an order of chance.
    header = {_CHECKSUM: checksum(_text(metadata), contiguous), "content": metadata}
    _replace(path, save(contiguous, {"json": _text(header)}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    """Tensors and metadata of :func:`write_tensors`.

    Raises:
        DatabaseError: The file is missing.
        DamagedFileError: It is cut short, no safetensors file, or its checksum does not fit.
    """
    from safetensors import SafetensorError, safe_open

    check_exists(path)
    try:
        with safe_open(path, "pt") as file:
            header = json.loads(file.metadata()["json"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if header[_CHECKSUM] != checksum(_text(header["content"]), tensors):
            raise ValueError("its checksum does not fit")
        return tensors, header["content"]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise _damaged(path, error) from None


def check_exists(path: Path) -> None:
    """Raise DatabaseError when a file is missing."""
    if not path.exists():
        raise _missing(path)


def _replace(path: Path, content: bytes) -> None:
    """Write beside the target and rename, so that an interruption leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _missing(path: Path) -> DatabaseError:
    return DatabaseError(
        "A file of the database is missing",
        got=str(path),
        expected="the files that the index names",
        remedy="build the database again; solved layers that are whole are kept",
    )


def _text(content: Any) -> str:
    return json.dumps(content, separators=(",", ":"))


def _damaged(path: Path, error: Exception, remedy: str = _AGAIN) -> DamagedFileError:
    return DamagedFileError(
        "A file of the database is damaged",
        got=f"{path}: {error}",
        expected="a file that was written whole",
        remedy=remedy,
    )
