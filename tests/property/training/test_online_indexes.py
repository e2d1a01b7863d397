"""Indexes made again one step at a time are those that are built at the end, kills or not."""

import itertools
from dataclasses import asdict

import numpy as np
import pipeline_world as shop
import polars as pl
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.candidates import popular, swing, trending
from recsys.candidates.behaviour import DAY_US, WEIGHT
from recsys.candidates.covisit import SECTION, CovisitConfig
from recsys.candidates.ranked_list import EVERYBODY
from recsys.core import CorruptData, EventType, RunDirectory, RunWriter, keys
from recsys.core.index_rows import IndexRows
from recsys.training.online.popular import OnlinePopular
from recsys.training.online.swing import OnlineSwing
from recsys.training.online.trending import OnlineTrending

NAMES = {"view": EventType.VIEW, "purchase": EventType.PURCHASE}
ACTIONS = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 9), st.sampled_from(sorted(NAMES))), max_size=40)


def events_of(rows):
    """Events from (user, item, kind, microseconds since the first)."""
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "event_type", "us"], orient="row")
    time = (shop.START_US + frame["us"]).cast(pl.Datetime("us", "UTC"))
    return frame.with_columns(event_time=time, event_id=pl.int_range(pl.len()).cast(pl.String))


def until_us(events):
    """Just after the last."""
    return int(events["event_time"].dt.epoch("us").max()) + 1


def run_of(out, events, until, config):
    fields = {
        "run_id": "r", "parent": None, "dataset_hash": "", "until": until, "seed": 0, "measures": {},
        "config": {SECTION: asdict(config)}, "versions": {}, "commit": "test", "feature_views": "",
    }  # fmt: skip
    with RunWriter(out, fields, replace=True) as run:
        shop.items().write(run.path("items.parquet"))
        pq.write_table(swing.build_users(events, shop.items(), until, config), run.path(OnlineSwing.FILE))
        pq.write_table(trending.build_rates(events, shop.items(), until), run.path(OnlineTrending.FILE))
        pq.write_table(popular.build_rates(events, shop.items(), until), run.path(OnlinePopular.FILE))
    return RunDirectory.open(out)


def told(*events):
    """The columns of `tell`."""
    events = pl.concat(events)
    kinds = np.array([NAMES[t] for t in events["event_type"]], np.int64)
    return (
        keys(events["user_id"]),
        keys(events["item_id"]),
        WEIGHT[kinds],
        events["event_time"].dt.epoch("us").to_numpy(),
    )


def step_of(index, *events, whole=False):
    """One step of the trainer: its commit, and the rows that are in it."""
    index.tell(*told(*events))
    index.make()
    commit = index.arrays(whole=whole)
    rows = index.made_in(commit)
    return commit, rows_in(rows) if rows is not None else {}


def rows_in(rows):
    """Scores by entry, of each key of IndexRows."""
    stop = np.cumsum(rows.num)
    return {
        key: dict(zip(rows.entry_key[end - n : end].tolist(), rows.score[end - n : end].tolist(), strict=True))
        for key, n, end in zip(rows.key.tolist(), rows.num.tolist(), stop.tolist(), strict=True)
    }


def rows_of_table(table):
    """The same of a whole index."""
    found = {}
    for key, entry, score in zip(*(column.to_pylist() for column in table.columns), strict=True):
        found.setdefault(key, {})[entry] = score
    return found


@given(before=ACTIONS, steps=st.lists(ACTIONS, min_size=1, max_size=4), rows_max=st.integers(1, 12), data=st.data())
@settings(max_examples=60)
def test_links_made_since_are_those_of_an_index_built_now(before, steps, rows_max, data, tmp_path_factory):
    config = CovisitConfig(half_life_days_max=1e-3, shrink=1.0)
    rows = [(f"user-{u}", f"item-{i}", kind) for part in (before, *steps) for u, i, kind in part]
    timed = [(*row, 1_000_000_000 + 20_000_000 * number) for number, row in enumerate(rows)]
    # long before, so that the span of the log says nothing about the half-life
    events = events_of([("user-first", "item-0", "view", us) for us in (0, 999_000_000)] + timed)
    start = 2 + len(before)
    run = run_of(tmp_path_factory.mktemp("links") / "run", events[:start], until_us(events[:start]), config)
    index, commits, made = OnlineSwing(run, rows_max, 100), [], {}
    for number, step in enumerate([*steps, *[[]] * 12]):
        again = events[: start if data.draw(st.booleans(), "the past is told again") else 0]
        commit, now = step_of(index, again, events[start : start + len(step)], whole=number % 2 == 1)
        commits.append(commit)
        made |= now
        if data.draw(st.booleans(), "killed"):
            index = OnlineSwing(run, rows_max, 100)
            for one in commits:
                index.restore(one)
        start += len(step)
        if step:
            built = rows_of_table(swing.build(events[:start], shop.items(), until_us(events[:start]), config))
            for item, links in now.items():
                assert links == pytest.approx(built.get(item, {}), rel=1e-4)
    moved = {f"user-{u}" for step in steps for u, *_ in step}
    assert set(made) == set(keys(events.filter(pl.col("user_id").is_in(moved))["item_id"].unique()).tolist())


