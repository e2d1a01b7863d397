"""Bad input says file, line, column, what came and what was expected; nothing is left at --out."""

from __future__ import annotations

import gzip
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest

from recsys.core.errors import BadInput, Conflict, Double11Error, NotFound
from recsys.data import import_dataset
from recsys.data.importers.complete_journey import package_source as complete_journey

MB = "user_id,item_id,behavior,timestamp\n1,10,view,1511539200\n1,11,buy,1511539300\n"
OR = "InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID,Country\n"
OB = ",timestamp,item_id,position,click,propensity_score,user_feature_0,user_feature_1,user_feature_2,user_feature_3\n"


@pytest.mark.parametrize(
    ("format_", "name", "text", "said"),
    [
        ("multi-behaviour", "a.csv", "", r"a\.csv: got an empty file"),
        ("multi-behaviour", "a.csv", "user_id,item_id,behavior,timestamp\n", r"a\.csv: got a header and no rows"),
        ("multi-behaviour", "a.csv", "user_id,item,behavior,timestamp\n1,2,view,3\n", r"line 1: .*no item_id"),
        ("multi-behaviour", "a.csv", MB + "1,12,look,1511539300\n", r"line 4, column behavior: got 'look'"),
        ("multi-behaviour", "a.csv", MB + "1,12,view,soon\n", r"line 4, column timestamp: got 'soon'.*seconds"),
        ("multi-behaviour", "a.csv", MB + "1,12,view,99999999999999\n", r"line 4, column timestamp"),
        ("multi-behaviour", "a.csv", MB + "1,12,vi", r"line 4, column timestamp: got nothing"),
        ("multi-behaviour", "a.csv", MB + "1,12,view,1511539300,9,9\n", r"a\.csv, line 4: got too many values"),
        ("multi-behaviour", "a.csv", MB + "1,12,buy,x\n2,12,buy,y\n", r"line 4.*2 such cells"),
        ("taobao", "UserBehavior.csv", "1,2,3,pv\n", r"line 1: got 4 columns; expected 5"),
        ("taobao", "UserBehavior.csv", "1,2,3,pv,1511544070\n1,2,3,see,1511544070\n", r"line 2, column behavior"),
        (
            "retailrocket",
            "events.csv",
            "timestamp,visitorid,event,itemid,transactionid\nx,1,view,2,\n",
            r"line 2.*milli",
        ),
        (
            "online-retail",
            "o.csv",
            OR + "1,A,T,six,2010-12-01 08:26:00,2,9,UK\n",
            r"line 2, column Quantity: got 'six'",
        ),
        ("online-retail", "o.csv", OR + "1,A,T,6,yesterday,2,9,UK\n", r"line 2, column InvoiceDate: got 'yesterday'"),
        ("online-retail", "o.csv", OR + "1,A,T,6,2010-12-01 08:26:00,dear,9,UK\n", r"column UnitPrice: got 'dear'"),
        ("movielens", "u.data", "196\t242\t3\n", r"u\.data, line 1: .*expected 4 values"),
        ("movielens", "u.data", "196\t242\tgood\t881250949\n", r"line 1, column rating: got 'good'"),
        ("movielens", "u.data", "", r"u\.data: got an empty file"),
        (
            "amazon-reviews",
            "r.json",
            '{"reviewerID": "a", "asin": "b", "unixReviewTime": 1}\n{"rev',
            r"r\.json, line 2",
        ),
        ("amazon-reviews", "r.json", "[1]\n", r"r\.json, line 1: .*JSON object"),
        ("amazon-reviews", "r.json", '{"user_id": "a", "timestamp": 5}\n', r"line 1, column parent_asin: got nothing"),
        (
            "amazon-reviews",
            "r.json",
            '{"reviewerID": "a", "asin": "b", "unixReviewTime": "x"}',
            r"unixReviewTime: got 'x'",
        ),
        ("open-bandit", "all.csv", OB + "0,2019-11-24 00:00:34+00:00,1,3,2,0.1,a,b,c,d\n", r"column click: got '2'"),
        ("open-bandit", "all.csv", OB + "0,2019-11-24,1,3,1,0.1,a,b,c,d\n", r"column timestamp: got '2019-11-24'"),
    ],
)
def test_text_files(tmp_path: Path, format_: str, name: str, text: str, said: str) -> None:
    source = tmp_path / "src"
    source.mkdir()
    (source / name).write_text(text)
    with pytest.raises(BadInput, match=said) as caught:
        import_dataset(format_, source, tmp_path / "out")
    assert name in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


