"""Ids, candidates, item tables and the error tree."""

import socket
from pathlib import Path

import grpc
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.core import Candidates, CorruptData, Double11Error, Query, errors, ids, key, keys, metrics
from recsys.core.items import ItemTable


def test_keys_are_xxh3_64_with_the_sign_cleared() -> None:
    # XXH3_64bits of the empty input with seed 0 is 0x2D06800538D394C2 (the specification's own test vector).
    assert key("") == 0x2D06800538D394C2
    assert keys(["", "a"]).tolist() == [key(""), key("a")]
    assert Query(user_id="u", as_of_us=0).user_key == key("u")


def test_later_id_with_a_taken_key_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    true_key = ids.key
    monkeypatch.setattr(ids, "key", lambda i: true_key("apple" if i == "pear" else i))
    kept, kept_keys, rejected = ids.unique_by_key(["apple", "pear", "apple", "plum", "pear"])
    assert kept == ["apple", "plum"]
    assert kept_keys.tolist() == [true_key("apple"), true_key("plum")]
    assert rejected == ["pear", "pear"]


def test_scores_are_columns_by_name() -> None:
    found = Candidates.from_source("ann", np.array([3, 1, 2]), np.array([0.3, 0.1, 0.2]))
    assert (len(found), found.source_names, found.score_names) == (3, ("ann",), ("ann",))
    ranked = found.with_score("rank", np.array([1.0, 2.0, 3.0]))
    assert ranked.score("rank").tolist() == [1.0, 2.0, 3.0]
    assert ranked.with_score("rank", np.array([9.0, 8.0, 7.0])).score("rank").tolist() == [9.0, 8.0, 7.0]
    assert np.isnan(found.score("rank")).all()
    assert found.scores.dtype == np.float32
    assert ranked.take(np.array([2, 0])).item_key.tolist() == [2, 3]
    assert ranked.take(np.array([True, False, False])).score("rank").tolist() == [1.0]


def test_sources_are_bits() -> None:
    found = Candidates(
        item_key=np.array([1, 2]),
        source_bits=np.array([0b101, 0b10], np.uint32),
        scores=np.empty((2, 0), np.float32),
        source_names=("a", "b", "c"),
        score_names=(),
    )
    assert found.sources_of(0) == ("a", "c")
    assert found.sources_of(1) == ("b",)
    assert len(Candidates.empty()) == 0


def test_item_table_finds_rows_and_says_none_for_strangers(tmp_path: Path) -> None:
    names = ["kettle", "mug", "plate"]
    table = ItemTable.from_table(pa.table({"item_id": names, "item_key": keys(names), "price": [3, 2, None]}))
    asked = np.array([key("plate"), key("stranger"), key("mug")])
    assert table.ids(asked) == ["plate", None, "mug"]
    assert table.values("price", asked) == [None, None, 2]
    table.write(tmp_path / "items.parquet")
    assert ItemTable.read(tmp_path / "items.parquet").table.equals(table.table)
    empty = ItemTable.from_table(table.table.slice(0, 0))
    assert empty.ids(asked) == [None, None, None]


def test_half_written_or_foreign_parquet_is_corrupt(tmp_path: Path) -> None:
    path = tmp_path / "items.parquet"
    names = [f"i{i}" for i in range(1000)]
    ItemTable.from_table(pa.table({"item_id": names, "item_key": keys(names)})).write(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CorruptData, match=r"items\.parquet"):
        ItemTable.read(path)
    pq.write_table(pa.table({"item_id": ["a"]}), path)
    with pytest.raises(CorruptData):
        ItemTable.read(path)
    pq.write_table(pa.table({"item_id": ["a"], "item_key": ["not a number"]}), path)
    with pytest.raises(CorruptData):
        ItemTable.read(path)
    with pytest.raises(CorruptData):
        ItemTable.read(tmp_path / "none.parquet")


def test_every_error_maps_to_a_grpc_status_and_an_exit_code() -> None:
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, Double11Error)]
    assert len(classes) == 11
    for cls in classes:
        assert hasattr(grpc.StatusCode, cls.grpc_status)
        assert cls.exit_code in (1, 2, 3, 4)
        assert (cls.__doc__ or "").strip()
    assert len({c.code for c in classes}) == len(classes) - 1  # the base shares INTERNAL


@pytest.mark.parametrize("host", ["127.0.0.1", "192.0.2.1"])
def test_metrics_that_cannot_be_served_name_setting_and_port(host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(errors.Unavailable, match=rf"serving\.metrics_port {port}: got .*\({host}:{port}\)"):
            metrics.serve_http("serving.metrics_port", port, host)


def test_message_says_what_came_what_was_expected_and_what_to_do() -> None:
    error = errors.BadInput("limit", came=-1, expected="1 to 500", fix="Ask for fewer.")
    assert str(error) == "limit: got -1; expected 1 to 500. Ask for fewer."
    assert error.as_json() == {
        "error": {"code": "BAD_INPUT", "message": "limit: got -1; expected 1 to 500.", "fix": "Ask for fewer."}
    }
