"""A full disk, as processes see one: what they write behind a file's limit is refused, first half of it, then all."""

import contextlib
import os

import psutil


@contextlib.contextmanager
def files_end_at(num_bytes, pid=None):
    """In this process, or in another one."""
    process = psutil.Process(pid or os.getpid())
    soft, hard = process.rlimit(psutil.RLIMIT_FSIZE)
    process.rlimit(psutil.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        process.rlimit(psutil.RLIMIT_FSIZE, (soft, hard))
