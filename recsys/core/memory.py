"""How the C library treats memory that is freed."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_TRIM_BYTES, _MMAP_BYTES = 256 << 20, 32 << 20  # older versions refuse more than 32 MiB for the latter


def keep_freed_memory() -> bool:
    """Let this process keep up to 256 MiB of freed memory, instead of taking it anew from the kernel page by page.

    A forward or a training step makes and frees tensors of some megabytes hundreds of times; page faults were an eighth
    of its time. Returns False where the C library is not glibc: nothing is changed then. Source: mallopt(3).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES) and mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES))
