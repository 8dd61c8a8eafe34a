"""Weights that leave their device for host memory and come back, for a model that sleeps.

What moves are storages, not tensors: a storage is copied, then shrunk to nothing in place, and grows again later.  So
every view and every share of it stays what it was, and nobody who holds a tensor has to be told; only addresses change.
The copies are pinned, in pieces of a power of two: torch rounds pinned memory up to one, which must not double it.
"""

import ctypes
import dataclasses
import gc
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.storage import UntypedStorage

PIECE_BYTES = 64 << 20


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Every tensor that a tree of dataclasses, slotted objects, sequences and mappings leads to."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_of(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_of(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors_of(getattr(value, field.name))
    else:
        for name in getattr(type(value), "__slots__", ()):
            yield from tensors_of(getattr(value, name))


def flat(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def free_unused(device: str) -> None:
    """Gives the memory that nobody refers to back to the device and to the system, as far as they take it."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        _tell("_cuda_clearCublasWorkspaces")
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def _tell(what: str) -> None:
    """Calls what torch has no public name for, where its build has it."""
    call = getattr(torch._C, what, None)
    if call is not None:
        call()


class HostCopy:
    """The storages of all tensors of `tree`, in host memory from now on until `restore`."""

    def __init__(self, tree: Any) -> None:
        found = {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors_of(tree)}
        self._storages = [s for s in found.values() if s.nbytes()]
        self._sizes = [s.nbytes() for s in self._storages]
        self.nbytes = sum(self._sizes)
        self.restored = False
        self._on_gpu = any(s.device.type == "cuda" for s in self._storages)
        sizes = [min(PIECE_BYTES, self.nbytes - at) for at in range(0, self.nbytes, PIECE_BYTES)]
        self._pieces = [torch.empty(n, dtype=torch.uint8, pin_memory=self._on_gpu) for n in sizes]
        for there, here in self._pairs():
            here.copy_(there, non_blocking=True)
        self._settle()
        self._empty()

    def restore(self) -> None:
        """Everything as it was.  Where the device has no room, RuntimeError, and everything is here as before."""
        try:
            for storage, size in zip(self._storages, self._sizes, strict=True):
                storage.resize_(size)
            for there, here in self._pairs():
                there.copy_(here, non_blocking=True)
            self._settle()
        except BaseException:
            self._empty()
            raise
        self.restored = True
        self._pieces.clear()
        if self._on_gpu:
            _tell("_host_emptyCache")

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Parts of the storages beside the parts of the pieces that hold them."""
        at = 0
        for storage, size in zip(self._storages, self._sizes, strict=True):
            whole, done = flat(storage), 0
            while done < size:
                piece, byte = divmod(at, PIECE_BYTES)
                n = min(size - done, PIECE_BYTES - byte)
                yield whole[done : done + n], self._pieces[piece][byte : byte + n]
                done, at = done + n, at + n

    def _empty(self) -> None:
        for storage in self._storages:
            storage.resize_(0)
        if self._on_gpu:
            torch.cuda.empty_cache()

    def _settle(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()
