"""A file in memory, read-only, without a descriptor: thousands of shards may be open where a thousand files may not.

Python's own mmap keeps a descriptor for each mapping (until 3.13), and so would need three a shard.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_omega.host.regular_files import open_regular

_FAILED = ctypes.c_void_p(-1).value


class MappedFile:
    """The bytes of a regular file; `data` is a view on them, which keeps them mapped."""

    def __init__(self, path: str | Path) -> None:
        """Map `path`. Raises OSError if it cannot be read, ValueError if it is empty."""
        descriptor = open_regular(path)
        try:
            self._size = os.fstat(descriptor).st_size
            if not self._size:
                raise ValueError("it is empty")
            self._address = _map(descriptor, self._size)
        finally:
            os.close(descriptor)
        memory = (ctypes.c_ubyte * self._size).from_address(self._address)
        weakref.finalize(memory, _libc().munmap, self._address, self._size)  # every view holds on to it
        self._bytes = np.frombuffer(memoryview(memory), dtype=np.uint8)
        self._bytes.flags.writeable = False

    def __len__(self) -> int:
        return self._size

    @property
    def data(self) -> memoryview:
        """All bytes."""
        return memoryview(self._bytes.data)

    def array(self, dtype: Any) -> NDArray[Any]:
        """Return all bytes as numbers."""
        return self._bytes.view(dtype)

    def advise(self, advice: str, start: int = 0, stop: int | None = None) -> None:
        """Tell the system how bytes start..stop will be read (`MADV_...`), where it can be told."""
        start -= start % mmap.PAGESIZE
        stop = self._size if stop is None else min(stop, self._size)
        if start < stop and hasattr(mmap, advice):
            _libc().madvise(self._address + start, stop - start, getattr(mmap, advice))


@cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


def _map(descriptor: int, size: int) -> int:
    address = _libc().mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    if address == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return address
