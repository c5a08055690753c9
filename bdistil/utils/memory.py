"""Memory allocator settings of glibc."""

from __future__ import annotations

import ctypes
import os

# Parameters of mallopt in <malloc.h>: free bytes at the end of the heap that are returned to the system, and the size
# of blocks that are mapped one by one (at most 32 MiB).
TRIM, TRIM_BYTES = -1, 256 << 20
MMAP, MMAP_BYTES = -3, 32 << 20


def keep_freed_memory() -> bool:
    """Makes glibc keep up to 256 MiB of freed memory for the next batch; returns whether it does.

    Otherwise the activations of every batch are fresh pages, which the system has to clear: a stage of a small
    convolutional student takes up to 2.2 times as long at batch 256. Does nothing without glibc, or if the user has
    set one of its `MALLOC_…_` variables.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, another system
        return False
    return all([mallopt(TRIM, TRIM_BYTES), mallopt(MMAP, MMAP_BYTES)])
