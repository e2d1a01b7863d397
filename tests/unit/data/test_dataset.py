from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from recsys.core.errors import BadInput, CorruptData, NotFound
from recsys.core.events import EventBatch, EventKind, EventType
from recsys.core.ids import keys
from recsys.data import Dataset, write_dataset
from recsys.data.write import content_hash
from recsys.ranking.live import LiveCatalogue
from streaming.codec import decode_events, encode_events

T0 = datetime(2024, 11, 11, tzinfo=UTC)
T0_US = int(T0.timestamp()) * 1_000_000
MINUTE_US = 60_000_000


def whole(dataset: Dataset, **options: object) -> EventBatch:
    return EventBatch.concat(list(dataset.event_batches(**options)))  # type: ignore[arg-type]


def test_events_are_cut_by_time_and_type(dataset_dir: Path) -> None:
    dataset = Dataset.open(dataset_dir)
    assert dataset.num_events == 10
    assert (dataset.first_event_us, dataset.last_event_us) == (T0_US, T0_US + 9 * MINUTE_US)
    before, after = dataset.events(before_us=T0_US + MINUTE_US), dataset.events(from_us=T0_US + MINUTE_US)
    assert before["event_id"].to_list() == ["e0"]  # strictly before
    assert after["event_id"].to_list() == [f"e{n}" for n in range(1, 10)]  # ties keep source order
    assert dataset.events(types=["purchase"])["event_id"].to_list() == ["e3", "e7"]
    with pytest.raises(BadInput, match="bought"):
        dataset.events(types=["bought"])


def test_events_are_cut_by_when_they_were_learnt(tmp_path: Path, dataset_dir: Path) -> None:
    source = Dataset.open(dataset_dir)
    events = source.events().with_columns(
        known_at=pl.when(pl.col("event_id") == "e2").then(pl.lit(T0 + timedelta(minutes=7)))  # null: at once
    )
    write_dataset(tmp_path / "k", events=events, items=source.items(), info={})
    dataset = Dataset.open(tmp_path / "k")
    for before_us, ids in ((T0_US + 7 * MINUTE_US, [0, 1, 3, 4, 5, 6]), (T0_US + 7 * MINUTE_US + 1, range(8))):
        kept = dataset.events(known_before_us=before_us)
        assert kept["event_id"].to_list() == [f"e{n}" for n in ids]
        for rows_max in (1, 1_000):
            batch = whole(dataset, known_before_us=before_us, include_catalog=False, rows_max=rows_max)
            assert batch.strings("event_id") == kept["event_id"].to_list()
    assert source.events(known_before_us=T0_US + MINUTE_US).equals(source.events(before_us=T0_US + MINUTE_US))
    assert len(dataset.events(known_before_us=T0_US + 9 * MINUTE_US, before_us=T0_US + MINUTE_US)) == 1


def test_item_table_knows_only_what_was_listed_before(dataset_dir: Path) -> None:
    dataset = Dataset.open(dataset_dir)
    table = dataset.item_table(T0_US + MINUTE_US)
    assert sorted(table.column("item_id")) == ["i0", "i1"]
    full = dataset.item_table()
    assert full.ids(keys(["i2", "i0", "nobody"])) == ["i2", "i0", None]
    assert full.values("title", keys(["i0"])) == ["红 Zero"]
    assert full.values("available_from", keys(["i2"])) == [T0_US + MINUTE_US]


