"""What single importers promise beyond the contract that all share."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from recsys.core.errors import BadInput
from recsys.core.events import EventBatch
from recsys.data import Dataset, import_dataset, schema
from recsys.data.importers import base
from streaming.codec import decode_events, encode_events


def us(*when: int) -> datetime:
    return datetime(*when, tzinfo=UTC)  # type: ignore[misc,arg-type]


def test_taobao_is_sorted_outside_memory_and_ties_keep_the_order_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    seconds = 1_511_539_200 + rng.integers(0, 30_000, 500) // 60 * 60
    lines = [f"{n},{n % 40},{n % 7},pv,{s}" for n, s in enumerate(seconds)]
    (tmp_path / "UserBehavior.csv").write_text("\n".join(lines) + "\n")
    whole = import_dataset("taobao", tmp_path, tmp_path / "whole")
    monkeypatch.setattr(base, "csv_batches", partial(base.csv_batches, rows_max=64))
    parts = import_dataset("taobao", tmp_path, tmp_path / "parts")
    assert whole.hash == parts.hash
    users = Dataset.open(tmp_path / "parts").events()["user_id"].cast(pl.Int64).to_numpy()
    assert users.tolist() == np.argsort(seconds, kind="stable").tolist()


def test_taobao_outside_the_log_only(tmp_path: Path) -> None:
    (tmp_path / "UserBehavior.csv").write_text("1,2,3,pv,0\n")
    with pytest.raises(BadInput, match="no event"):
        import_dataset("taobao", tmp_path, tmp_path / "out")


def test_online_retail_amounts_ids_and_text(tmp_path: Path) -> None:
    (tmp_path / "o.csv").write_text(
        "InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID,Country\n"
        "1,A, FIRST NAME ,6,2010-12-01 08:26:00,2.555,17850.0,France\n"
        "2,A,SECOND NAME,1,2010-12-01 08:25:00,3,17850,Spain\n"
    )
    import_dataset("online-retail", tmp_path, tmp_path / "out")
    dataset = Dataset.open(tmp_path / "out")
    events = dataset.events()
    assert events["user_id"].to_list() == ["17850", "17850"]
    assert events["session_id"].to_list() == ["2", "1"]
    assert events["price"].to_list() == [300, 256]
    assert dataset.items().row(0, named=True) | {"available_from": None} == {
        "item_id": "A", "available_from": None, "title": "SECOND NAME", "category": None, "brand": None, "price": 300,
        "attributes": None,
    }  # fmt: skip
    users = dataset.users()
    assert users is not None
    assert users.rows() == [("17850", '{"country":"Spain"}')]


def test_retailrocket_takes_availability_from_properties(tmp_path: Path) -> None:
    (tmp_path / "events.csv").write_text(
        "timestamp,visitorid,event,itemid,transactionid\n1430622004384,1,view,10,\n1433221332117,1,transaction,20,7\n"
    )
    (tmp_path / "item_properties_part1.csv").write_text(
        "timestamp,itemid,property,value\n1431226800000,10,available,1\n1431831600000,10,available,1\n"
        "1432436400000,10,available,0\n1431226800000,20,categoryid,5\n1432436400000,20,categoryid,6\n"
    )
    import_dataset("retailrocket", tmp_path, tmp_path / "out")
    dataset = Dataset.open(tmp_path / "out")
    items = {row["item_id"]: row for row in dataset.items().to_dicts()}
    assert items["10"]["available_from"] == us(2015, 5, 3, 3, 0, 4, 384_000)  # its first event, a week before
    assert items["20"]["available_from"] == us(2015, 5, 10, 3)
    assert items["20"]["category"] == "5"
    catalog = dataset.catalog()
    assert catalog is not None
    assert catalog["kind"].to_list() == ["list", "delist"]  # the repeated snapshot says nothing new
    assert dataset.events()["session_id"].to_list() == [None, "7"]


def test_amazon_metadata(tmp_path: Path) -> None:
    (tmp_path / "r_5.json").write_text('{"reviewerID": "u", "asin": "b", "unixReviewTime": 1405209600}\n')
    (tmp_path / "meta_r.json").write_text(
        '{"asin": "b", "title": " Pad ", "brand": "", "category": ["Games", "PC"], "price": "$1,012.99 - $2,000"}\n'
    )
    import_dataset("amazon-reviews", tmp_path, tmp_path / "out")
    item = Dataset.open(tmp_path / "out").items().row(0, named=True)
    assert (item["title"], item["brand"], item["category"], item["price"]) == ("Pad", None, "Games > PC", 101_299)


@pytest.mark.parametrize(
    ("text", "price"),
    [
        ("$12.99", 1_299),
        ("1012.5", 101_250),
        (" from 14.99 ", 1_499),
        ("US$1,234,567", 123_456_700),
        ("$3.00 - $1,002.00", 300),
        ("12.99 EUR", 1_299),
        ("$.99", 99),
        ("$12.99 ($1.08 / Ounce)", 1_299),
        ("$10.00 to $20.00", 1_000),
        (".a-box-inner{background-color:#fffbf3;padding:14px 18px}", None),
        ("$12.99 (3 used)", None),
        ("$.a-box{width: 1.5}", None),
        ("Currently unavailable since 2014", None),
        ("12,34", None),
        ("-5.00", None),
        ("9" * 30, None),
        ("", None),
    ],
)
def test_amazon_prices(tmp_path: Path, text: str, price: int | None) -> None:
    (tmp_path / "r.json").write_text('{"reviewerID": "u", "asin": "b", "unixReviewTime": 1405209600}\n')
    (tmp_path / "meta_r.json").write_text(json.dumps({"asin": "b", "price": text}) + "\n")
    import_dataset("amazon-reviews", tmp_path, tmp_path / "out")
    assert Dataset.open(tmp_path / "out").items()["price"].to_list() == [price]


def test_movielens_ratings_below_the_option_are_views(tmp_path: Path) -> None:
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,1,4.0,964982703\n1,3,3.5,964981247\n")
    import_dataset("movielens", tmp_path / "ratings.csv", tmp_path / "all")
    import_dataset("movielens", tmp_path, tmp_path / "four", options={"rating_min": "4"})
    assert Dataset.open(tmp_path / "all").events()["event_type"].to_list() == ["purchase", "purchase"]
    assert Dataset.open(tmp_path / "four").events()["event_type"].to_list() == ["view", "purchase"]


def test_open_bandit_clicks_follow_their_impression(tmp_path: Path) -> None:
    (tmp_path / "all.csv").write_text(
        ",timestamp,item_id,position,click,propensity_score,user_feature_0,user_feature_1,user_feature_2,user_feature_3\n"
        "0,2019-11-24 00:00:34.762830+00:00,14,3,1,0.0125,81ce123cbb5b,03a5,c2e4,f975\n"
    )
    import_dataset("open-bandit", tmp_path, tmp_path / "out")
    dataset = Dataset.open(tmp_path / "out")
    shown, clicked = dataset.events().to_dicts()
    assert (shown["event_type"], clicked["event_type"]) == ("impression", "view")
    assert shown["request_id"] == clicked["request_id"]
    assert (clicked["position"], round(clicked["propensity"], 4)) == (3, 0.0125)
    assert shown["user_id"] == "81ce123c-03a5-c2e4-f975"
    assert dataset.static_catalogue


def test_canonical_prices_times_and_missing_items(tmp_path: Path) -> None:
    pl.DataFrame(
        {
            "event_id": ["a", "b"],
            "user_id": ["u", "u"],
            "item_id": ["x", "y"],
            "event_type": pl.Series(["view", "purchase"], dtype=pl.Categorical),
            "event_time": pl.Series([us(2024, 1, 1), us(2024, 1, 2)]).cast(pl.Datetime("ns", "Asia/Shanghai")),
            "price": [19.999, None],
        }
    ).write_parquet(tmp_path / "events.parquet")
    pl.DataFrame({"item_id": ["x", "x"], "price": [5, 6]}).write_parquet(tmp_path / "items.parquet")
    report = import_dataset("canonical", tmp_path, tmp_path / "out")
    assert report.rejected == {"repeated_item": 1}
    dataset = Dataset.open(tmp_path / "out")
    assert dataset.info["items_added_from_events"] == 1
    assert dataset.info["availability_from_events"] == 2
    assert dataset.events()["price"].to_list() == [2_000, None]  # a float column is major units
    assert dataset.items()["price"].to_list() == [5, None]  # an integer column is minor units
    assert dataset.items()["available_from"].to_list() == [us(2024, 1, 1), us(2024, 1, 2)]


OB = "timestamp,item_id,position,click,propensity_score,user_feature_0,user_feature_1,user_feature_2,user_feature_3\n"


@pytest.mark.parametrize(
    ("format_", "files", "bad_rows"),
    [
        (
            "multi-behaviour",
            {"a.csv": "user_id,item_id,behavior,timestamp\n1,2,view,1511539200\n1,2,view,0\n1,2,buy,4102444800\n"},
            2,
        ),
        (
            "retailrocket",
            {
                "events.csv": "timestamp,visitorid,event,itemid,transactionid\n"
                "1430622004384,1,view,10,\n-1,1,view,10,\n",
                "item_properties_part1.csv": "timestamp,itemid,property,value\n0,10,available,1\n",
            },
            2,
        ),
        ("movielens", {"u.data": "1\t2\t3\t881250949\n1\t2\t3\t0\n"}, 1),
        (
            "amazon-reviews",
            {
                "r.json": '{"reviewerID": "u", "asin": "b", "unixReviewTime": 1405209600}\n'
                '{"reviewerID": "v", "asin": "b", "unixReviewTime": 0}\n'
            },
            1,
        ),
        (
            "online-retail",
            {
                "o.csv": "InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID,Country\n"
                "1,A,T,6,2010-12-01 08:26:00,2,9,UK\n2,A,T,6,1900-01-01 00:00:00,2,9,UK\n"
            },
            1,
        ),
        (
            "open-bandit",
            {
                "all.csv": OB + "2019-11-24 00:00:34+00:00,1,3,0,0.1,a,b,c,d\n"
                "2119-11-24 00:00:34+00:00,1,3,0,0.1,a,b,c,d\n"
            },
            1,
        ),
    ],
)
def test_a_time_that_is_no_date_sets_its_row_aside(
    tmp_path: Path, format_: str, files: dict[str, str], bad_rows: int
) -> None:
    (tmp_path / "src").mkdir()
    for name, text in files.items():
        (tmp_path / "src" / name).write_text(text)
    report = import_dataset(format_, tmp_path / "src", tmp_path / "out")
    assert (report.num_events, report.rejected) == (1, {"bad_time": bad_rows})
    dataset = Dataset.open(tmp_path / "out")
    assert dataset.items()["available_from"].drop_nulls().is_in(dataset.events()["event_time"].implode()).all()


def test_canonical_items_dated_after_their_first_event_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A listing of later tells of later: training must not see its text before."""
    first, scraped = us(2024, 1, 1), us(2024, 6, 1)
    events = {"event_id": ["a", "b"], "user_id": "u", "item_id": ["x", "y"], "event_type": "view", "event_time": first}
    pl.DataFrame(events).write_parquet(tmp_path / "events.parquet")
    items = {"item_id": ["x", "y", "z"], "available_from": [scraped, us(2023, 1, 1), scraped]}
    pl.DataFrame(items).write_parquet(tmp_path / "items.parquet")
    import_dataset("canonical", tmp_path, tmp_path / "out")
    dataset = Dataset.open(tmp_path / "out")
    assert dataset.items()["available_from"].to_list() == [scraped, us(2023, 1, 1), scraped]
    assert dataset.info["availability_after_first_event"] == 1
    assert "available_after_first_event" in "".join(capsys.readouterr())
    assert "availability_from_events" not in dataset.info


