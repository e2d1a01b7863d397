"""[heavy] The exact scan in blocks: what approximate answers are judged by, and what scans filters that leave few rows.

Shape legend: M rows, R allowed rows, B queries, D dimension, K neighbours.
"""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from recsys.candidates.nearest.base import Vectors
from recsys.candidates.nearest.rows import Rows
from recsys.candidates.nearest.sharded import merge

_ROWS_PER_BLOCK, _QUERIES_PER_BLOCK = 65_536, 64
_FEW_QUERIES = 4
_faiss: Any = faiss  # its stubs leave this function out
Found = tuple[Rows, Vectors]


def products(queries_BD: Vectors, vectors_ND: Vectors) -> Vectors:
    """Inner products [B, N] of rows that lie one behind the other in memory.

    Few queries go without BLAS: OpenBLAS shares even one among all cores, and then waits for the core that has other
    work (measured beside two busy processes: 19 ms instead of .1).
    """
    if len(queries_BD) > _FEW_QUERIES:
        matrix: Vectors = queries_BD @ vectors_ND.T
        return matrix
    out = np.empty((len(queries_BD), len(vectors_ND)), np.float32)
    for query, row in zip(queries_BD, out, strict=True):
        pointers = (faiss.swig_ptr(a) for a in (row, np.ascontiguousarray(query), vectors_ND))
        _faiss.fvec_inner_products_ny(*pointers, vectors_ND.shape[1], len(vectors_ND))
    return out


def exact_search(vectors_MD: Vectors, queries_BD: Vectors, k: int, rows: Rows | None = None) -> Found:
    """Rows [B, K] and inner products [B, K] of the nearest, best first; K = k, row -1 and -inf where there are fewer.

    rows: [R] the rows to look at, or None for all. Memory: a block of scores, whatever M and B are.
    """
    blocks = [
        _search_block(vectors_MD, queries_BD[at : at + _QUERIES_PER_BLOCK], k, rows)
        for at in range(0, len(queries_BD), _QUERIES_PER_BLOCK)
    ]
    if not blocks:
        return np.empty((0, k), np.int64), np.empty((0, k), np.float32)
    return np.concatenate([b[0] for b in blocks]), np.concatenate([b[1] for b in blocks])


def best(scores_BR: Vectors, k: int) -> Found:
    """Columns [B, min(k, R)] of the greatest scores, best first, and those scores."""
    columns = scores_BR.shape[1]
    if k < columns:
        top = np.argpartition(scores_BR, columns - k, axis=1)[:, columns - k :]
    else:
        top = np.broadcast_to(np.arange(columns), scores_BR.shape)
    value = np.take_along_axis(scores_BR, top, axis=1)
    order = np.argsort(-value, axis=1, kind="stable")
    return np.take_along_axis(top, order, axis=1), np.take_along_axis(value, order, axis=1)


def padded(found: Found, k: int) -> Found:
    """The same with exactly k columns."""
    short = k - found[0].shape[1]
    if short <= 0:
        return found[0][:, :k], found[1][:, :k]
    width: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, short))
    return np.pad(found[0], width, constant_values=-1), np.pad(found[1], width, constant_values=-np.inf)


def _search_block(vectors_MD: Vectors, queries_BD: Vectors, k: int, rows: Rows | None) -> Found:
    total = len(vectors_MD) if rows is None else len(rows)
    parts: list[Found] = []
    for at in range(0, total, _ROWS_PER_BLOCK):
        some: npt.NDArray[np.int64] | slice = (
            slice(at, at + _ROWS_PER_BLOCK) if rows is None else rows[at : at + _ROWS_PER_BLOCK]
        )
        block = vectors_MD[some] if isinstance(some, slice) else vectors_MD.take(some, axis=0)
        place, score = best(products(queries_BD, block), k)
        parts.append((place + at if rows is None else rows[at + place], score))
        parts = [merge(parts, k)]
    return (
        padded(parts[0], k)
        if parts
        else padded((np.empty((len(queries_BD), 0), np.int64), np.empty((len(queries_BD), 0), np.float32)), k)
    )
