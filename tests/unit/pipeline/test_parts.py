"""Arms, budget, trace, cache, and the question to the reranker."""

import asyncio

import numpy as np
import pytest

from recsys.core import BadInput, Candidates, Deadline, DeadlineExceeded, Tier, Unavailable, key
from recsys.pipeline import ARMS, Arm, Budget, Feed, PipelineConfig
from recsys.pipeline.cache import LastSlates
from recsys.pipeline.rerank import rerank_request
from recsys.pipeline.trace import Health, Trace
from recsys.ranking import FeatureMatrix
from recsys.ranking.catalogue import Catalogue

BEST = {
    "popular": Tier.POPULAR, "own_history": Tier.RETRIEVAL, "own_history_popular": Tier.RETRIEVAL,
    "item_knn": Tier.RETRIEVAL, "retrieval": Tier.RETRIEVAL, "rank": Tier.RANK, "full": Tier.FULL,
}  # fmt: skip


def test_the_arms_and_their_best_tiers():
    assert {name: arm.tier for name, arm in ARMS.items()} == BEST
    assert ARMS["rank"].feeds == ARMS["full"].feeds == ARMS["retrieval"].feeds


def test_an_arms_bounds_are_checked():
    with pytest.raises(BadInput, match="quota"):
        Feed(source="popular", quota=0)
    with pytest.raises(BadInput, match="feeds"):
        Arm(name="empty", feeds=())
    with pytest.raises(BadInput, match="limit_max"):
        PipelineConfig(limit_max=0)
    with pytest.raises(BadInput, match="rerank"):
        Budget(rerank=1.5)


def test_a_stage_never_gets_more_than_is_left():
    budget, deadline = Budget(reserve_ms=5.0), Deadline.after_ms(100)
    for stage in ("user", "sources", "hydrate", "rank", "rerank"):
        share = getattr(budget, stage)
        left = budget.stage(stage, deadline).remaining_ms()
        assert (100 - 5) * share - 20 < left <= (100 - 5) * share


def test_what_is_over_stays_over_and_never_stays_never():
    assert Budget().stage("rank", Deadline.after_ms(-1)).expired
    assert Budget().stage("rank", Deadline.after_ms(1)).remaining_ms() <= 0, "the reserve is left for the answer"
    assert Budget().stage("rank", Deadline.never()) == Deadline.never()


def test_a_source_has_a_budget_of_its_own_within_the_stages():
    budget, stage = Budget(source_ms_max={"ann": 20, "swing": 9_000.0}), Deadline.after_ms(1_000)
    assert 0 < budget.source("ann", stage).remaining_ms() <= 20
    assert budget.source("swing", stage) == stage, "never later than the stage"
    assert budget.source("covisit", stage) == stage, "by default it has the stage's time"
    assert budget.source("ann", Deadline.never()) == Deadline.never(), "replay and training wait for everything"


def test_a_source_that_does_not_come_back_is_given_up_within_the_request():
    request = Deadline.after_ms(1_000)
    source = request.capped(400)
    assert 400 < Budget().given_up(source, request).remaining_ms() <= 500
    assert Budget().given_up(request, request) == request
    assert Budget().given_up(Deadline.never(), Deadline.never()) == Deadline.never()
    assert Budget().given_up(Deadline.after_ms(-1), request).remaining_ms() <= 0


@pytest.mark.parametrize(("wrong", "said"), [({"anns": 20}, "anns"), ({"ann": "20"}, "number"), ({"ann": 0}, "0.1")])
def test_a_sources_budget_that_cannot_be_is_refused(wrong, said):
    with pytest.raises(BadInput, match=rf"source_ms_max.*{said}"):
        Budget(source_ms_max=wrong)


async def test_a_trace_notes_what_happened():
    async def fine():
        return [1, 2]

    async def slow():
        await asyncio.Event().wait()

    async def late():
        raise DeadlineExceeded("x", came="x", expected="x", fix="x")

    async def down():
        raise Unavailable("x", came="x", expected="x", fix="x")

    trace = Trace()
    assert await trace.attempt("a", Deadline.never(), fine()) == [1, 2]
    assert await trace.attempt("b", Deadline.after_ms(1), slow()) is None
    assert await trace.attempt("c", Deadline.never(), late()) is None
    assert await trace.attempt("d", Deadline.never(), down(), items_in=3) is None
    assert trace.fallbacks == ["b:timeout", "c:timeout", "d:unavailable"]
    assert [(t.stage, t.outcome, t.items_in, t.items_out) for t in trace.timings] == [
        ("a", "ok", 0, 2), ("b", "timeout", 0, 0), ("c", "timeout", 0, 0), ("d", "error", 3, 0)
    ]  # fmt: skip
    assert all(t.duration_ms >= 0 and t.start_ms >= 0 for t in trace.timings)