def test_canonical_times_that_are_no_dates(tmp_path: Path) -> None:
    zero, good, never = us(1970, 1, 1), us(2024, 1, 1), us(9999, 12, 31)
    events = pl.DataFrame(
        {"event_id": ["a", "b", "c"], "user_id": "u", "item_id": "x", "event_type": "view"}
    ).with_columns(event_time=pl.Series([zero, good, good]), known_at=pl.Series([None, None, never]))
    events.write_parquet(tmp_path / "events.parquet")
    items = pl.DataFrame({"item_id": ["x", "y", "z"], "title": "T", "available_from": [zero, never, good]})
    items.write_parquet(tmp_path / "items.parquet")
    catalog = {"event_id": ["d", "e"], "item_id": "x", "event_time": [zero, good], "kind": "delist"}
    pl.DataFrame(catalog).write_parquet(tmp_path / "catalog.parquet")
    report = import_dataset("canonical", tmp_path, tmp_path / "out")
    assert (report.num_events, report.rejected) == (1, {"bad_time": 4})  # y has no event to date it
    dataset = Dataset.open(tmp_path / "out")
    assert dataset.items().select("item_id", "title", "available_from").rows() == [("x", "T", good), ("z", "T", good)]
    assert dataset.info["availability_from_events"] == 1
    changes = dataset.catalog()
    assert changes is not None
    assert changes["event_id"].to_list() == ["e"]
    (tmp_path / "dataset.json").write_text('{"static_catalogue": true}')
    import_dataset("canonical", tmp_path, tmp_path / "static")
    assert Dataset.open(tmp_path / "static").items()["available_from"].to_list() == [None, None, good]


