"""Tensors that are too many for memory, in a temporary file."""

import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

#: Tensors of one list stay in memory up to so many bytes; the rest goes into a file.
IN_MEMORY = 64 * 2**20


class Spilled(Sequence):
    """A list of tensors of which at most ``in_memory`` bytes (:data:`IN_MEMORY`) are in memory.

    One that lies in the file is read whenever it is asked for: change it and put it back. The file
    is in :func:`temporary_folder`, without a name, so that none is left behind, however the process
    ends. Writing raises OSError where the disk is full.

    Args:
        tensors: strided, on any device; those from the file come back on the CPU.
    """

    def __init__(self, tensors: Iterable[Tensor] = (), in_memory: int | None = None):
        self._file, self._size, self._in_memory = None, 0, 0
        self._limit = IN_MEMORY if in_memory is None else in_memory
        #: Tensors, or (offset, shape, dtype) of those in the file.
        self._items: list[Tensor | tuple[int, torch.Size, torch.dtype]] = []
        for tensor in tensors:
            self.append(tensor)

    def append(self, tensor: Tensor) -> None:
        self._items.append(self._place(tensor.detach(), self._size))

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, i: int) -> Tensor:
        item = self._items[i]
        if isinstance(item, Tensor):
            return item
        offset, shape, dtype = item
        data = torch.empty(shape.numel() * dtype.itemsize, dtype=torch.uint8)
        self._file.seek(offset)
        self._file.readinto(memoryview(data.numpy()))
        return data.view(dtype).view(shape)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def __setitem__(self, i: int, tensor: Tensor) -> None:
        item, offset = self._items[i], self._size
        if isinstance(item, Tensor):
            self._in_memory -= item.nbytes
        elif item[1].numel() * item[2].itemsize == tensor.nbytes:
            offset = item[0]
        self._items[i] = self._place(tensor.detach(), offset)

    def _place(self, tensor: Tensor, offset: int) -> Tensor | tuple:
        """Keep a tensor in memory, or else at an offset of the file."""
        if self._in_memory + tensor.nbytes <= self._limit:
            self._in_memory += tensor.nbytes
            return tensor
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=temporary_folder())
        self._file.seek(offset)
        self._file.write(memoryview(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy()))
        self._size = max(self._size, offset + tensor.nbytes)
        return offset, tensor.shape, tensor.dtype


def temporary_folder() -> str:
    """Where large temporary files go: TMPDIR, else /var/tmp, for /tmp is often in memory itself."""
    if "TMPDIR" not in os.environ and os.access("/var/tmp", os.W_OK):
        return "/var/tmp"
    return tempfile.gettempdir()
