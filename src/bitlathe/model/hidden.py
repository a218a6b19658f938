"""Hidden states of the calibration text, under a memory budget: what does not fit lies in a memory-mapped file."""

from __future__ import annotations

import errno
import mmap
import os
import sys
import tempfile
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from bitlathe.errors import OutputError
from bitlathe.io.sizes import human

_BUSY = 1024  # tokens that a CPU is given at a time


class Hidden:
    """Hidden states [sequences, tokens, width] that are read and replaced a batch at a time.

    `hidden[batch]` is a batch on `device`, to be read only: what lies in a file or on another device is copied, as is what an
    index tensor picks; a slice of what is in memory on `device` is a view, and shows what is written later. `hidden[batch] = x`
    writes one back. A batch is a slice or an index tensor.
    """

    def __init__(self, data: Tensor, device: torch.device, pages: mmap.mmap | None = None) -> None:
        self._data, self._device, self._pages = data, device, pages

    def __len__(self) -> int:
        return self._data.shape[0]

    def __getitem__(self, batch: slice | Tensor) -> Tensor:
        part = self._data[batch].to(self._device, copy=self._pages is not None)
        self._drop_pages()
        return part

    def __setitem__(self, batch: slice | Tensor, x: Tensor) -> None:
        self._data[batch] = x.to(self._data.device, self._data.dtype)
        self._drop_pages()

    @property
    def shape(self) -> tuple[int, int, int]:
        """[sequences, tokens, width]."""
        sequences, tokens, width = self._data.shape
        return sequences, tokens, width

    @property
    def spilled(self) -> bool:
        """Whether these states lie in a file."""
        return self._pages is not None

    def batches(self, size: int, *, first: int | None = None, start: int = 0) -> list[slice]:
        """Slices of at most `size` sequences that cover all of them in order, or the `first` ones, or all from `start` on.

        On a CPU they are no longer than keeps it busy: more tokens at a time take their memory, and no time less.
        """
        if self._device.type == "cpu":
            size = min(size, max(1, _BUSY // self._data.shape[1]))
        last = len(self) if first is None else min(first, len(self))
        return [slice(at, min(at + size, last)) for at in range(start, last, size)]

    def copy_from(self, other: Hidden, size: int) -> None:
        """Become equal to others of the same shape, `size` sequences at a time."""
        for batch in self.batches(size):
            self[batch] = other[batch]

    def _drop_pages(self) -> None:
        # Mapped pages count as resident memory until they are dropped; the file keeps what was written.
        if self._pages is not None:
            self._pages.madvise(mmap.MADV_DONTNEED)


@dataclass
class Budget:
    """Memory for hidden states: `limit` bytes in all; beyond it they go to files in `folder`."""

    limit: int
    folder: Path
    _used: int = field(default=0, repr=False)

    def allocate(self, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Hidden:
        """Room for hidden states of `shape` [sequences, tokens, width], handed out to `device`.

        Raises OutputError when they must go to a file and the disk has no room for it.
        """
        nbytes = prod(shape) * dtype.itemsize
        if self._used + nbytes <= self.limit:
            self._used += nbytes
            return Hidden(torch.empty(shape, dtype=dtype), device)
        pages = _mapped_file(self.folder, nbytes)
        return Hidden(torch.frombuffer(pages, dtype=dtype).view(shape), device, pages)


def _mapped_file(folder: Path, nbytes: int) -> mmap.mmap:
    """A shared mapping of a new file that no name leads to, so that it goes when the process does, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder, prefix="hidden-") as file:
        try:
            if sys.platform == "darwin":
                file.truncate(nbytes)  # it has no posix_fallocate
            else:
                # Without this a full disk would be a SIGBUS in the middle of a copy.
                os.posix_fallocate(file.fileno(), 0, nbytes)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise OutputError(
                f"no room in {folder} for {human(nbytes)} of hidden states. Free some, raise memory.activations, "
                "or calibrate with fewer or shorter samples"
            ) from error
        return mmap.mmap(file.fileno(), nbytes)