@pytest.mark.parametrize("kind", ["price", "stock"])
def test_canonical_changes_that_do_not_say_to_what(tmp_path: Path, kind: str) -> None:
    """An unknown stock is not sold out, and an unknown price is not zero."""
    time = us(2024, 1, 1)
    events = {"event_id": ["a"], "user_id": "u", "item_id": "x", "event_type": "view", "event_time": time}
    pl.DataFrame(events).write_parquet(tmp_path / "events.parquet")
    pl.DataFrame({"item_id": ["x"]}).write_parquet(tmp_path / "items.parquet")
    catalog = pl.DataFrame(
        {"event_id": ["c", "d", "e"], "item_id": "x", "event_time": time, "kind": [kind, kind, "list"]}
    )
    catalog.with_columns(pl.Series(kind, [None, 0, None])).write_parquet(tmp_path / "catalog.parquet")
    report = import_dataset("canonical", tmp_path, tmp_path / "out")
    assert report.rejected == {f"no_{kind}": 1}
    changes = Dataset.open(tmp_path / "out").catalog()
    assert changes is not None
    assert changes["event_id"].to_list() == ["d", "e"]
    catalog.write_parquet(tmp_path / "catalog.parquet")  # without the column
    assert import_dataset("canonical", tmp_path, tmp_path / "none").rejected == {f"no_{kind}": 2}


