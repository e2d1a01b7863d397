"""[heavy] AnnIndex: item vectors under their keys, built once: a run's index, and the base of a live one.

Shape legend: M items, D dimension, B queries, Q sample queries, K neighbours.
"""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from recsys.candidates.nearest.base import Keys, Vectors
from recsys.candidates.nearest.engine import Engine
from recsys.candidates.nearest.exact import Found, exact_search, padded
from recsys.candidates.nearest.flat import KIND as FLAT
from recsys.candidates.nearest.flat import FlatEngine
from recsys.candidates.nearest.gpu import GpuEngine
from recsys.candidates.nearest.hnsw import KIND as HNSW
from recsys.candidates.nearest.hnsw import HnswEngine
from recsys.candidates.nearest.ivf import KIND as IVF
from recsys.candidates.nearest.ivf import IvfEngine
from recsys.candidates.nearest.rows import Rows, RowSet
from recsys.candidates.nearest.sharded import WHOLE, Shard
from recsys.candidates.nearest.tuning import Sample
from recsys.core import BadInput, CorruptData, RunDirectory, VersionMismatch
from recsys.core.ids import find_rows
from recsys.models.config import IndexConfig

INDEX_FILE, FACTS_FILE = "index/ann.faiss", "index/ann.json"
METRIC = "inner_product"
DEFAULT = IndexConfig()
_IVF_ITEMS_MIN = 256  # FAISS trains no codes on fewer than 16, and a scan of some hundred costs nothing


class AnnIndex:
    """Searched by inner product: exact for small catalogues, approximate beyond. Never changes once built."""

    def __init__(self, engine: Engine, row_key: Keys, config: IndexConfig) -> None:
        """row_key: key of each of the engine's rows [M]. Use `build` or `load`.

        Raises: Unavailable when the configuration names a device that is not there.
        """
        self._host, self.engine = engine, engine if config.device == "cpu" else GpuEngine(engine)
        self.row_key, self._config = row_key, config
        self.dim = int(engine.vectors.shape[1])
        self._row_by_place = np.argsort(row_key, kind="stable")
        self._sorted_key = row_key[self._row_by_place]

    def __len__(self) -> int:
        return len(self.row_key)

    @classmethod
    def build(
        cls,
        item_key: Keys,
        vectors: Vectors,
        config: IndexConfig = DEFAULT,
        *,
        queries: Vectors | None = None,
        like: AnnIndex | None = None,
        share: float = 1.0,
    ) -> AnnIndex:
        """From keys [M], distinct, and vectors [M, D].

        queries: [Q, D] what will be asked, held out of training; None = some of the items' own vectors. like: an index
        whose trained quantizers and tuning are used again where its kind allows it; the caller then vouches for keys.
        share: of like's items that these are, drawn by chance.
        Raises: BadInput for shapes that do not fit, repeated keys or vectors that are not finite.
        """
        _check(item_key, vectors, distinct=like is not None)
        vectors = np.ascontiguousarray(vectors, np.float32)
        kind = config.kind
        if kind == "auto":
            kind = FLAT if len(item_key) <= config.exact_items_max else IVF
        if kind == FLAT or not len(item_key) or (kind == IVF and len(item_key) < _IVF_ITEMS_MIN):
            return cls(FlatEngine.build(vectors), np.array(item_key, np.int64), config)
        sample = Sample.draw(vectors, queries, config.tuning_queries)
        engine: Engine
        if kind == HNSW:
            engine, order = HnswEngine.build(vectors, sample, config)
        else:
            base = like._host if like is not None and isinstance(like._host, IvfEngine) else None
            engine, order = IvfEngine.build(vectors, sample, config, base, share)
        return cls(engine, item_key[order], config)

    def save(self, folder: Path, run_id: str) -> None:
        """Write ann.faiss and ann.json into `folder` (a run's index/)."""
        with_keys = faiss.IndexIDMap(faiss.IndexFlatIP(self.dim))  # it wants an empty one at first
        with_keys.index, with_keys.ntotal = self.engine.index, len(self)
        faiss.copy_array_to_vector(self.row_key, with_keys.id_map)
        try:
            faiss.write_index(with_keys, str(folder / Path(INDEX_FILE).name))
        except RuntimeError as error:  # FAISS has no other
            raise OSError(errno.EIO, str(error), str(folder)) from error
        (folder / Path(FACTS_FILE).name).write_text(json.dumps(self.facts(run_id)), "utf-8")

    def facts(self, run_id: str) -> dict[str, Any]:
        """What ann.json says."""
        kind, tuned = self.engine.kind, dict(self.engine.tuned)
        return {
            "dim": self.dim, "metric": METRIC, "num_items": len(self), "run_id": run_id, "kind": kind, "tuned": tuned
        }  # fmt: skip

    @classmethod
    def load(cls, run: RunDirectory, config: IndexConfig = DEFAULT, shard: Shard = WHOLE) -> AnnIndex:
        """The index of a run, or one shard of it.

        Raises: NotFound when the run has none; CorruptData when FAISS cannot read it or it is not what ann.json says;
        VersionMismatch when another release wrote it.
        """
        return cls.read(run.path(INDEX_FILE), run.path(FACTS_FILE), config, shard)

    @classmethod
    def read(cls, path: Path, facts_path: Path, config: IndexConfig = DEFAULT, shard: Shard = WHOLE) -> AnnIndex:
        """The index of two files that `save` wrote, or one shard of it: memory then holds that one's items alone.

        Raises: CorruptData, VersionMismatch.
        """
        try:
            facts = json.loads(facts_path.read_text("utf-8"))
            with_keys: Any = faiss.read_index(str(path), 0 if shard.whole else faiss.IO_FLAG_MMAP_IFC)
        except (RuntimeError, ValueError) as error:
            raise _corrupt(path, str(error).splitlines()[0]) from error
        if (with_keys.d, with_keys.ntotal) != (facts["dim"], facts["num_items"]):
            raise _corrupt(path, f"{with_keys.ntotal} items of dimension {with_keys.d}, ann.json says {facts}")
        if "kind" not in facts:
            raise VersionMismatch(
                str(facts_path),
                came="no kind of index",
                expected="facts of this release",
                fix="Train again, or use the double11 release that wrote the run.",
            )
        index: Any = faiss.downcast_index(with_keys.index)
        index.referenced_objects = [with_keys]
        engine, row_key = _engine(facts, index, path), faiss.vector_to_array(with_keys.id_map)
        if shard.whole:
            return cls(engine, row_key, config)
        rows = np.flatnonzero(shard.holds(row_key))
        like, share = cls(engine, row_key, replace(config, device="cpu")), len(rows) / max(len(row_key), 1)
        return cls.build(row_key[rows], engine.vectors[rows], config, like=like, share=share)

    def search(self, vectors: Vectors, k: int, allowed: RowSet | None = None) -> tuple[Keys, npt.NDArray[np.float32]]:
        """Keys [B, K] and inner products [B, K] of the nearest items, K = min(k, M), best first; key -1 = none found.

        Raises: VersionMismatch for vectors of another dimension; BadInput for what is not finite.
        """
        queries, there = checked(vectors, self.dim), len(self) if allowed is None else len(allowed)
        rows, scores = self.search_rows(queries, max(min(k, len(self)), 1), allowed, there)
        return self.keys_of(rows), scores

    def search_rows(self, queries_BD: Vectors, k: int, allowed: RowSet | None, there: int) -> Found:
        """The same by row number, `there` rows being allowed. Fewer than k are found only where fewer are there."""
        vectors = self.engine.vectors
        if not there or not len(queries_BD):
            return padded((np.empty((len(queries_BD), 0), np.int64), np.empty((len(queries_BD), 0), np.float32)), k)
        if allowed is not None and there <= self._config.exact_rows_max and there < len(self):
            return exact_search(vectors, queries_BD, k, allowed.rows())
        rows, scores = padded(self.engine.search(queries_BD, min(k, len(self)), allowed, there), k)
        short = rows[:, min(k, there) - 1] < 0
        if short.any():  # the lists or the part of the graph that was seen holds fewer
            some = None if allowed is None else allowed.rows()
            rows[short], scores[short] = exact_search(vectors, queries_BD[short], k, some)
        return rows, scores

    def rows_of(self, item_key: Keys) -> Rows:
        """Row of each key [N]; -1 for a key that is not here."""
        return find_rows(self._sorted_key, item_key, self._row_by_place)

    def keys_of(self, rows: Rows) -> Keys:
        """Key of each row, -1 for row -1; the shape is that of `rows`."""
        if not len(self):
            return np.full(rows.shape, -1, np.int64)
        return np.where(rows >= 0, self.row_key[rows], -1)


