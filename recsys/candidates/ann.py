"""ANN: the items nearest to the user's tower vector. Heavy: imports FAISS, so only `build` and workers import it.

Shape legend: M items, D dimension, B queries, K neighbours.
Source: Malkov & Yashunin 2018 (HNSW); FAISS, https://github.com/facebookresearch/faiss/wiki (IndexIDMap2, IndexHNSW).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import faiss
import numpy as np
import numpy.typing as npt

from feature_store import UserFeatures
from recsys.candidates.behaviour import touched
from recsys.core import BadInput, Candidates, CorruptData, Deadline, Query, RunDirectory, VersionMismatch

NAME = "ann"
INDEX_FILE, FACTS_FILE = "index/ann.faiss", "index/ann.json"
METRIC = "inner_product"
EXACT_ITEMS_MAX = 50_000  # up to here one exact scan costs about what the graph does, and misses nothing
_HNSW_LINKS, _HNSW_EF_CONSTRUCTION, _HNSW_EF_SEARCH = 32, 200, 256


class UserEncoder(Protocol):
    """What a tower offers; `recsys.models.tower.Tower` is one."""

    @property
    def dim(self) -> int:
        """Dimension D of the vectors."""
        ...

    def encode_user(
        self,
        history_keys: npt.NDArray[np.int64],
        history_types: npt.NDArray[np.int8],
        history_times_us: npt.NDArray[np.int64],
        as_of_us: int,
    ) -> npt.NDArray[np.float32]:
        """The user vector [D] of one history, oldest first."""
        ...


class AnnIndex:
    """Item vectors under their keys, searched by inner product: exact for small catalogues, HNSW beyond."""

    def __init__(self, index: Any, dim: int) -> None:
        """Use `build` or `load`."""
        self._index, self.dim = index, dim

    def __len__(self) -> int:
        return int(self._index.ntotal)

    @classmethod
    def build(cls, item_key: npt.NDArray[np.int64], vectors: npt.NDArray[np.float32]) -> AnnIndex:
        """From keys [M], distinct, and vectors [M, D].

        Raises: BadInput for shapes that do not fit or vectors that are not finite.
        """
        if vectors.ndim != 2 or len(vectors) != len(item_key) or not np.isfinite(vectors).all():
            raise BadInput(
                "ann vectors",
                came=f"shape {vectors.shape} for {len(item_key)} keys, finite: {bool(np.isfinite(vectors).all())}",
                expected="one finite vector per key",
                fix="Look for NaN in the tower's training.",
            )
        dim = vectors.shape[1]
        if len(item_key) <= EXACT_ITEMS_MAX:
            base: Any = faiss.IndexFlatIP(dim)
        else:
            base = faiss.IndexHNSWFlat(dim, _HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
            base.hnsw.efConstruction, base.hnsw.efSearch = _HNSW_EF_CONSTRUCTION, _HNSW_EF_SEARCH
        index = faiss.IndexIDMap2(base)
        if len(item_key):
            index.add_with_ids(np.ascontiguousarray(vectors, np.float32), np.ascontiguousarray(item_key, np.int64))
        return cls(index, dim)

    def save(self, folder: Path, run_id: str) -> None:
        """Write ann.faiss and ann.json into `folder` (a run's index/)."""
        faiss.write_index(self._index, str(folder / Path(INDEX_FILE).name))
        facts = {"dim": self.dim, "metric": METRIC, "num_items": len(self), "run_id": run_id}
        (folder / Path(FACTS_FILE).name).write_text(json.dumps(facts), "utf-8")

    @classmethod
    def load(cls, run: RunDirectory) -> AnnIndex:
        """The index of a run.

        Raises: NotFound when the run has none; CorruptData when FAISS cannot read it or it is not what ann.json says.
        """
        path, facts_path = run.path(INDEX_FILE), run.path(FACTS_FILE)
        try:
            facts = json.loads(facts_path.read_text("utf-8"))
            index = faiss.read_index(str(path))
        except (RuntimeError, ValueError) as error:
            raise _corrupt(path, str(error).splitlines()[0]) from error
        if (index.d, index.ntotal) != (facts["dim"], facts["num_items"]):
            raise _corrupt(path, f"{index.ntotal} items of dimension {index.d}, ann.json says {facts}")
        return cls(index, int(index.d))

    def search(self, vectors: npt.NDArray[np.float32], k: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Keys [B, K] and inner products [B, K] of the nearest items, K = min(k, M), best first; key -1 = none found.

        Raises: VersionMismatch for vectors of another dimension.
        """
        if vectors.ndim != 2 or vectors.shape[1] != self.dim:
            raise _other_dimension(f"queries of shape {vectors.shape}", self.dim)
        scores, item_key = self._index.search(np.ascontiguousarray(vectors, np.float32), max(min(k, len(self)), 1))
        return item_key, scores


class LocalAnnSource:
    """Implements CandidateSource with a tower and an index in this process."""

    name = NAME

    def __init__(self, tower: UserEncoder, index: AnnIndex) -> None:
        """Raises: VersionMismatch when the tower's vectors have another dimension than the index."""
        if tower.dim != index.dim:
            raise _other_dimension(f"a tower of dimension {tower.dim}", index.dim)
        self._tower, self._index = tower, index

    async def retrieve(self, query: Query, user: UserFeatures, limit: int, deadline: Deadline) -> Candidates:
        """Nearest items; none for a user without actions, of whom the tower knows nothing."""
        if not len(user.recent_item_key):
            return Candidates.from_source(self.name, np.empty(0, np.int64), np.empty(0, np.float32))
        deadline.require("ann")
        vector = self._tower.encode_user(
            user.recent_item_key, user.recent_event_type, user.recent_time_us, query.as_of_us
        )
        known = touched(user) if query.new_only else user.pair_item_key[:0]
        item_key, score = self._index.search(vector[None, :], limit + len(known))
        found = (item_key[0] >= 0) & ~np.isin(item_key[0], known)
        return Candidates.from_source(self.name, item_key[0][found][:limit], score[0][found][:limit])


def _corrupt(path: Path, came: str) -> CorruptData:
    return CorruptData(
        str(path), came=came, expected="the index that training wrote", fix="Train again, or copy the run whole."
    )


def _other_dimension(came: str, dim: int) -> VersionMismatch:
    return VersionMismatch(
        "ann index",
        came=came,
        expected=f"dimension {dim}, that of the index",
        fix="Use the tower and the index of one run; after changing the tower, train again so that both are written.",
    )
