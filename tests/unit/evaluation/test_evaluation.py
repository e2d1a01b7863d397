"""Refusals, sampling, bootstrap and Holm; the design's check values where the data is at hand."""

from datetime import UTC, datetime

import numpy as np
import polars as pl
import pytest

from recsys.core import BadInput
from recsys.data.schema import TIME
from recsys.evaluation import (
    bootstrap_mean_ci,
    holm,
    make_online_queries,
    make_queries,
    measures,
    paired_bootstrap,
    parse_positives,
    rare_only,
    with_rare,
)

CUT = int(datetime(2020, 1, 2, tzinfo=UTC).timestamp()) * 1_000_000


def history(users: int = 50) -> pl.DataFrame:
    names = [f"u{n:02d}" for n in range(users)]
    return pl.DataFrame(
        {
            "user_id": names * 2,
            "item_id": ["old"] * users + ["new"] * users,
            "event_type": ["purchase"] * (2 * users),
            "event_time": [datetime(2020, 1, 1, tzinfo=UTC)] * users + [datetime(2020, 1, 3, tzinfo=UTC)] * users,
        },
        schema_overrides={"event_time": pl.Datetime("us", "UTC")},
    )


def ask(events: pl.DataFrame, **options) -> pl.DataFrame:
    return make_queries(events, **{"from_us": CUT, "to_us": 2 * CUT, "positives": ["purchase"], **options})


def test_the_sample_is_seeded_and_does_not_depend_on_row_order():
    events = history()
    one, two = ask(events, queries_max=10, seed=3), ask(events.reverse(), queries_max=10, seed=3)
    assert len(one) == 10
    assert one.equals(two)
    assert not one.equals(ask(events, queries_max=10, seed=4))
    assert ask(events, queries_max=1_000).equals(ask(events))


def test_an_item_is_rare_while_fewer_than_five_actions_lie_before_the_query():
    actions = [  # item, type, days after 2020-01-01
        *(("five", "view", n) for n in (1, 2, 3, 4, 4)), *(("four", "view", n) for n in (1, 2, 3, 4, 5)),
        *(("shown", "impression", 1) for _ in range(9)),
    ]  # fmt: skip
    events = pl.DataFrame(actions, schema=["item_id", "event_type", "day"], orient="row").select(
        "item_id", "event_type", user_id=pl.lit("u"), event_time=pl.datetime(2020, 1, "day", time_zone="UTC")
    )
    at = int(datetime(2020, 1, 5, tzinfo=UTC).timestamp()) * 1_000_000
    queries = pl.DataFrame(
        {
            "query_id": ["b", "a", "c"],
            "user_id": ["b", "a", "c"],
            "query_time": [at, at + 1, at],
            "relevant": [["five", "four", "never", "shown"], ["four"], ["five"]],
        }
    )
    asked = with_rare(queries, events)
    assert asked["rare"].to_list() == [["four", "never", "shown"], [], []]
    assert asked.drop("rare").equals(queries)
    assert rare_only(asked).select("query_id", "relevant").rows() == [("b", ["four", "never", "shown"])]


@pytest.mark.parametrize("make", [make_queries, make_online_queries])
def test_what_was_learnt_later_is_no_past_and_yet_right(make):
    early, late = datetime(2020, 1, 1, tzinfo=UTC), datetime(2020, 1, 9, tzinfo=UTC)
    done = datetime(2020, 1, 2, tzinfo=UTC)  # the cut
    rows = [  # user, item, event_time, known_at
        ("known", "a", early, None), ("known", "b", early, late), ("unknown", "a", early, late),
        ("known", "a", done, late), ("known", "b", done, done), ("unknown", "b", done, None),
    ]  # fmt: skip
    events = pl.DataFrame(
        rows, schema={"user_id": pl.String, "item_id": pl.String, "event_time": TIME, "known_at": TIME}, orient="row"
    ).with_columns(event_type=pl.lit("purchase"))
    period = {"from_us": CUT, "to_us": CUT + 1, "positives": ["purchase"]}
    asked = make(events, **period)
    assert asked.select("user_id", "relevant").rows() == [("known", ["a", "b"])]
    assert make(events, **period, task="new-only").select("user_id", "relevant").rows() == [("known", ["b"])]
    five = pl.concat([events.head(1)] * 4 + [events.slice(1, 1).with_columns(item_id=pl.lit("a"))])
    assert with_rare(asked, five)["rare"].to_list() == [["a", "b"]]
    assert with_rare(asked, five.drop("known_at"))["rare"].to_list() == [["b"]]