@given(
    before=ACTIONS.filter(bool), steps=st.lists(ACTIONS, min_size=1, max_size=5),
    gaps=st.lists(st.sampled_from([1_000_000, DAY_US // 5, DAY_US]), min_size=6, max_size=6), data=st.data(),
)  # fmt: skip
@settings(max_examples=60)
def test_lists_made_since_are_those_of_an_index_built_now(before, steps, gaps, data, tmp_path_factory):
    """Trending and popular; the lists of categories in turn."""
    first = [("user-first", "item-0", "view", 0)]  # a year before: the half-life is the longest there is
    at = itertools.accumulate([365 * DAY_US, *gaps])
    parts = [
        [(f"user-{u}", f"item-{i}", kind, start + number) for number, (u, i, kind) in enumerate(part)]
        for start, part in zip(at, [before, *steps], strict=False)
    ]
    until = shop.START_US + 366 * DAY_US  # a day has no part before it and another after it
    parts = [parts[0], *([(*row[:3], row[3] + DAY_US) for row in part] for part in parts[1:])]
    events = events_of(first + parts[0])
    run = run_of(tmp_path_factory.mktemp("lists") / "run", events, until, CovisitConfig())
    indexes, commits = (OnlineTrending(run, 3, 100), OnlinePopular(run, 3, 100)), []
    for number, part in enumerate(parts[1:]):
        new = events_of(part) if part else events[:0]
        again = events[: len(events) if data.draw(st.booleans(), "the past is told again") else 0]
        events = pl.concat([events, new])
        (lists, made), (popular_list, top) = (step_of(i, again, new, whole=number % 2 == 1) for i in indexes)
        commits.append(lists | popular_list)
        if data.draw(st.booleans(), "killed"):
            indexes = OnlineTrending(run, 3, 100), OnlinePopular(run, 3, 100)
            for index, commit in itertools.product(indexes, commits):
                index.restore(commit)
        if part:
            built = rows_of_table(trending.build(events, shop.items(), until_us(events)))
            assert set(made) >= {trending.EVERYWHERE}
            for category, items in made.items():
                assert items == pytest.approx(built.get(category, {}), rel=1e-4)
            best = popular.build(events, shop.items(), until_us(events))
            expected = dict(zip(*(column.to_pylist() for column in best.columns), strict=True))
            assert top == {EVERYBODY: pytest.approx(expected, rel=1e-4)}


def test_who_was_told_longest_ago_is_forgotten_and_stands_as_in_the_run(tmp_path):
    events = events_of([(f"user-{u}", f"item-{i}", "purchase", 10 * u + i) for u in range(3) for i in range(3)])
    run = run_of(tmp_path / "run", events, until_us(events), CovisitConfig())
    for kind, name in ((OnlineSwing, "taken"), (OnlineTrending, "shown"), (OnlinePopular, "shown")):
        index = kind(run, 100, 2)
        for user in range(3):
            step_of(index, events_of([(f"user-{user}", "item-5", "view", 1_000 + user)]))
        commit, _ = step_of(index, events[:0], whole=True)
        assert set(commit[f"{index.NAME}.{name}.user"].tolist()) == set(keys(["user-1", "user-2"]).tolist())
    links = OnlineSwing(run, 100, 2)
    step_of(links, events_of([("user-0", "item-6", "view", 2_000)]))
    taken = links._of_users(keys(["user-0"]))
    assert set(taken["item_key"]) == set(keys([f"item-{i}" for i in (0, 1, 2, 6)]).tolist())


def test_a_run_in_which_nothing_happened_goes_on(tmp_path):
    events = events_of([("user-0", "item-0", "view", 0)])
    run = run_of(tmp_path / "run", events[:0], shop.START_US, CovisitConfig())
    links, lists, top = (kind(run, 100, 100) for kind in (OnlineSwing, OnlineTrending, OnlinePopular))
    zero, one = keys(["item-0", "item-1"]).tolist()
    assert step_of(links, events)[1] == {zero: {}}
    assert step_of(lists, events)[1][trending.EVERYWHERE] == {zero: 1.0}
    assert step_of(lists, events)[1] == {}, "nothing new, nothing made"
    assert step_of(top, events)[1] == {EVERYBODY: {zero: 1.0}}
    assert step_of(top, events)[1] == {}
    both = events_of([(f"user-{u}", f"item-{i}", "view", 10 + u) for u in (0, 1) for i in (0, 1)])
    assert {item: set(near) for item, near in step_of(links, both)[1].items()} == {zero: {one}, one: {zero}}
    assert set(step_of(lists, both)[1][trending.EVERYWHERE]) == {zero, one}


def test_an_item_listed_since_trends_in_the_shop(tmp_path):
    events = events_of([(f"user-{u}", "item-0", "view", u) for u in range(9)])
    run = run_of(tmp_path / "run", events, until_us(events), CovisitConfig())
    index = OnlineTrending(run, 100, 100)
    _, made = step_of(index, events_of([(f"user-{u}", "listed-today", "purchase", 100 + u) for u in range(9)]))
    assert max(made[trending.EVERYWHERE].items(), key=lambda item: item[1])[0] == keys(["listed-today"])[0]


def test_a_file_without_its_half_life_is_refused(tmp_path):
    events = events_of([("user-0", "item-0", "view", 0)])
    run = run_of(tmp_path / "run", events, until_us(events), CovisitConfig())
    for kind in (OnlineSwing, OnlineTrending, OnlinePopular):
        table = pq.read_table(run.path(kind.FILE))
        pq.write_table(table.replace_schema_metadata(None), run.path(kind.FILE))
        with pytest.raises(CorruptData, match=r"metadata.*Train again"):
            kind(run, 1, 1)


def test_rows_that_contradict_themselves_are_refused():
    for num, score in (([1, 2], [1.0, 1.0]), ([-1, 3], [1.0, 1.0]), ([1, 1], [1.0, np.nan])):
        with pytest.raises(CorruptData, match="rows of an index"):
            IndexRows(key=np.array([1, 2]), num=np.array(num), entry_key=np.array([3, 4]), score=np.array(score))