@pytest.mark.parametrize(
    ("titles", "said"),
    [
        ({5: '"Lone', 4000: '"Lone'}, 'line 7: got a stray "'),  # without more ado rows 5 to 4000 are one
        ({5: '"Lone'}, 'line 7: got a stray "'),  # the value goes on beyond what the csv module takes
        ({4999: '"Lone'}, 'line 5001: got a stray "'),
        ({70: '5" pipe'}, 'line 72: got a stray "'),
        ({70: '"Pipe" 5'}, 'line 72: got a stray "'),
        ({3: '"two\nlines"', 70: '"Pipe" 5'}, 'line 73: got a stray "'),
        ({4000: "Salt, Pepper"}, "line 4002: got too many values"),
    ],
)
def test_a_column_that_nobody_asked_for_is_read_too(tmp_path: Path, titles: dict[int, str], said: str) -> None:
    rows = [f"{n % 50},{n % 90},view,{1511539200 + n},{titles.get(n, f'title number {n}')}\n" for n in range(5_000)]
    (tmp_path / "a.csv").write_text("user_id,item_id,behavior,timestamp,title\n" + "".join(rows))
    with pytest.raises(BadInput, match=said):
        import_dataset("multi-behaviour", tmp_path / "a.csv", tmp_path / "out")


@pytest.mark.parametrize("keep", [0.5, 0.95])
def test_a_cut_off_gzip_is_noticed(tmp_path: Path, keep: float) -> None:
    packed = gzip.compress((MB + "".join(f"{n},{n * 7},view,{1511539200 + n}\n" for n in range(2000))).encode())
    (tmp_path / "a.csv.gz").write_bytes(packed[: int(len(packed) * keep)])
    with pytest.raises(BadInput, match=r"a\.csv\.gz.*whole gzip"):
        import_dataset("multi-behaviour", tmp_path / "a.csv.gz", tmp_path / "out")


def test_gzip_of_nothing_and_no_gzip_at_all(tmp_path: Path) -> None:
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(BadInput, match="nothing inside"):
        import_dataset("multi-behaviour", tmp_path / "a.csv.gz", tmp_path / "out")
    (tmp_path / "b.csv.gz").write_bytes(MB.encode())
    with pytest.raises(BadInput, match="whole gzip"):
        import_dataset("multi-behaviour", tmp_path / "b.csv.gz", tmp_path / "out")


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(MB.encode() + b"\xff\xfe,1,view,1511539300\n")
    with pytest.raises(BadInput, match="UTF-8"):
        import_dataset("multi-behaviour", tmp_path / "a.csv", tmp_path / "out")


@pytest.mark.parametrize(
    ("format_", "name", "options", "error", "said"),
    [
        ("parquet", "", {}, BadInput, "--format: got parquet"),
        ("multi-behaviour", "", {}, BadInput, "one file"),
        ("multi-behaviour", "c.csv", {}, NotFound, "no such file"),
        ("taobao", "", {}, NotFound, "none of its files"),
        ("taobao", "a.csv", {"x": "1"}, BadInput, "no option"),
        ("complete-journey", "cj", {"households": "0"}, BadInput, "whole number"),
        ("movielens", "ml", {"rating_min": "good"}, BadInput, "rating_min"),
        ("amazon-reviews", "r.jsonl", {"metadata": "nowhere"}, NotFound, "metadata"),
    ],
)
def test_what_is_asked_for(
    tmp_path: Path, format_: str, name: str, options: dict[str, str], error: type[Double11Error], said: str
) -> None:
    for file in ("a.csv", "b.csv"):
        (tmp_path / file).write_text(MB)
    (tmp_path / "ml").mkdir()
    (tmp_path / "ml" / "u.data").write_text("196\t242\t3\t881250949\n")
    (tmp_path / "cj").symlink_to(complete_journey())
    (tmp_path / "r.jsonl").write_text('{"user_id": "a", "parent_asin": "b", "timestamp": 5}\n')
    with pytest.raises(error, match=said):
        import_dataset(format_, tmp_path / name, tmp_path / "o", options=options)
    assert not (tmp_path / "o").exists()


