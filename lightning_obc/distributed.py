"""Several processes that compress one model together.

Everything that the package asks of other processes goes through a :class:`Ranks`. Nothing here calls
``torch.distributed`` before :func:`all_ranks` has found a process group, and nothing is sent unless there are several
ranks. Every rank must make the same calls in the same order; :func:`all_or_none` lets them also fail together.
"""

from __future__ import annotations

import hashlib
import pickle
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_obc.errors import OBCError, RankError

# Largest piece that is moved at once between host and device, in bytes.
_PIECE = 2**26
_KNOWN = "_known_to_all_ranks"


class Ranks(Protocol):
    """The processes that work on one model, seen from one of them.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
    """

    rank: int
    size: int

    def gather(self, value: Any) -> list[Any]:
        """Small plain values of all ranks, in the order of the ranks, on every rank."""

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over ranks, on every rank; returns it."""

    def sum_to_(self, tensor: Tensor, owner: int) -> Tensor:
        """Replace a tensor by its sum over ranks on ``owner``; elsewhere its values are undefined afterwards."""

    def broadcast_(self, tensor: Tensor, source: int) -> Tensor:
        """Replace a tensor by that of ``source``; shape and dtype are the same on all ranks. Returns it."""


class SingleProcess:
    """One process alone: every sum is its own."""

    rank, size = 0, 1

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def sum_(self, tensor: Tensor) -> Tensor:
        return tensor

    def sum_to_(self, tensor: Tensor, owner: int) -> Tensor:
        return tensor

    def broadcast_(self, tensor: Tensor, source: int) -> Tensor:
        return tensor


class TorchRanks:
    """The ranks of a ``torch.distributed`` process group.

    Args:
        group: The group; None means all processes.
    """

    def __init__(self, group: Any = None) -> None:
        import torch.distributed as dist

        self._dist, self._group = dist, group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        nccl = dist.get_backend(group) == "nccl"
        self._device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")

    def gather(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.size
        self._dist.all_gather_object(found, value, group=self._group)
        return found

    def sum_(self, tensor: Tensor) -> Tensor:
        # Not one reduction for all, which may add up in another order, and round otherwise, on every rank.
        return self.broadcast_(self.sum_to_(tensor, 0), 0)

    def sum_to_(self, tensor: Tensor, owner: int) -> Tensor:
        target = self._global(owner)
        return self._piecewise(tensor, lambda piece: self._dist.reduce(piece, target, group=self._group))

    def broadcast_(self, tensor: Tensor, source: int) -> Tensor:
        root = self._global(source)
        # As bytes: backends do not know every dtype.
        return self._piecewise(
            tensor, lambda piece: self._dist.broadcast(piece, root, group=self._group), as_bytes=True
        )

    def _global(self, rank: int) -> int:
        return rank if self._group is None else self._dist.get_global_rank(self._group, rank)

    @torch.no_grad()
    def _piecewise(self, tensor: Tensor, send: Any, as_bytes: bool = False) -> Tensor:
        """Send a tensor in place, on the device of the backend."""
        whole = tensor.detach().contiguous()
        flat = whole.reshape(-1)
        flat = flat.view(torch.uint8) if as_bytes else flat
        if flat.numel() == 0:
            return tensor
        if flat.device.type == self._device.type:
            send(flat)
        else:
            for piece in flat.split(max(1, _PIECE // flat.element_size())):
                moved = piece.to(self._device)
                send(moved)
                piece.copy_(moved)
        if whole.data_ptr() != tensor.data_ptr():
            tensor.copy_(whole)
        return tensor


def all_ranks() -> Ranks:
    """The ranks of the default process group of ``torch.distributed``; this process alone where none is initialised."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return SingleProcess()
    return TorchRanks()


def exchange(ranks: Ranks, value: Any = None, error: Exception | None = None) -> list[Any]:
    """Small plain values of all ranks, unless one of them failed: then its error is raised on every rank.

    Raises:
        OBCError: What the first failing rank raised; a :class:`~lightning_obc.errors.RankError` that names it for
            errors of other kinds.
    """
    if ranks.size == 1:
        if error is not None:
            raise error
        return [value]
    found = ranks.gather((_portable(error, ranks.rank), value))
    failed = [(rank, theirs) for rank, (theirs, _) in enumerate(found) if theirs is not None]
    if not failed:
        return [theirs for _, theirs in found]
    rank, first = failed[0]
    raised = error if rank == ranks.rank and error is not None else first
    setattr(raised, _KNOWN, True)
    raise raised


@contextmanager
def all_or_none(ranks: Ranks) -> Iterator[None]:
    """A block that ends well on all ranks, or with an error on all of them: none waits for one that has failed.

    Inside, ranks may meet in :func:`exchange`, and in sums and broadcasts right behind one.
    """
    try:
        yield
    except Exception as error:
        if not getattr(error, _KNOWN, False):
            exchange(ranks, error=error)
        raise
    exchange(ranks)


def _portable(error: Exception | None, rank: int) -> OBCError | None:
    if error is None:
        return None
    if isinstance(error, OBCError):
        try:
            pickle.dumps(error)
            return error
        except Exception:
            return RankError(error.message, got=f"rank {rank}: {type(error).__name__}: {error}")
    return RankError(
        "Another rank failed",
        got=f"rank {rank}: {type(error).__name__}: {error}",
        remedy="look at the first error in that rank's output",
    )


def is_sharded(tensor: Tensor) -> bool:
    """True for a parameter of which every rank holds a part (DTensor)."""
    return hasattr(tensor, "full_tensor")


def reshard_(model: nn.Module) -> None:
    """Parameters that ``fully_shard`` has gathered for a forward pass are sharded again: what is written into gathered
    ones would be lost."""
    if "torch.distributed.fsdp" not in sys.modules:
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def digest(tensor: Tensor) -> str:
    """A short hash of a tensor's bits."""
    # A copy: numpy's view would make the storage of a parameter one that cannot be resized, which sharding does.
    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).clone()
    return hashlib.sha256(values.numpy().data).hexdigest()[:32]


def check_same(ranks: Ranks, tensors: Mapping[str, Tensor], what: str) -> None:
    """Compare tensors over ranks, bit for bit.

    Args:
        ranks: The ranks.
        tensors: Tensors by name.
        what: What they are, for the error.

    Raises:
        RankError: Some differ; they are named.
    """
    if ranks.size == 1:
        return
    mine = {name: f"{list(t.shape)} {t.dtype} {digest(t)}" for name, t in tensors.items()}
    found = exchange(ranks, mine)
    names = list(dict.fromkeys(name for theirs in found for name in theirs))
    other = [name for name in names if len({theirs.get(name) for theirs in found}) > 1]
    if other:
        raise RankError(
            f"The ranks hold different {what}",
            got=", ".join(other),
            expected="the same bits on every rank",
            remedy="load the same weights on all ranks before, and change them on all ranks alike",
        )
