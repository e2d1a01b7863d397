"""Every importer, on a small sample in its original format, keeps the dataset contract."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest

from recsys.core.events import EventBatch
from recsys.data import FORMATS, Dataset, import_dataset, schema


@dataclass(frozen=True)
class Sample:
    """write puts the files of a format into a folder and returns SRC; the counts are what must come out."""

    write: Callable[[Path], Path]
    num_events: int
    num_items: int
    rejected: dict[str, int]
    titles: bool = False
    options: tuple[tuple[str, str], ...] = ()


def _text(folder: Path, name: str, text: str, encoding: str = "utf-8") -> Path:
    (folder / name).write_text(text, encoding)
    return folder


def _gz(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_bytes(gzip.compress(text.encode()))
    return folder


def online_retail(folder: Path) -> Path:
    return _gz(
        folder,
        "online.csv.gz",
        "InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID,Country\n"
        "536365,85123A,WHITE HEART,6,2010-12-01 08:26:00,2.55,17850.0,United Kingdom\n"
        "536365,71053,WHITE LANTERN,6,12/1/2010 8:26,3.39,17850.0,United Kingdom\n"
        "536366,71053,WHITE LANTERN,1,2010-12-01 08:20:00,3.39,,United Kingdom\n"
        "C536367,71053,WHITE LANTERN,-1,2010-12-02 09:00:00,3.39,17850.0,United Kingdom\n"
        '536368,22386,"BAG, PINK",0,2010-12-02 10:00:00,1.95,13047.0,France\n'
        '536369,22386,"BAG, PINK",2,2010-12-02 11:00:00,0.00,13047.0,France\n'
        '536370,22386,"BAG, PINK",2,2010-12-01 07:00:00,0.001,13047.0,France\n',
    )


def multi_behaviour(folder: Path) -> Path:
    return _text(
        folder,
        "interactions.csv",
        "user_id,item_id,behavior,timestamp\n1,10,fav,1511539200\n2,11,buy,1511539300\n2,10,cart,1511539200\n"
        f"3,{'x' * 300},view,1511539400\n",
    )


def retailrocket(folder: Path) -> Path:
    _text(
        folder,
        "events.csv",
        "timestamp,visitorid,event,itemid,transactionid\n1433221332117,257597,view,355908,\n"
        "1433221999827,257597,addtocart,355908,\n1433222276276,257597,transaction,355908,4000\n"
        "1433193500981,121688,view,15335,\n",
    )
    return _text(
        folder,
        "item_properties_part1.csv",
        "timestamp,itemid,property,value\n1431226800000,355908,categoryid,1173\n1431226800000,355908,available,0\n"
        "1431831600000,355908,available,1\n1432436400000,355908,available,1\n1431226800000,777,790,n552.000 639502\n"
        "1431226800000,888,categoryid,9\n",
    )


def taobao(folder: Path) -> Path:
    return _text(
        folder,
        "UserBehavior.csv",
        "1,2268318,2520377,pv,1511544070\n1,2333346,2520771,buy,1511561733\n2,2333346,2520771,fav,1511561733\n"
        "1,5,5,pv,-1234\n1,5,5,pv,1512317000\n",
    )


def movielens_100k(folder: Path) -> Path:
    _text(folder, "u.data", "196\t242\t3\t881250949\n186\t302\t5\t891717742\n22\t242\t1\t878887116\n")
    flags = "|".join(["0"] * 5 + ["1"] + ["0"] * 13)
    return _text(folder, "u.item", f"242|Amélie (1997)|24-Jan-1997||http://x|{flags}\n302|Up|||u|{flags}\n", "latin-1")


def movielens_1m(folder: Path) -> Path:
    _text(folder, "ratings.dat", "1::1193::5::978300760\n1::661::3::978302109\n")
    return _text(
        folder, "movies.dat", "661::James: a Peach (1996)::Animation|Children's\n1193::Nid\x85::Drama\n", "latin-1"
    )


def movielens_latest(folder: Path) -> Path:
    _text(folder, "ratings.csv", "userId,movieId,rating,timestamp\n1,1,4.0,964982703\n1,3,0.5,964981247\n")
    return _text(folder, "movies.csv", 'movieId,title,genres\n1,Toy Story (1995),Adventure\n3,"Grumpier, Men",Comedy\n')


def amazon_2018(folder: Path) -> Path:
    review = {"reviewerID": "A1", "asin": "B01", "overall": 5.0, "unixReviewTime": 1405209600, "reviewText": "ok"}
    rows = [review, review, {**review, "asin": "B02", "unixReviewTime": 1405209500}]
    meta = [
        {"asin": "B01", "title": "Game", "brand": "Sega", "category": ["Video Games", "PC"], "price": "$1,012.99"},
        {"asin": "B02", "title": "Pad", "brand": "", "category": [], "price": ""},
    ]
    _gz(folder, "Games_5.json.gz", "\n".join(map(json.dumps, rows)))
    return _gz(folder, "meta_Games.json.gz", "\n".join(map(json.dumps, meta)))


def amazon_2023(folder: Path) -> Path:
    review = {
        "user_id": "U",
        "asin": "B0",
        "parent_asin": "P0",
        "rating": 4.0,
        "timestamp": 1658185117948,
        "images": [],
    }
    meta = {
        "parent_asin": "P0",
        "title": "Pad",
        "store": "Sony",
        "categories": ["A", "B"],
        "price": 12.5,
        "details": {},
    }
    _text(folder, "Games.jsonl", json.dumps(review) + "\n")
    return _text(folder, "meta_Games.jsonl", json.dumps(meta) + "\n")


def open_bandit(folder: Path) -> Path:
    folder = folder / "random" / "men"
    folder.mkdir(parents=True)
    features = ",".join(f"user_feature_{i}" for i in range(4))
    _text(
        folder,
        "men.csv",
        f",timestamp,item_id,position,click,propensity_score,{features},user-item_affinity_0\n"
        "0,2019-11-24 00:00:34.762830+00:00,1,3,0,0.0125,81ce123c,03a5648a,c2e4f76c,f97571b9,0.0\n"
        "1,2019-11-24 00:00:53+00:00,0,1,1,0.0125,81ce123c,03a5648a,c2e4f76c,f97571b9,0.0\n"
        "2,2019-11-24 00:00:54+00:00,0,1,1,0,81ce123c,03a5648a,c2e4f76c,f97571b9,0.0\n",
    )
    names = ",".join(f"item_feature_{i}" for i in range(4))
    return _text(folder, "item_context.csv", f",item_id,{names}\n0,0,-0.49,a,b,c\n1,1,-0.54,d,e,f\n2,2,0.1,g,h,i\n")


def complete_journey(folder: Path) -> Path:
    pl.DataFrame(
        {
            "household_id": [900, 900, 1228, 7, 7],
            "basket_id": [1, 1, 2, 3, 3],
            "product_id": [10, 11, 10, 12, 12],
            "quantity": [1, 2, 0, 1, 1],
            "sales_value": [0.5, 3.0, 0.5, 1.0, 1.0],
            "transaction_timestamp": [datetime(2017, 1, d, 11, 53, 26) for d in (1, 1, 2, 3)] + [datetime(1970, 1, 1)],
        }
    ).write_parquet(folder / "transactions.parquet")
    pl.DataFrame(
        {
            "product_id": [10, 11, 12],
            "manufacturer_id": [2, 69, 2],
            "department": ["GROCERY"] * 3,
            "brand": ["National", "Private", "National"],
            "product_category": ["FRZN ICE", "BREAD", None],
            "product_type": ["ICE - CRUSHED", None, None],
            "package_size": ["22 LB", None, None],
        }
    ).write_parquet(folder / "products.parquet")
    return folder


def canonical(folder: Path) -> Path:
    times = [datetime(2024, 1, 1, h, tzinfo=UTC) for h in (1, 2, 2, 3, 4)]
    pl.DataFrame(
        {
            "event_id": ["a", "b", "c", "b", "d"],
            "user_id": ["u", "u", "v", "u", "v"],
            "item_id": ["1", "2", "1", "2", "9"],
            "event_type": ["view", "cart", "view", "cart", "purchase"],
            "event_time": times,
            "price": [2.55, 1.0, None, 1.0, -1.0],
            "mood": ["good"] * 5,
        }
    ).write_parquet(folder / "events.parquet")
    pl.DataFrame({"item_id": ["1"], "title": ["One"]}).write_parquet(folder / "items.parquet")
    (folder / "dataset.json").write_text('{"source": "mine", "licence": "CC0"}')
    return folder


SAMPLES: dict[str, Sample] = {
    "online-retail": Sample(
        online_retail,
        3,
        3,
        {"no_customer": 1, "cancellation": 1, "non_positive_quantity": 1, "non_positive_price": 1},
        True,
    ),
    "multi-behaviour": Sample(multi_behaviour, 3, 2, {"bad_id": 1}),
    "retailrocket": Sample(retailrocket, 4, 3, {}),
    "taobao": Sample(taobao, 3, 2, {"outside_the_log": 2}),
    "movielens": Sample(movielens_100k, 3, 2, {}, True),
    "movielens 1m": Sample(movielens_1m, 2, 2, {}, True),
    "movielens latest": Sample(movielens_latest, 2, 2, {}, True, (("rating_min", "4"),)),
    "amazon-reviews": Sample(amazon_2018, 2, 2, {"repeated_review": 1}, True),
    "amazon-reviews 2023": Sample(amazon_2023, 1, 1, {}, True),
    "open-bandit": Sample(open_bandit, 3, 3, {"bad_propensity": 1}),
    "complete-journey": Sample(complete_journey, 3, 3, {"non_positive_quantity": 1, "bad_time": 1}, True),
    "canonical": Sample(canonical, 3, 2, {"duplicate_event_id": 1, "negative_price": 1}),
}


@pytest.fixture(params=SAMPLES)
def imported(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Sample, Dataset, Path, str]:
    sample = SAMPLES[request.param]
    (tmp_path / "src").mkdir()
    source, format_ = sample.write(tmp_path / "src"), request.param.split()[0]
    import_dataset(format_, source, tmp_path / "out", options=dict(sample.options))
    return sample, Dataset.open(tmp_path / "out"), source, format_


def test_every_format_has_a_sample() -> None:
    assert {name.split()[0] for name in SAMPLES} == set(FORMATS)


def test_counts_are_said_and_nothing_is_dropped_silently(imported: tuple[Sample, Dataset, Path, str]) -> None:
    sample, dataset, _, format_ = imported
    assert dataset.num_events == dataset.info["num_events"] == sample.num_events
    assert len(dataset.items()) == dataset.info["num_items"] == sample.num_items
    assert dataset.info["num_users"] == dataset.events()["user_id"].n_unique()
    assert dataset.info["rejected"] == sample.rejected
    assert dataset.info["format"] == format_
    assert dataset.info["licence"]
    rejected = dataset.root / "rejected.parquet"
    assert rejected.exists() == bool(sample.rejected)
    if sample.rejected:
        rows = pl.read_parquet(rejected)
        assert dict(rows.group_by("cause").len().iter_rows()) == sample.rejected
        assert all(isinstance(json.loads(row), dict) for row in rows["row"])
        assert rows["line"].min() >= 1


def test_events_are_sorted_and_identified(imported: tuple[Sample, Dataset, Path, str]) -> None:
    events = imported[1].events()
    assert events["event_time"].is_sorted()
    assert events["event_id"].n_unique() == len(events)
    assert all(events.schema[c] == schema.EVENT_COLUMNS[c] for c in events.columns)
    assert set(schema.EVENT_REQUIRED) <= set(events.columns)
    assert all(events[c].null_count() == 0 for c in schema.EVENT_REQUIRED)
    assert set(events["event_type"]) <= set(schema.EVENT_TYPES)
    if "price" in events.columns:
        assert (events["price"].drop_nulls() >= 0).all()


def test_items_are_complete_and_dated(imported: tuple[Sample, Dataset, Path, str]) -> None:
    sample, dataset, _, _ = imported
    items, events = dataset.items(), dataset.events()
    assert items["item_id"].is_unique().all()
    assert set(events["item_id"]) <= set(items["item_id"])
    first = events.group_by("item_id").agg(pl.col("event_time").min())
    dated = items.join(first, on="item_id")
    assert dataset.static_catalogue or (dated["available_from"] <= dated["event_time"]).all()
    assert (items["title"].null_count() < len(items)) == (sample.titles or dataset.info["format"] == "canonical")
    assert len(dataset.item_table()) == sample.num_items


def test_batches_know_every_item_before_its_first_action(imported: tuple[Sample, Dataset, Path, str]) -> None:
    _, dataset, _, _ = imported
    batch = EventBatch.concat(list(dataset.event_batches(rows_max=2)))
    times = batch.numpy("event_time")
    assert (times[1:] >= times[:-1]).all()
    known: set[str | None] = set()
    for kind, item in zip(batch.numpy("kind"), batch.strings("item_id"), strict=True):
        if kind == 4:
            known.add(item)
        elif kind == 1:
            assert item in known


def test_the_same_import_twice_is_the_same(imported: tuple[Sample, Dataset, Path, str], tmp_path: Path) -> None:
    sample, dataset, source, format_ = imported
    again = import_dataset(format_, source, tmp_path / "again", options=dict(sample.options))
    assert again.hash == dataset.hash
    for file in sorted(p.name for p in dataset.root.iterdir()):
        assert (dataset.root / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file