def test_no_source_and_no_place(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(MB)
    with pytest.raises(BadInput, match="SRC"):
        import_dataset("multi-behaviour", None, tmp_path / "o")
    with pytest.raises(Conflict, match="it exists"):
        import_dataset("multi-behaviour", tmp_path / "a.csv", tmp_path)


def test_all_rows_set_aside(tmp_path: Path) -> None:
    (tmp_path / "o.csv").write_text(OR + "C1,A,T,-6,2010-12-01 08:26:00,2,9,UK\n2,A,T,6,2010-12-01 08:26:00,2,,UK\n")
    with pytest.raises(BadInput, match=r"no event; rows set aside: cancellation \(1\), no_customer \(1\); expected"):
        import_dataset("online-retail", tmp_path, tmp_path / "out")
    GOOD.with_columns(event_time=pl.lit(datetime(1970, 1, 1, tzinfo=UTC))).write_parquet(tmp_path / "events.parquet")
    pl.DataFrame({"item_id": ["i"]}).write_parquet(tmp_path / "items.parquet")  # undated, for want of an event
    with pytest.raises(BadInput, match=r"rows set aside: bad_time \(3\)"):
        import_dataset("canonical", tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


TIMES = [datetime(2024, 1, 1, h, tzinfo=UTC) for h in (1, 2, 3)]
GOOD = pl.DataFrame(
    {
        "event_id": ["a", "b", "c"],
        "user_id": ["u"] * 3,
        "item_id": ["i"] * 3,
        "event_type": ["view"] * 3,
        "event_time": TIMES,
    }
)


@pytest.mark.parametrize(
    ("events", "said"),
    [
        (GOOD.drop("event_type"), "events.parquet: got no event_type"),
        (GOOD.with_columns(event_type=pl.Series(["view", "look", "view"])), "row 2, column event_type: got 'look'"),
        (GOOD.reverse(), "row 2, column event_time: got .* after .*; expected rows sorted"),
        (GOOD.with_columns(event_time=pl.Series([1, 2, 3])), "column event_time: got Int64"),
        (GOOD.with_columns(user_id=pl.Series([1, 2, 3])), "column user_id: got Int64; expected String"),
        (GOOD.with_columns(item_id=pl.Series(["i", None, "i"])), "row 2, column item_id: got null"),
        (GOOD.with_columns(position=pl.lit("first")), "column position: got String"),
        (GOOD.with_columns(quantity=pl.lit(1 << 40)), "column quantity"),
        (GOOD.with_columns(price=pl.lit(float("nan"))), "column price"),
    ],
)
def test_canonical_directories(tmp_path: Path, events: pl.DataFrame, said: str) -> None:
    source = tmp_path / "src"
    source.mkdir()
    events.write_parquet(source / "events.parquet")
    pl.DataFrame({"item_id": ["i"]}).write_parquet(source / "items.parquet")
    with pytest.raises(BadInput, match=said):
        import_dataset("canonical", source, tmp_path / "out")


def test_half_written_parquet(tmp_path: Path) -> None:
    GOOD.write_parquet(tmp_path / "events.parquet")
    whole = (tmp_path / "events.parquet").read_bytes()
    (tmp_path / "events.parquet").write_bytes(whole[:-20])
    with pytest.raises(BadInput, match=r"events\.parquet.*written to the end"):
        import_dataset("canonical", tmp_path, tmp_path / "out")
    (tmp_path / "transactions.parquet").write_bytes(whole[:-20])
    with pytest.raises(BadInput, match=r"transactions\.parquet.*written to the end"):
        import_dataset("complete-journey", tmp_path, tmp_path / "out")
    (tmp_path / "transactions.parquet").write_bytes(whole)
    with pytest.raises(BadInput, match=r"transactions\.parquet: got no household_id"):
        import_dataset("complete-journey", tmp_path, tmp_path / "out")


def test_canonical_without_items_or_with_broken_json(tmp_path: Path) -> None:
    GOOD.write_parquet(tmp_path / "events.parquet")
    with pytest.raises(NotFound, match="no items"):
        import_dataset("canonical", tmp_path, tmp_path / "out")
    (tmp_path / "dataset.json").write_text("[]")
    with pytest.raises(BadInput, match="JSON object"):
        import_dataset("canonical", tmp_path, tmp_path / "out")
    with pytest.raises(NotFound, match="dataset directory"):
        import_dataset("canonical", tmp_path / "events.parquet", tmp_path / "out")