def checked(vectors: Vectors, dim: int) -> Vectors:
    """Queries as FAISS wants them.

    Raises: VersionMismatch for another dimension; BadInput for what is not finite.
    """
    if vectors.ndim != 2 or vectors.shape[1] != dim:
        raise other_dimension(f"queries of shape {vectors.shape}", dim)
    if not np.isfinite(vectors).all():
        raise BadInput("ann queries", came="NaN or infinity", expected="finite vectors", fix="Look at the tower.")
    return np.ascontiguousarray(vectors, np.float32)


def other_dimension(came: str, dim: int) -> VersionMismatch:
    """Vectors and index do not belong together."""
    return VersionMismatch(
        "ann index",
        came=came,
        expected=f"dimension {dim}, that of the index",
        fix="Use the tower and the index of one run; after changing the tower, train again so that both are written.",
    )


def _engine(facts: dict[str, Any], index: Any, path: Path) -> Engine:
    readers: dict[str, tuple[type, Any]] = {
        FLAT: (faiss.IndexFlat, lambda: FlatEngine(index)),
        HNSW: (faiss.IndexHNSWFlat, lambda: HnswEngine(index, facts["tuned"])),
        IVF: (faiss.IndexRefine, lambda: IvfEngine(index, facts["tuned"])),
    }
    kind = facts["kind"]
    if kind not in readers or not isinstance(index, readers[kind][0]):
        raise _corrupt(path, f"{type(index).__name__}, ann.json says {kind}")
    engine: Engine = readers[kind][1]()
    return engine


def _check(item_key: Keys, vectors: Vectors, *, distinct: bool) -> None:
    fits = vectors.ndim == 2 and len(vectors) == len(item_key)
    if not fits or not np.isfinite(vectors).all():
        raise BadInput(
            "ann vectors",
            came=f"shape {vectors.shape} for {len(item_key)} keys, finite: {bool(np.isfinite(vectors).all())}",
            expected="one finite vector per key",
            fix="Look for NaN in the tower's training.",
        )
    if not distinct and len(np.unique(item_key)) != len(item_key):
        raise BadInput(
            "ann keys", came="the same key twice", expected="distinct keys", fix="Keep one vector of each item."
        )


def _corrupt(path: Path, came: str) -> CorruptData:
    return CorruptData(
        str(path), came=came, expected="the index that training wrote", fix="Train again, or copy the run whole."
    )