@pytest.mark.parametrize("column", [True, False])
def test_canonical_items_are_dated_by_listings_too(tmp_path: Path, column: bool) -> None:
    """`lonely` is dated by nothing: it costs itself, not the import."""
    listed, acted, again = us(2024, 1, 1), us(2024, 1, 2), us(2024, 1, 3)
    events = {"event_id": ["a", "b"], "user_id": "u", "item_id": ["x", "y"], "event_type": "view", "event_time": acted}
    pl.DataFrame(events).write_parquet(tmp_path / "events.parquet")
    items = pl.DataFrame({"item_id": ["lonely", "x", "y", "z"], "title": "T"})
    if column:
        items = items.with_columns(available_from=pl.lit(None, schema.TIME))
    items.write_parquet(tmp_path / "items.parquet")
    catalog = {
        "event_id": ["c", "d", "e", "f", "g"],
        "item_id": ["y", "x", "z", "new", "lonely"],
        "event_time": [again, listed, listed, acted, listed],  # in no order
        "kind": ["list", "list", "list", "list", "delist"],
    }
    pl.DataFrame(catalog).write_parquet(tmp_path / "catalog.parquet")
    report = import_dataset("canonical", tmp_path, tmp_path / "out")
    assert report.rejected == {"no_time": 1}
    dataset = Dataset.open(tmp_path / "out")
    dates = dict(dataset.items().select("item_id", "available_from").iter_rows())
    assert dates == {"x": listed, "y": acted, "z": listed, "new": acted}
    counts = {"items_added_from_catalog": 1, "availability_from_catalog": 3, "availability_from_events": 1}
    assert counts.items() <= dataset.info.items()
    assert import_dataset("canonical", tmp_path / "out", tmp_path / "twice").hash == report.hash


