"""The simulated world keeps its promises."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from recsys.core.errors import BadInput, Conflict
from recsys.data import Dataset, simulate
from recsys.data.simulate.presets import DAY_US, EXAMINATION, SALE_US, SLATE_ITEMS, START_US, WARMUP_DAYS


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    out = tmp_path_factory.mktemp("world") / "small"
    simulate("small", 3, out)
    return Dataset.open(out)


@pytest.fixture(scope="module")
def events(world: Dataset) -> pl.DataFrame:
    return world.events().with_columns(us=pl.col("event_time").dt.timestamp("us"))


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path: Path) -> None:
    hashes = [simulate("tiny", seed, tmp_path / name).hash for name, seed in (("a", 5), ("b", 5), ("c", 6))]
    assert hashes[0] == hashes[1] != hashes[2]
    for file in ("events.parquet", "items.parquet", "catalog.parquet"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_size_and_span(world: Dataset, events: pl.DataFrame) -> None:
    assert 0.9 * 300_000 < world.num_events < 1.1 * 300_000
    assert world.first_event_us >= START_US
    assert world.last_event_us < SALE_US + DAY_US
    assert set(events["event_type"]) == {"impression", "view", "favorite", "cart", "purchase", "return"}
    assert events["event_id"].is_unique().all()


def test_the_peak_is_58_times_the_daily_mean(events: pl.DataFrame) -> None:
    us = events["us"].to_numpy()
    mean_a_minute = (us < SALE_US).sum() / WARMUP_DAYS / 1_440
    first_minutes = ((us >= SALE_US + 60_000_000) & (us < SALE_US + 180_000_000)).sum() / 2
    assert 50 < first_minutes / mean_a_minute < 66
    by_minute = np.bincount((us - START_US) // 60_000_000)
    assert WARMUP_DAYS * 1_440 <= by_minute.argmax() < WARMUP_DAYS * 1_440 + 30


def test_prices_drop_at_midnight_and_are_paid(world: Dataset, events: pl.DataFrame) -> None:
    catalog = world.catalog()
    assert catalog is not None
    drops = catalog.filter(pl.col("kind") == "price")
    assert (drops["event_time"].dt.timestamp("us") == SALE_US).all()
    listed = world.items().select("item_id", first="price")
    assert (drops.join(listed, on="item_id").select(pl.col("price") < pl.col("first")).to_series()).all()
    paid = events.filter((pl.col("event_type") == "purchase") & (pl.col("us") >= SALE_US))
    reduced = paid.join(drops.select("item_id", now="price"), on="item_id")
    assert len(reduced) > 100
    assert (reduced["price"] == reduced["now"]).all()


def test_newcomers_appear_with_their_listing(world: Dataset, events: pl.DataFrame) -> None:
    items = world.items().with_columns(listed=pl.col("available_from").dt.timestamp("us"))
    flash = items.filter(pl.col("listed") == SALE_US)
    assert flash.height > 50
    joined = events.join(items.select("item_id", "listed"), on="item_id")
    assert (joined["us"] >= joined["listed"]).all()
    assert joined.filter(pl.col("listed") == SALE_US).height > 500


def test_nothing_is_bought_after_it_is_sold_out_or_delisted(world: Dataset, events: pl.DataFrame) -> None:
    catalog = world.catalog()
    assert catalog is not None
    gone = catalog.filter((pl.col("kind") == "delist") | ((pl.col("kind") == "stock") & (pl.col("stock") == 0)))
    gone = gone.select("item_id", "kind", gone=pl.col("event_time").dt.timestamp("us"))
    assert gone.filter(pl.col("kind") == "stock").height > 10
    late = events.join(gone, on="item_id").filter(pl.col("us") >= pl.col("gone"))
    assert late.filter(pl.col("event_type") == "purchase").is_empty()
    assert late.filter((pl.col("kind") == "delist") & (pl.col("event_type") != "return")).is_empty()
    stock = catalog.filter((pl.col("kind") == "stock") & (pl.col("stock") > 0)).select("item_id", "stock")
    bought = events.filter(pl.col("event_type") == "purchase").group_by("item_id").len()
    sold = stock.join(bought, on="item_id")
    assert (sold["len"] <= sold["stock"]).all()
    out = sold.join(gone.filter(pl.col("kind") == "stock"), on="item_id")
    assert (out["len"] == out["stock"]).all()


def test_slates_are_whole_distinct_and_clicks_carry_them(events: pl.DataFrame) -> None:
    shown = events.filter(pl.col("event_type") == "impression")
    slates = shown.group_by("request_id").agg(
        pl.len(), pl.col("item_id").n_unique().alias("distinct"), pl.col("position").sum()
    )
    whole = slates.filter(pl.col("len") == SLATE_ITEMS)  # a delisting may cut into one
    assert len(whole) > 0.999 * len(slates)
    assert (whole["distinct"] == SLATE_ITEMS).all()
    assert (whole["position"] == SLATE_ITEMS * (SLATE_ITEMS + 1) // 2).all()
    assert ((shown["propensity"] > 0) & (shown["propensity"] <= 1)).all()
    clicks = events.filter((pl.col("event_type") == "view") & pl.col("request_id").is_not_null())
    matched = clicks.join(shown, on=["request_id", "item_id", "position", "user_id"], how="semi")
    assert len(matched) == len(clicks) > 1_000
    rate = clicks.group_by("position").len().sort("position")["len"].to_numpy() / len(slates)
    assert np.allclose(rate / rate[0], EXAMINATION, rtol=0.15)  # same relevance at every position


def test_propensities_are_those_of_the_draws(world: Dataset, events: pl.DataFrame) -> None:
    """Inverse propensities add up: the mean of 1/p over first positions estimates the number of available items."""
    day = events.filter((pl.col("us") < START_US + 7 * DAY_US) & (pl.col("position") == 1))
    first = day.filter(pl.col("event_type") == "impression")
    available = world.items().filter(pl.col("available_from").dt.timestamp("us") < START_US).height
    assert np.isclose((1 / first["propensity"].cast(pl.Float64)).mean() or 0, available, rtol=0.1)


def test_tastes_last(events: pl.DataFrame, world: Dataset) -> None:
    """Categories viewed in the first half predict those of the second far better than chance."""
    viewed = events.filter(pl.col("event_type") == "view").join(
        world.items().select("item_id", "category"), on="item_id"
    )
    half = START_US + 14 * DAY_US
    before = viewed.filter(pl.col("us") < half).select("user_id", "category").unique()
    after = viewed.filter((pl.col("us") >= half) & pl.col("user_id").is_in(before["user_id"].implode()))
    again = after.join(before, on=["user_id", "category"], how="semi")
    assert len(again) / len(after) > 0.6


def test_titles_are_english_and_chinese(world: Dataset) -> None:
    titles = world.items()["title"]
    chinese = titles.str.contains(r"\p{Han}").mean()
    assert 0.2 < (chinese or 0) < 0.4
    assert titles.null_count() == 0


def test_bad_presets_and_seeds(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="tiny, small, double11"):
        simulate("huge", 0, tmp_path / "o")
    with pytest.raises(BadInput, match="--seed"):
        simulate("tiny", -1, tmp_path / "o")
    with pytest.raises(Conflict):
        simulate("tiny", 0, tmp_path)
