"""Candidate lists for distillation: the Parquet schema, and reading with every check.

One row is one candidate of one query. `recsys.training.rerank_lists` writes them; anybody else may. Texts are made
with `llm_reranker.prompt.item_text` and `history_text`, the same functions serving uses.
Shape legend: Q queries, R rows (candidates of all queries), D embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from recsys.core.errors import BadInput, CorruptData

# Candidate features of the rerankers we distil; rank_position counts from 0 by rank_score descending.
FEATURE_NAMES = ("retrieval_score", "rank_score", "rank_position")

SCHEMA = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("query_time", pa.int64(), nullable=False),  # microseconds UTC; nothing in the row is from later
        pa.field("new_only", pa.bool_(), nullable=False),  # the list was asked for new items alone: task new-only
        pa.field("history_text", pa.string(), nullable=False),
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("item_text", pa.string()),
        pa.field("item_embedding", pa.list_(pa.float32())),  # null for an item the tower does not know
        pa.field("retrieval_score", pa.float32()),  # null when no retriever scored it
        pa.field("rank_score", pa.float32(), nullable=False),  # the ranker's logit, out-of-fold
        pa.field("origin", pa.string()),  # why the row is here: a source's name, same_category, random
        pa.field("label", pa.float32(), nullable=False),  # 1 = the user acted on it after query_time, else 0
    ]
)
_SCORE_MAX = 1e9  # beyond are marks for "none", whose squares are no numbers
_FIX = "Make the lists again with `double11 distill` (recsys.training.rerank_lists)."


@dataclass(frozen=True, kw_only=True, slots=True)
class Lists:
    """Q lists of candidates in query_time order; rows offsets[q] to offsets[q + 1] belong to query q.

    query_time_us: int64 [Q], microseconds UTC. new_only: bool [Q], of task new-only, else of task all.
    item_embedding: float32 [R, D], NaN rows where unknown. retrieval_score, rank_score, label: float32 [R];
    retrieval_score is NaN where missing.
    """

    query_id: list[str]
    query_time_us: npt.NDArray[np.int64]
    new_only: npt.NDArray[np.bool_]
    history_text: list[str]
    offsets: npt.NDArray[np.int64]
    item_id: list[str]
    item_text: list[str]
    item_embedding: npt.NDArray[np.float32]
    retrieval_score: npt.NDArray[np.float32]
    rank_score: npt.NDArray[np.float32]
    origin: list[str]
    label: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.query_id)

    def rows(self, query: int) -> npt.NDArray[np.int64]:
        """Row numbers of one query's candidates, best rank_score first (ties keep file order)."""
        rows = np.arange(self.offsets[query], self.offsets[query + 1])
        return rows[np.argsort(-self.rank_score[rows], kind="stable")]

    def features(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """FEATURE_NAMES of one list's rows in rank order (what `rows` gives), float32 [n, 3]."""
        position = np.arange(len(rows), dtype=np.float32)
        return np.stack([self.retrieval_score[rows], self.rank_score[rows], position], axis=1)


def read(path: Path | str, *, until_us: int | None = None) -> Lists:
    """Read and check a list file. until_us: every query has to be from before it, microseconds UTC.

    Raises: CorruptData for a file that is not whole Parquet; BadInput for missing columns, wrong types, nulls where
    none may be, infinite or absurd scores, infinite embeddings, embeddings of several widths, or a query whose rows
    disagree, repeat an item or are from later than they may be.
    """
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise CorruptData(f"lists {path}", came=str(error), expected="a Parquet file", fix=_FIX) from error
    frame = pl.DataFrame(pl.from_arrow(_conform(table, str(path)))).sort("query_time", "query_id", maintain_order=True)
    _check(frame, str(path), until_us)
    first = frame.group_by("query_id", maintain_order=True).agg(
        pl.col("query_time", "new_only", "history_text").first(), pl.len()
    )
    return Lists(
        query_id=first["query_id"].to_list(),
        query_time_us=first["query_time"].to_numpy(),
        new_only=first["new_only"].to_numpy(),
        history_text=first["history_text"].to_list(),
        offsets=np.concatenate([[0], np.cumsum(first["len"].to_numpy())]).astype(np.int64),
        item_id=frame["item_id"].to_list(),
        item_text=frame["item_text"].fill_null("").to_list(),
        item_embedding=_embeddings(frame["item_embedding"], str(path)),
        retrieval_score=frame["retrieval_score"].fill_null(np.nan).to_numpy(),
        rank_score=frame["rank_score"].to_numpy(),
        origin=frame["origin"].fill_null("").to_list(),
        label=frame["label"].to_numpy(),
    )


def _conform(table: pa.Table, path: str) -> pa.Table:
    missing = [n for n in SCHEMA.names if n not in table.column_names]
    if missing:
        raise BadInput(f"lists {path}", came=f"no column {', '.join(missing)}", expected=f"{SCHEMA.names}", fix=_FIX)
    columns = []
    for field in SCHEMA:
        column = table.column(field.name)
        try:
            columns.append(column.cast(field.type))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise BadInput(
                f"lists {path}, column {field.name}", came=str(column.type), expected=str(field.type), fix=_FIX
            ) from error
        if not field.nullable and columns[-1].null_count:
            raise BadInput(
                f"lists {path}, column {field.name}",
                came=f"{columns[-1].null_count} nulls",
                expected="a value in every row",
                fix=_FIX,
            )
    return pa.table(columns, schema=SCHEMA)


def _check(frame: pl.DataFrame, path: str, until_us: int | None) -> None:
    def refuse(bad: pl.DataFrame, what: str, expected: str) -> None:
        if len(bad):
            came = f"{len(bad)} bad, first in query {bad['query_id'][0]!r}"
            raise BadInput(f"lists {path}, {what}", came=came, expected=expected, fix=_FIX)

    if frame.is_empty():
        raise BadInput(f"lists {path}", came="no rows", expected="at least one list", fix=_FIX)
    refuse(frame.filter(~(pl.col("rank_score").abs() <= _SCORE_MAX)), "rank_score", f"numbers up to {_SCORE_MAX:.0e}")
    mad = pl.col("retrieval_score").is_not_nan() & (pl.col("retrieval_score").abs() > _SCORE_MAX)
    refuse(frame.filter(mad), "retrieval_score", f"numbers up to {_SCORE_MAX:.0e}, null where one is missing")
    refuse(frame.filter(~pl.col("label").is_between(0.0, 1.0)), "label", "numbers from 0 to 1")
    refuse(frame.filter(pl.struct("query_id", "item_id").is_duplicated()), "item_id", "an item once per query")
    if until_us is not None:
        until = datetime.fromtimestamp(until_us / 1e6, UTC).isoformat()
        refuse(frame.filter(pl.col("query_time") >= until_us), "query_time", f"times before the run's until, {until}")
    shared = ("query_time", "new_only", "history_text")
    per_query = frame.group_by("query_id").agg(pl.col(shared).n_unique())
    refuse(per_query.filter(pl.any_horizontal(pl.col(shared) > 1)), ", ".join(shared), "one value per query")


def _embeddings(column: pl.Series, path: str) -> npt.NDArray[np.float32]:
    widths = column.list.len().drop_nulls().unique().to_list()
    if len(widths) > 1:
        raise BadInput(f"lists {path}, item_embedding", came=f"widths {sorted(widths)}", expected="one width", fix=_FIX)
    embedding = np.full((len(column), widths[0] if widths else 0), np.nan, np.float32)
    if embedding.size:
        present = column.is_not_null().to_numpy()
        embedding[present] = column.drop_nulls().explode().to_numpy().reshape(-1, widths[0])
    if bad := int(np.isinf(embedding).any(1).sum()):
        raise BadInput(f"lists {path}, item_embedding", came=f"{bad} infinite", expected="finite numbers", fix=_FIX)
    return embedding