def test_canonical_import_passes_nothing_that_the_log_refuses(tmp_path: Path) -> None:
    time, long, high = us(2024, 1, 1), "é" * 2_049, (1 << 40) + 1
    events = {"event_id": [*"abcd"], "user_id": "u", "item_id": "x", "event_type": "view", "event_time": time}
    pl.DataFrame(events).with_columns(
        price=pl.Series([high, high - 1, None, None]),
        session_id=pl.Series([None, "é" * 2_048, long, None]),
        request_id=pl.Series([None, None, None, long]),
    ).write_parquet(tmp_path / "events.parquet")
    pl.DataFrame(
        {
            "item_id": ["x", "y"],
            "available_from": time,
            "title": [long, "é" * 2_048],
            "brand": [long, None],
            "attributes": ["a" * (16 << 10), "a" * ((16 << 10) + 1)],
            "price": [high, -1],
        }
    ).write_parquet(tmp_path / "items.parquet")
    changes = {"event_id": [*"cdef"], "item_id": "x", "event_time": time, "kind": ["price", "stock"] * 2}
    catalog = pl.DataFrame(changes).with_columns(
        price=pl.Series([high, None, high - 1, None]), stock=pl.Series([None, high, None, high - 1])
    )
    catalog.write_parquet(tmp_path / "catalog.parquet")
    report = import_dataset("canonical", tmp_path, tmp_path / "out")
    one = ("session_id_too_long", "request_id_too_long", "stock_too_high")
    assert report.rejected == {**dict.fromkeys(one, 1), "price_too_high": 2}
    dataset = Dataset.open(tmp_path / "out")
    assert dataset.info["item_values_left_out"] == {"title": 1, "brand": 1, "attributes": 1, "price": 2}
    batch = EventBatch.concat(list(dataset.event_batches()))
    assert sorted(batch.strings("event_id"))[:3] == ["b", "e", "f"]
    assert batch.table["title"].drop_null().to_pylist() == ["é" * 2_048]
    assert not decode_events([value for _, _, value in encode_events(batch)]).rejected


@pytest.mark.parametrize("rows_max", [1, 2, 100])
def test_csv_batches_number_the_lines_of_the_file(tmp_path: Path, rows_max: int) -> None:
    (tmp_path / "a.csv").write_text("x,y\n" + "".join(f"{n},z\n" for n in range(7)))
    batches = list(base.csv_batches(tmp_path / "a.csv", tmp_path, required=("x",), rows_max=rows_max))
    whole = pl.concat(batches)
    assert whole["line"].to_list() == list(range(2, 9))
    assert whole["x"].to_list() == [str(n) for n in range(7)]
    assert whole.columns == ["line", "x"]
