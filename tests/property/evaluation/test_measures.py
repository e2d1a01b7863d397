"""measures() and make_queries() against slow versions written independently, straight from their definitions."""

import math
from datetime import UTC, datetime, timedelta

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.evaluation import MEASURES, coverage, make_online_queries, make_queries, measures

ITEMS = [f"i{n}" for n in range(30)]
START = datetime(2020, 1, 1, tzinfo=UTC)
LABELS = ["impression", "view", "favorite", "cart", "purchase", "return"]

cases = st.lists(
    st.tuples(
        st.lists(st.sampled_from(ITEMS), unique=True, max_size=25),  # the slate
        st.lists(st.sampled_from(ITEMS), unique=True, min_size=1, max_size=25),  # what was relevant
    ),
    min_size=1,
    max_size=8,
)
event_lists = st.lists(
    st.tuples(
        st.sampled_from(["u1", "u2", "u3"]),
        st.sampled_from(ITEMS[:6]),
        st.sampled_from(LABELS),
        st.integers(0, 11),  # hours after START
        st.sampled_from([None, "s1", "s2"]),
    ),
    max_size=40,
)


def slow(slate: list[str], relevant: list[str], what: str, k: int) -> float:
    gains = [1 if item in relevant else 0 for item in slate[:k]]
    if what == "recall":
        return sum(gains) / len(relevant)
    if what == "hr":
        return 1.0 if sum(gains) else 0.0
    if what == "mrr":
        return max((g / (i + 1) for i, g in enumerate(gains)), default=0.0)
    ideal = sum(1 / math.log2(i + 2) for i in range(min(len(relevant), k)))
    return sum(g / math.log2(i + 2) for i, g in enumerate(gains)) / ideal


def frames(case: list[tuple[list[str], list[str]]]) -> tuple[pl.DataFrame, pl.DataFrame]:
    rows = [(f"q{n}", i + 1, item) for n, (slate, _) in enumerate(case) for i, item in enumerate(slate)]
    slates = pl.DataFrame(rows, schema={"query_id": pl.String, "rank": pl.Int32, "item_id": pl.String}, orient="row")
    queries = pl.DataFrame({"query_id": [f"q{n}" for n in range(len(case))], "relevant": [r for _, r in case]})
    return slates, queries


@settings(max_examples=150, deadline=None)
@given(case=cases, shuffle=st.integers(0, 100))
def test_every_measure_equals_its_definition(case, shuffle):
    slates, queries = frames(case)
    table = measures(slates.sample(fraction=1.0, shuffle=True, seed=shuffle), queries)
    assert table["query_id"].to_list() == queries["query_id"].to_list()
    for row, (slate, relevant) in zip(table.iter_rows(named=True), case, strict=True):
        for name, (what, k) in MEASURES.items():
            assert row[name] == pytest.approx(slow(slate, relevant, what, k), abs=1e-12)
            assert 0.0 <= row[name] <= 1.0
    shown = {item for slate, _ in case for item in slate[:10]}
    assert coverage(slates, 30) == pytest.approx(len(shown) / 30)


def as_events(rows: list[tuple[str, str, str, int, str | None]]) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "user_id": [r[0] for r in rows],
            "item_id": [r[1] for r in rows],
            "event_type": [r[2] for r in rows],
            "event_time": pl.Series([START + timedelta(hours=r[3]) for r in rows], dtype=pl.Datetime("us", "UTC")),
            "session_id": pl.Series([r[4] for r in rows], dtype=pl.String),
        },
        schema_overrides={"user_id": pl.String, "item_id": pl.String, "event_type": pl.String},
    )


def hour_us(hour: int) -> int:
    return int((START + timedelta(hours=hour)).timestamp()) * 1_000_000


@settings(max_examples=150, deadline=None)
@given(rows=event_lists, cut=st.integers(1, 10), length=st.integers(1, 8), new_only=st.booleans())
def test_frozen_queries_equal_their_definition(rows, cut, length, new_only):
    positives = ("purchase", "cart")
    expected = {}
    for user in {r[0] for r in rows}:
        mine = [r for r in rows if r[0] == user]
        before = [r for r in mine if r[3] < cut]
        wanted = {r[1] for r in mine if cut <= r[3] < cut + length and r[2] in positives}
        if new_only:
            wanted -= {r[1] for r in before if r[2] != "impression"}
        if before and wanted:
            expected[user] = sorted(wanted)
    queries = make_queries(
        as_events(rows), from_us=hour_us(cut), to_us=hour_us(cut + length), positives=positives,
        task="new-only" if new_only else "all",
    )  # fmt: skip
    assert dict(queries.select("user_id", "relevant").iter_rows()) == expected
    assert queries["user_id"].to_list() == sorted(expected)
    assert set(queries["query_time"]) <= {hour_us(cut)}


@settings(max_examples=150, deadline=None)
@given(rows=event_lists, cut=st.integers(1, 10), new_only=st.booleans())
def test_online_queries_equal_their_definition(rows, cut, new_only):
    sessions: dict[tuple[str, str], list] = {}
    for r in rows:
        if r[3] >= cut:
            sessions.setdefault((r[0], r[4] or f"at {r[3]}"), []).append(r)
    expected: dict[tuple[str, int], set[str]] = {}
    for (user, _), mine in sessions.items():
        at = min(r[3] for r in mine)
        before = [r for r in rows if r[0] == user and r[3] < at]
        wanted = {r[1] for r in mine if r[2] == "purchase"}
        if new_only:
            wanted -= {r[1] for r in before if r[2] != "impression"}
        if before and wanted:
            expected.setdefault((user, hour_us(at)), set()).update(wanted)
    queries = make_online_queries(
        as_events(rows), from_us=hour_us(cut), to_us=hour_us(12), positives=["purchase"],
        task="new-only" if new_only else "all",
    )  # fmt: skip
    found = {(u, t): set(r) for u, t, r in queries.select("user_id", "query_time", "relevant").iter_rows()}
    assert found == expected
    assert queries["query_time"].is_sorted()