def test_item_key_collisions_leave_one_item(dataset_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = __import__("recsys.core.ids", fromlist=["key"]).key
    monkeypatch.setattr("recsys.core.ids.key", lambda id_: 7 if id_ in ("i0", "i2") else real(id_))
    assert sorted(Dataset.open(dataset_dir).item_table().column("item_id")) == ["i0", "i1"]


def test_batches_merge_items_before_actions_of_the_same_time(dataset_dir: Path) -> None:
    dataset = Dataset.open(dataset_dir)
    for rows_max in (1, 3, 1000):
        batches = list(dataset.event_batches(rows_max=rows_max))
        assert max(map(len, batches)) <= rows_max
        batch = EventBatch.concat(batches)
        assert len(batch) == 13
        names = batch.strings("item_id")
        assert names[:3] == ["i0", "i1", "i0"]
        assert batch.numpy("kind")[:3].tolist() == [EventKind.ITEM, EventKind.ITEM, EventKind.ACTION]
        assert batch.strings("event_id")[3] == f"item-{keys(['i2'])[0]:016x}"
    titles = dict(zip(names, batch.strings("title"), strict=True))
    assert titles["i2"] is None
    assert batch.table.filter(batch.table["kind"].to_numpy() == 4)["title"].to_pylist() == ["红 Zero", "One", None]
    actions = batch.of_kind(EventKind.ACTION)
    assert actions.strings("event_id") == [f"e{n}" for n in range(10)]
    assert actions.numpy("event_type")[3] == EventType.PURCHASE
    assert (actions.numpy("known_at") == actions.numpy("event_time")).all()


def test_batches_are_cut_by_time(dataset_dir: Path) -> None:
    dataset = Dataset.open(dataset_dir)
    cut = T0_US + MINUTE_US
    early, late = whole(dataset, before_us=cut), whole(dataset, from_us=cut)
    assert EventBatch.concat([early, late]).table.equals(whole(dataset).table)
    assert (early.numpy("event_time") < cut).all()
    assert len(whole(dataset, from_us=cut, include_catalog=False)) == 9
    assert list(dataset.event_batches(before_us=0)) == []


def test_static_items_come_before_the_first_event(tmp_path: Path, dataset_dir: Path) -> None:
    events = Dataset.open(dataset_dir).events()
    items = pl.DataFrame({"item_id": ["i0", "i1", "i2"], "title": ["a", "b", "c"]})
    write_dataset(tmp_path / "static", events=events, items=items, info={"static_catalogue": True})
    dataset = Dataset.open(tmp_path / "static")
    assert dataset.static_catalogue
    assert len(dataset.item_table(before_us=0)) == 3
    batch = whole(dataset)
    assert batch.numpy("kind")[:4].tolist() == [4, 4, 4, 1]
    assert batch.numpy("event_time")[0] == dataset.first_event_us - 1


def test_catalog_changes_are_merged_with_the_text_of_items(tmp_path: Path, dataset_dir: Path) -> None:
    source = Dataset.open(dataset_dir)
    catalog = pl.DataFrame(
        {
            "event_id": ["c0", "c1", "c2", "c3"],
            "item_id": ["i0", "i0", "i1", "i1"],
            "event_time": [T0, T0 + timedelta(minutes=3), T0 + timedelta(minutes=4), T0 + timedelta(minutes=5)],
            "kind": ["list", "price", "stock", "delist"],
            "price": [100, 50, None, None],
            "stock": [None, None, 0, None],
        },
        schema_overrides={"event_time": pl.Datetime("us", "UTC")},
    )
    items = source.items().with_columns(available_from=pl.col("available_from"))
    write_dataset(tmp_path / "c", events=source.events(), items=items, info={}, catalog=catalog)
    batch = whole(Dataset.open(tmp_path / "c"))
    changes = batch.filter(batch.numpy("kind") != EventKind.ACTION)
    assert changes.strings("event_id")[-3:] == ["c1", "c2", "c3"]
    assert "c0" in changes.strings("event_id")
    rows = {row["event_id"]: row for row in changes.table.to_pylist()}
    assert len(rows) == 6  # i0's listing is c0; i1 and i2 are items.parquet's
    assert (rows["c0"]["kind"], rows["c0"]["listed"], rows["c0"]["title"]) == (EventKind.ITEM, True, "红 Zero")
    assert (rows["c1"]["kind"], rows["c1"]["price"], rows["c1"]["title"]) == (EventKind.PRICE, 50, None)
    assert (rows["c2"]["kind"], rows["c2"]["stock"]) == (EventKind.STOCK, 0)
    assert (rows["c3"]["kind"], rows["c3"]["listed"]) == (EventKind.ITEM, False)


def test_what_the_catalogue_says_of_an_item_as_it_appears_is_not_up_to_a_hash(
    tmp_path: Path, dataset_dir: Path
) -> None:
    """Of equal times the event id's hash decides: half of the items would be sold although they never were."""
    source = Dataset.open(dataset_dir)
    ids = [f"n{n}" for n in range(24)]
    items = pl.DataFrame({"item_id": ids, "title": ids, "price": 100}).with_columns(available_from=pl.lit(T0))
    told = ["delist", "price", "stock"] * 8
    catalog = pl.DataFrame({"event_id": [f"c{n}" for n in range(24)], "item_id": ids, "kind": told}).with_columns(
        event_time=pl.lit(T0),
        price=pl.when(kind="price").then(70),
        stock=pl.when(kind="stock").then(0),
        known_at=pl.when(item_id="n1").then(pl.lit(T0 + timedelta(minutes=1))),  # learnt too late to list at
    )
    write_dataset(tmp_path / "c", events=source.events(), items=items, info={}, catalog=catalog)
    dataset = Dataset.open(tmp_path / "c")
    batch = whole(dataset)
    for live in (LiveCatalogue(dataset.item_table()), LiveCatalogue(dataset.item_table(0))):  # of the run; new to it
        live.apply(batch)
        assert live.available(keys(ids)).tolist() == [kind == "price" for kind in told]
        assert live.listing(keys(ids)).tolist() == [int(kind != "delist") for kind in told]
        told_later = keys([i for i, kind in zip(ids, told, strict=True) if kind == "price"][1:])
        assert live.price(told_later).tolist() == [70] * 7
    listed = {r["item_id"]: r for r in batch.table.to_pylist() if r["listed"]}
    assert [listed[i]["title"] for i in ids] == ids
    assert [T0_US - listed[i]["event_time"] for i in ids] == [int(kind == "delist") for kind in told]
    assert [listed[i]["price"] for i in ids[:4]] == [100, 100, 100, 100]


def test_changes_from_before_1970_can_be_streamed_and_keep_their_order(tmp_path: Path, dataset_dir: Path) -> None:
    source = Dataset.open(dataset_dir)
    time = pl.Datetime("us", "UTC")
    years = [datetime(y, 1, 1, tzinfo=UTC) for y in (1951, 1960, 1969)]
    catalog = pl.DataFrame(
        {"event_id": ["c0", "c2", "c1"], "item_id": ["i0", "i0", "i0"], "event_time": [years[0], years[2], years[1]]},
        schema_overrides={"event_time": time},
    ).with_columns(kind=pl.Series(["list", "price", "price"]), price=pl.Series([100, 300, 200]))
    items = source.items().with_columns(available_from=pl.lit(years[0]).cast(time))
    write_dataset(tmp_path / "old", events=source.events(), items=items, info={}, catalog=catalog)
    changes = whole(Dataset.open(tmp_path / "old"), before_us=T0_US)
    assert set(changes.numpy("event_time").tolist()) == set(changes.numpy("known_at").tolist()) == {1}
    assert [i for i in changes.strings("event_id") if i.startswith("c")] == ["c0", "c1", "c2"]
    assert len(changes) == 5  # with the listings of i1 and i2
    assert not decode_events([value for _, _, value in encode_events(changes)]).rejected


def test_an_archive_that_grows_is_read_in_order_and_without_repeats(tmp_path: Path, dataset_dir: Path) -> None:
    source = Dataset.open(dataset_dir)
    events = source.events()
    root = tmp_path / "archive"
    for day, name, rows in (
        ("2024-11-11", "0-0-4", events[[1, 0, 2, 4]]),
        ("2024-11-11", "1-0-9", events[[3, 4, 5, 6, 7]].with_columns(late=pl.lit(False))),
        ("2024-11-12", "0-5-6", events[[8, 9]].with_columns(pl.col("event_time") + timedelta(days=1))),
    ):
        (root / "events" / f"day={day}").mkdir(parents=True, exist_ok=True)
        rows.write_parquet(root / "events" / f"day={day}" / f"{name}.parquet")
    source.items().write_parquet(root / "items.parquet")
    (root / "dataset.json").write_text("{}")
    archive = Dataset.open(root)
    assert archive.events()["event_id"].to_list() == [f"e{n}" for n in range(10)]
    batch = whole(archive, rows_max=4, include_catalog=False)
    assert batch.strings("event_id") == [f"e{n}" for n in range(10)]
    before = archive.hash
    assert before == Dataset.open(root).hash
    events[[9]].write_parquet(root / "events" / "day=2024-11-12" / "1-0-0.parquet")
    assert Dataset.open(root).hash != before


@pytest.mark.parametrize("name", ["0-13-16", "0-1-4", "1-0-3"])  # by name before or after 0-5-8
def test_what_was_sent_again_too_late_does_not_stand_for_what_was_accepted(
    name: str, tmp_path: Path, dataset_dir: Path
) -> None:
    source = Dataset.open(dataset_dir)
    day = tmp_path / "archive" / "events" / "day=2024-11-11"
    day.mkdir(parents=True)
    accepted = source.events()[:4].with_columns(late=pl.lit(False))
    accepted.write_parquet(day / "0-5-8.parquet")
    accepted[[1, 2]].with_columns(late=pl.lit(True)).write_parquet(day / f"{name}.parquet")
    source.items().write_parquet(tmp_path / "archive" / "items.parquet")
    (tmp_path / "archive" / "dataset.json").write_text("{}")
    archive = Dataset.open(tmp_path / "archive")
    events = archive.events()
    assert events["event_id"].to_list() == [f"e{n}" for n in range(4)]
    assert not events["late"].any()
    assert not whole(archive, include_catalog=False).numpy("late").any()


def test_what_cannot_be_opened_says_why(tmp_path: Path, dataset_dir: Path) -> None:
    with pytest.raises(NotFound, match=r"no dataset.json"):
        Dataset.open(tmp_path / "nowhere")
    (dataset_dir / "dataset.json").write_text("{")
    with pytest.raises(CorruptData, match="JSON"):
        Dataset.open(dataset_dir)
    (dataset_dir / "dataset.json").write_text("{}")
    whole_file = (dataset_dir / "events.parquet").read_bytes()
    (dataset_dir / "events.parquet").write_bytes(whole_file[: len(whole_file) // 2])
    with pytest.raises(CorruptData, match=r"events.parquet.*written to the end"):
        Dataset.open(dataset_dir)
    (dataset_dir / "events.parquet").unlink()
    with pytest.raises(NotFound, match="no events"):
        Dataset.open(dataset_dir)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (pl.col("event_time").dt.timestamp("us"), r"column event_time.*Int64"),
        (pl.col("user_id").cast(pl.Categorical), r"column user_id"),
        (pl.col("price").cast(pl.Float64), r"column price.*Float64"),
    ],
)
def test_other_types_are_refused_with_the_command_that_converts(dataset_dir: Path, change: pl.Expr, said: str) -> None:
    frame = pl.read_parquet(dataset_dir / "events.parquet").with_columns(change)
    frame.write_parquet(dataset_dir / "events.parquet")
    with pytest.raises(BadInput, match=said) as caught:
        Dataset.open(dataset_dir)
    assert "--format canonical" in caught.value.fix


def test_a_directory_cut_by_others_does_not_pass_for_what_it_was(dataset_dir: Path) -> None:
    whole = Dataset.open(dataset_dir)
    assert whole.verify() == whole.hash
    events = pl.read_parquet(dataset_dir / "events.parquet")
    events[:-1].write_parquet(dataset_dir / "events.parquet")
    assert Dataset.open(dataset_dir).hash == content_hash(dataset_dir) != whole.hash
    events.with_columns(user_id=pl.lit("u")).write_parquet(dataset_dir / "events.parquet")
    with pytest.raises(CorruptData, match="hash"):
        Dataset.open(dataset_dir).verify()
    (dataset_dir / "dataset.json").write_text("{}")
    with pytest.raises(BadInput, match="canonical"):
        Dataset.open(dataset_dir).verify()


def test_what_others_put_into_the_folder_is_no_data(dataset_dir: Path) -> None:
    dataset = Dataset.open(dataset_dir)
    for name in ("report/slates.parquet", "runs/run/items.parquet", "rejected.parquet"):
        (dataset_dir / name).parent.mkdir(parents=True, exist_ok=True)
        dataset.items().write_parquet(dataset_dir / name)
    assert dataset.verify() == dataset.hash == content_hash(dataset_dir)


def test_hash_is_that_of_the_data(dataset_dir: Path, tmp_path: Path) -> None:
    dataset = Dataset.open(dataset_dir)
    assert dataset.hash == json.loads((dataset_dir / "dataset.json").read_text())["hash"]
    other = write_dataset(tmp_path / "o", events=dataset.events(), items=dataset.items(), info={"format": "else"})
    less = write_dataset(tmp_path / "l", events=dataset.events().head(9), items=dataset.items(), info={})
    assert other.hash != less.hash
    (dataset_dir / "dataset.json").write_text("{}")
    assert Dataset.open(dataset_dir).hash == dataset.hash


def test_row_groups_outside_the_time_are_not_read(tmp_path: Path) -> None:
    num = 600_000
    times = T0_US + np.arange(num, dtype=np.int64)
    events = pl.DataFrame(
        {
            "event_id": pl.int_range(num, eager=True).cast(pl.String),
            "user_id": ["u"] * num,
            "item_id": ["i"] * num,
            "event_type": ["view"] * num,
            "event_time": pl.Series(times).cast(pl.Datetime("us", "UTC")),
        }
    )
    items = pl.DataFrame({"item_id": ["i"], "available_from": [T0]}).cast({"available_from": pl.Datetime("us", "UTC")})
    write_dataset(tmp_path / "d", events=events, items=items, info={})
    file = tmp_path / "d" / "events.parquet"
    data = bytearray(file.read_bytes())
    data[1000:1100] = b"\0" * 100  # in the first row group's event_ids
    file.write_bytes(bytes(data))
    last = T0_US + num - 10
    dataset = Dataset.open(tmp_path / "d")
    assert len(dataset.events(from_us=last)) == 10
    assert len(whole(dataset, from_us=last, include_catalog=False)) == 10