def test_health_counts_from_the_first_failure(monkeypatch):
    health = Health()
    for now_s, failed in ((10, ""), (20, "one"), (30, "two")):
        monkeypatch.setattr("time.monotonic", lambda now_s=now_s: now_s)
        health.note("a", failed)
    assert health.of("a", "b") == (False, "for 10 s: a: two")
    health.note("a")
    assert (health.of("a", "b"), health.of("b")) == ((True, ""), (True, "not asked yet"))


async def test_a_bug_is_not_a_fallback():
    async def bug():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await Trace().attempt("a", Deadline.never(), bug())


def test_the_cache_is_bounded_and_forgets_the_oldest(shop):
    slates, shown = LastSlates(2, 100, 60.0), shop.candidates([1, 2])
    for user in (1, 2, 1, 3):
        slates.put(shop.query(user), shown)
    assert len(slates) == 2
    assert slates.get(shop.query(2)) is None
    assert slates.get(shop.query(1)) is shown
    assert slates.get(shop.query(1, new_only=True)) is None, "another promise, another slate"


def test_the_cache_is_bounded_in_items_too(shop):
    """Slates of 500 items are 50 times those of 10."""
    slates = LastSlates(100, 7, 60.0)
    for user, items in ((1, 3), (2, 3), (1, 2), (3, 2), (4, 1)):
        slates.put(shop.query(user), shop.candidates(range(items)))
    kept = {user: slates.get(shop.query(user)) for user in (1, 2, 3, 4)}
    assert {user: len(shown) for user, shown in kept.items() if shown is not None} == {1: 2, 3: 2, 4: 1}
    slates.put(shop.query(5), shop.candidates(range(8)))
    assert len(slates) == 0, "more than fits is not kept, nor a reason to count wrong"
    slates.put(shop.query(6), shop.candidates(range(7)))
    assert len(slates) == 1


def test_a_slate_is_kept_for_its_time_whether_asked_for_or_not(shop):
    now_s = [0.0]
    slates = LastSlates(100, 100, 60.0, now_s=lambda: now_s[0])
    for user, at_s in ((1, 0.0), (2, 30.0), (1, 50.0)):
        now_s[0] = at_s
        slates.put(shop.query(user), shop.candidates([user]))
    now_s[0] = 90.0
    assert slates.get(shop.query(2)) is not None
    now_s[0] = 90.1
    assert slates.get(shop.query(1)) is not None
    assert len(slates) == 1, "the other is gone though nobody asked for it"
    now_s[0] = 110.1
    assert slates.get(shop.query(1)) is None


def test_nothing_is_cached_for_stress_traffic_or_when_off(shop):
    slates, off = LastSlates(2, 100, 60.0), LastSlates(0, 100, 60.0)
    slates.put(shop.query(1, stress=True), shop.candidates([1]))
    off.put(shop.query(1), shop.candidates([1]))
    slates.put(shop.query(2), Candidates.empty())
    assert len(slates) == len(off) == 0


async def test_the_reranker_is_asked_in_words_and_in_its_own_features(shop, store):
    class Names:
        feature_names = ("rank_position", "rank_score", "retrieval_score", "own_purchases", "unheard_of")

    user = await store.user("user-1", shop.UNTIL_US, shop.NEVER)
    found = shop.candidates([key(f"item-{i}") for i in (1, 2, 9)], [0.1, 0.2, 0.3], "retrieval")
    found = found.with_score("rank", np.array([1.0, 3.0, 2.0], np.float32))
    features = FeatureMatrix(names=("own_purchases",), values=np.array([[7.0], [8.0], [9.0]], np.float32))
    rows = np.array([1, 2])
    query = shop.query(1, query_text="red thing")
    request = rerank_request(query, user, found, features, rows, Catalogue(shop.items()), Names(), 3)
    assert request.item_ids == ["item-2", "item-9"]
    assert request.query_text == "red thing"
    np.testing.assert_allclose(request.features, [[0, 3, 0.2, 8, np.nan], [1, 2, 0.3, 9, np.nan]])
    assert [h.event_time_us for h in request.history] == user.recent_time_us[-3:].tolist()
    numbers = [int(h.item_id.removeprefix("item-")) for h in request.history]
    assert [h.text for h in request.history] == [
        f"Thing number {n} in {shop.COLOURS[n % 4]} | category-{n % 4}" for n in numbers
    ]
