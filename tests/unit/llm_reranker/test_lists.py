"""List files: what is read, and what is refused with words."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm_reranker.lists import SCHEMA, read
from recsys.core import BadInput, CorruptData


def rows(**changes: list[object]) -> pa.Table:
    columns: dict[str, list[object]] = {
        "query_id": ["q2", "q1", "q1", "q2"], "query_time": [200, 100, 100, 200],
        "new_only": [True, False, False, True], "history_text": ["b", "a", "a", "b"],
        "item_id": ["x", "x", "y", "z"], "item_text": ["X", "X", None, "Z"],
        "item_embedding": [[1.0, 2.0], None, [3.0, 4.0], [5.0, 6.0]], "retrieval_score": [0.5, None, 0.1, 0.2],
        "rank_score": [-1.0, 2.0, 3.0, 1.0], "origin": ["ann"] * 4, "label": [1.0, 0.0, 1.0, 0.0],
    }  # fmt: skip
    return pa.table({**columns, **changes}, schema=SCHEMA)


def write(path: Path, table: pa.Table) -> Path:
    pq.write_table(table, path)
    return path


def test_lists_come_in_time_order_and_rows_in_rank_order(tmp_path: Path) -> None:
    lists = read(write(tmp_path / "l.parquet", rows()))
    assert (lists.query_id, lists.query_time_us.tolist(), lists.history_text) == (["q1", "q2"], [100, 200], ["a", "b"])
    assert (lists.offsets.tolist(), lists.new_only.tolist()) == ([0, 2, 4], [False, True])
    assert [lists.item_id[r] for r in lists.rows(0)] == ["y", "x"]
    assert [lists.item_id[r] for r in lists.rows(1)] == ["z", "x"]
    features = lists.features(lists.rows(0))
    np.testing.assert_array_equal(features, np.array([[0.1, 3, 0], [np.nan, 2, 1]], np.float32))
    assert np.isnan(lists.item_embedding[0]).all()
    assert lists.item_text[1] == ""


def test_a_file_of_the_test_world_reads(world: ModuleType, tmp_path: Path) -> None:
    lists = read(world.write_lists(tmp_path / "l.parquet", queries=8))
    assert (len(lists), lists.item_embedding.shape) == (8, (128, 8))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank_score": [1.0, float("nan"), 0.0, 0.0]}, "rank_score"),
        ({"retrieval_score": [float("inf"), 0.0, 0.0, 0.0]}, "retrieval_score"),
        ({"retrieval_score": [-3.4e38, 0.0, 0.0, 0.0]}, "retrieval_score: got 1 bad.*null where one is missing"),
        ({"rank_score": [0.0, 0.0, 0.0, -1e20]}, "rank_score"),
        ({"label": [2.0, 0.0, 0.0, 0.0]}, "label"),
        ({"item_id": ["x", "x", "x", "z"]}, "once per query"),
        ({"query_time": [200, 100, 101, 200]}, "one value per query"),
        ({"new_only": [True, False, True, True]}, "one value per query"),
        ({"item_embedding": [[1.0], [1.0, 2.0], [1.0], [1.0]]}, "one width"),
        ({"item_embedding": [[1.0], [float("inf")], [1.0], [1.0]]}, "item_embedding.*1 infinite"),
        ({name: [] for name in SCHEMA.names}, "no rows"),
    ],
)
def test_rows_that_make_no_sense_are_refused(changes: dict[str, list[object]], words: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=words):
        read(write(tmp_path / "l.parquet", rows(**changes)))


def test_lists_from_after_the_run_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "l.parquet", rows())
    assert len(read(path, until_us=201)) == 2
    with pytest.raises(BadInput, match=r"query_time: got 2 bad, first in query 'q2'.*until, 1970-01-01"):
        read(path, until_us=200)


def test_missing_columns_wrong_types_and_nulls_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "l.parquet"
    for name in ("label", "new_only"):
        with pytest.raises(BadInput, match=f"no column {name}"):
            read(write(path, rows().drop_columns([name])))
    words = rows().set_column(SCHEMA.names.index("rank_score"), "rank_score", pa.array(["high", "low", "1", "2"]))
    with pytest.raises(BadInput, match="column rank_score"):
        read(write(path, words))
    nulls = rows().set_column(SCHEMA.names.index("item_id"), "item_id", pa.array(["x", None, "y", "z"]))
    with pytest.raises(BadInput, match="1 nulls"):
        read(write(path, nulls))


def test_half_written_and_missing_files_are_said_so(tmp_path: Path) -> None:
    path = write(tmp_path / "l.parquet", rows())
    path.write_bytes(path.read_bytes()[:-20])
    for bad in (path, tmp_path / "none.parquet"):
        with pytest.raises(CorruptData, match="parquet"):
            read(bad)