@pytest.mark.parametrize(
    "options",
    [
        {"positives": ["buy"]},
        {"positives": []},
        {"positives": ["impression"]},
        {"task": "new"},
        {"from_us": 5, "to_us": 5},
        {"queries_max": 0},
    ],
)
def test_questions_that_make_no_sense_are_refused(options):
    with pytest.raises(BadInput):
        ask(history(), **options)


def test_positives_are_a_comma_list_or_any():
    assert parse_positives("purchase, cart") == ("purchase", "cart")
    assert parse_positives("any") == ("view", "favorite", "cart", "purchase")
    for text in ("buy", "", "purchase,fav", "impression"):
        with pytest.raises(BadInput, match="any"):
            parse_positives(text)


def test_measures_refuse_slates_that_are_not_slates():
    queries = pl.DataFrame({"query_id": ["q"], "relevant": [["a"]]})
    for rank, item in (([1, 2], ["a", "a"]), ([1, 1], ["a", "b"]), ([0, 1], ["a", "b"])):
        with pytest.raises(BadInput, match="slates"):
            measures(pl.DataFrame({"query_id": ["q", "q"], "rank": rank, "item_id": item}), queries)
    empty = pl.DataFrame(schema={"query_id": pl.String, "rank": pl.Int32, "item_id": pl.String})
    assert measures(empty, queries)["ndcg@10"].to_list() == [0.0]
    with pytest.raises(BadInput, match="relevant"):
        measures(empty, queries.with_columns(relevant=pl.lit([], dtype=pl.List(pl.String))))


def test_the_interval_covers_the_truth_about_19_times_in_20():
    rng = np.random.default_rng(0)
    inside = 0
    for trial in range(200):
        low, high = bootstrap_mean_ci(rng.exponential(1.0, 150), trial, samples=400)
        inside += low <= 1.0 <= high
    assert 175 <= inside <= 199


def test_users_are_drawn_whole():
    """Ten copies of each user's value say no more than one copy: the interval must not shrink."""
    values = np.random.default_rng(1).normal(size=60)
    users = [f"u{n}" for n in range(60)]
    once = bootstrap_mean_ci(values, 7, users=users)
    copies = bootstrap_mean_ci(np.repeat(values, 10), 7, users=[u for u in users for _ in range(10)])
    naive = bootstrap_mean_ci(np.repeat(values, 10), 7)
    assert copies[1] - copies[0] == pytest.approx(once[1] - once[0], rel=0.15)
    assert naive[1] - naive[0] < 0.5 * (once[1] - once[0])


def test_few_users_are_never_sure():
    """Resampled, one user is as good as another: without more a single query would have an interval of no width."""
    for differ, p in ((1, 1.0), (2, 0.5), (5, 0.0625)):
        test = paired_bootstrap([0.2] * differ + [0.0] * 20, np.zeros(differ + 20), 0)
        assert (test.p, test.ci95[0]) == (p, 0.0)
        assert paired_bootstrap([-0.2] * differ, np.zeros(differ), 0).ci95[1] == 0
    enough = paired_bootstrap([0.2, 0.1, 0.3, 0.2, 0.1, 0.2], np.zeros(6), 0)
    assert enough.p == 2 / 2**6
    assert enough.ci95[0] > 0
    same_user = paired_bootstrap([0.2] * 10, np.zeros(10), 0, users=["one"] * 10)
    assert same_user.p == 1


def test_the_paired_test_sees_a_small_steady_gain_and_nothing_where_nothing_is():
    rng = np.random.default_rng(2)
    base = rng.uniform(size=400)
    better = paired_bootstrap(base + 0.01 + rng.normal(0, 0.02, 400), base, 0)
    assert better.ci95[0] < better.diff < better.ci95[1]
    assert better.diff == pytest.approx(0.01, abs=0.005)
    assert better.p < 0.002
    same = paired_bootstrap(base, base, 0)
    assert (same.diff, same.ci95, same.p) == (0.0, (0.0, 0.0), 1.0)
    rejected = sum(paired_bootstrap(rng.normal(size=100), np.zeros(100), s, samples=300).p < 0.05 for s in range(200))
    assert rejected <= 22  # 5 % of 200, plus four standard deviations
    with pytest.raises(BadInput):
        paired_bootstrap([1.0, 2.0], [1.0], 0)
    for bad in ([], [float("nan")]):
        with pytest.raises(BadInput):
            bootstrap_mean_ci(bad, 0)


def test_holm_against_the_published_step_down():
    assert holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]).tolist() == [1.0, 1.0]
    assert holm([]).tolist() == []
    with pytest.raises(BadInput):
        holm([1.5])
