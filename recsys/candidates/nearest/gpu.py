"""[heavy] The exact scan on a CUDA device, where faiss-gpu is installed. Shape legend: see engine.py.

FAISS's GPU indexes take no selector, so a filter is asked for more than it leaves out on average and what it does not
admit is dropped; the caller scans exactly where that was not enough. The vectors stay in host memory too: filters that
leave few rows, rebuilds and snapshots read them there.
"""

from __future__ import annotations

import faiss
import numpy as np

from recsys.candidates.nearest.base import Vectors
from recsys.candidates.nearest.engine import Engine, found
from recsys.candidates.nearest.exact import Found, padded
from recsys.candidates.nearest.rows import RowSet
from recsys.core import Unavailable

_K_MAX = 2_048  # of FAISS on a GPU
_MORE = 1.5


def num_devices() -> int:
    """CUDA devices that FAISS can use; 0 without faiss-gpu."""
    return int(faiss.get_num_gpus()) if hasattr(faiss, "StandardGpuResources") else 0


class GpuEngine:
    """GpuIndexFlatIP beside the engine it was made from."""

    def __init__(self, host: Engine, device: int = 0) -> None:
        """host: keeps the vectors and is what ann.faiss is written from.

        Raises: Unavailable without faiss-gpu or a device.
        """
        if not num_devices():
            raise Unavailable(
                "models.index.device cuda",
                came="no CUDA device that FAISS can use",
                expected="faiss-gpu and a device",
                fix="Install faiss-gpu in place of faiss-cpu, or set models.index.device to cpu.",
            )
        self.kind, self.tuned = host.kind, host.tuned
        self.index, self.vectors = host.index, host.vectors
        self._host, self._resources = host, faiss.StandardGpuResources()
        flat = faiss.IndexFlatIP(host.vectors.shape[1])
        flat.add(np.ascontiguousarray(host.vectors))
        self._device_index = faiss.index_cpu_to_gpu(self._resources, device, flat)

    def search(self, queries_BD: Vectors, k: int, allowed: RowSet | None, num_allowed: int) -> Found:
        """See Engine. Beyond what the device can give, the host answers."""
        more = k if allowed is None else int(k * len(self.vectors) / max(num_allowed, 1) * _MORE)
        if more > _K_MAX:
            return self._host.search(queries_BD, k, allowed, num_allowed)
        rows, scores = found(self._device_index.search(queries_BD, min(more, len(self.vectors))))
        if allowed is None:
            return rows, scores
        passed = allowed.has(rows)
        first = np.argsort(~passed, axis=1, kind="stable")
        rows, scores = np.where(passed, rows, -1), np.where(passed, scores, -np.inf).astype(np.float32)
        return padded((np.take_along_axis(rows, first, 1)[:, :k], np.take_along_axis(scores, first, 1)[:, :k]), k)
