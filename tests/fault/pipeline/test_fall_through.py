"""Every stage can fail; a slate still comes, one tier lower, and says why."""

import asyncio
import gc
from dataclasses import replace

import numpy as np
import pytest

from llm_reranker import RerankResult
from recsys.core import (
    Deadline,
    DeadlineExceeded,
    Overloaded,
    Tier,
    Unavailable,
    VersionMismatch,
)
from recsys.core.attributes import Where
from recsys.core.metrics import FALLBACKS
from recsys.pipeline import ARMS, Budget, PipelineConfig, build

DOWN = Unavailable("the port", came="nothing", expected="an answer", fix="Start it.")


class Port:
    """A store, source, scorer or reranker that answers, or does what it is told instead.

    fault: an error to raise, "hang", or None.
    """

    name, version, view_set = "ann", "1", ""
    feature_names = ("rank_score", "rank_position")

    def __init__(self, fault=None, result=None):
        self.fault, self.result, self.calls = fault, result, 0

    async def answer(self):
        self.calls += 1
        if self.fault == "hang":
            await asyncio.Event().wait()
        if self.fault is not None:
            raise self.fault
        return self.result


class Store(Port):
    def __init__(self, store, user=None, items=None):
        super().__init__()
        self.store, self.view_set, self.faults = store, store.view_set, {"user": user, "items": items}

    def max_event_time_us(self):
        return self.store.max_event_time_us()

    async def user(self, *args):
        self.fault = self.faults["user"]
        await self.answer()
        return await self.store.user(*args)

    async def items(self, *args):
        self.fault = self.faults["items"]
        await self.answer()
        return await self.store.items(*args)


class Source(Port):
    def __init__(self, fault=None, result=None, name="ann"):
        super().__init__(fault, result)
        self.name = name

    async def retrieve(self, query, user, limit, deadline):
        return await self.answer()


class Scorer(Port):
    async def score(self, query, user, found, features, deadline):
        given = await self.answer()
        return (found.item_key >> 40).astype(np.float32) if given is None else np.full(len(found), given, np.float32)


class Reranker(Port):
    async def rerank(self, request, deadline):
        given = await self.answer()
        scores = -request.features[:, 0] if given is None else np.full(len(request.item_ids), given, np.float32)
        return RerankResult(scores=scores, depth=len(scores), version="1")


@pytest.fixture
def make(shop, store, run):
    """A cascade of arm full, with the given ports in place of the healthy ones."""

    def made(arm="full", features=None, budget=None, **replaced):
        ann = Source(result=shop.candidates([], name="ann"))
        healthy = {"ann": ann, "scorer": Scorer(), "reranker": Reranker()}
        ports = shop.ports(features or store, **{**healthy, **replaced})
        return build(arm, run, ports, budget=budget or Budget(reserve_ms=100.0))

    return made


FAULTS = [(DOWN, "unavailable"), ("hang", "timeout")]


def within(ms=1_000):
    return Deadline.after_ms(ms)


def whole(slate, shop):
    """A slate that a shopper can be shown."""
    shown = [i.item_id for i in slate.items]
    return len(shown) == len(set(shown)) == 10 and not {shop.SOLD_OUT, shop.DELISTED} & set(shown)


async def test_a_healthy_cascade_is_full(shop, make):
    slate = await make().recommend(shop.query(), within(60_000))
    assert (slate.tier, slate.fallbacks) == (Tier.FULL, ())
    assert whole(slate, shop)
    assert {"rank", "rerank", "retrieval"} <= set(slate.items[0].stage_scores)
    assert slate.versions == {"run": "shop", "views": make().features.view_set, "ranker": "1", "reranker": "1"}
    assert [t.stage for t in slate.timings][-4:] == ["hydrate", "rank", "rerank", "select"]


async def test_an_answer_names_the_versions_that_it_is_from(shop, make):
    """Workers move on by themselves, and not all at once."""
    scorer, reranker = Scorer(), Reranker()
    cascade = make(scorer=scorer, reranker=reranker)

    async def of(version, reranks=True):
        scorer.version, reranker.fault = version, None if reranks else DOWN
        return await cascade.recommend(shop.query(), within(60_000))

    assert [(await of(v)).versions["ranker"] for v in ("1+1", "1+2")] == ["1+1", "1+2"]
    assert cascade.versions_now()["ranker"] == "1+2"
    assert "reranker" not in (await of("1+2", reranks=False)).versions

    class Slow(Reranker):
        async def rerank(self, *args):
            scorer.version = "1+3"  # somebody else's answer
            return await super().rerank(*args)

    scorer.version = "1+2"
    assert (await make(scorer=scorer, reranker=Slow()).recommend(shop.query(), within())).versions["ranker"] == "1+2"


@pytest.mark.parametrize(("fault", "why"), [(DOWN, str(DOWN)), ("hang", "no answer in time")])
async def test_what_failed_last_is_said_until_it_answers(shop, make, store, fault, why):
    broken, scorer, reranker = Store(store), Scorer(), Reranker()
    cascade = make(features=broken, scorer=scorer, reranker=reranker)
    health, asks = cascade.health, lambda: cascade.recommend(shop.query(), within())
    stages = {"user": (broken.faults, "user"), "hydrate": (broken.faults, "items"), "rank": scorer, "rerank": reranker}
    assert health.of(*stages) == (True, "not asked yet")
    await asks()
    for stage, told in stages.items():
        faults, name = told if isinstance(told, tuple) else (vars(told), "fault")
        for faults[name] in (fault, None):
            await asks()
            ok, detail = health.of(*stages)
            assert (ok, detail.endswith(f" s: {stage}: {why}")) == (not faults[name], bool(faults[name]))
            assert health.of(*[s for s in stages if s != stage]) == (True, "")
    assert cascade.under(ARMS["retrieval"]).health is health


@pytest.mark.parametrize(("fault", "reason"), FAULTS)
async def test_reranker(shop, make, fault, reason):
    slate = await make(reranker=Reranker(fault)).recommend(shop.query(), within())
    ranked = await make("rank").recommend(shop.query(), within(5_000))
    assert (slate.tier, slate.fallbacks) == (Tier.RANK, (f"rerank:{reason}",))
    assert [i.item_id for i in slate.items] == [i.item_id for i in ranked.items]


@pytest.mark.parametrize(("fault", "reason"), FAULTS)
async def test_scorer(shop, make, fault, reason):
    slate = await make(scorer=Scorer(fault)).recommend(shop.query(), within())
    assert (slate.tier, slate.fallbacks) == (Tier.RETRIEVAL, (f"rank:{reason}",))
    assert whole(slate, shop)


@pytest.mark.parametrize(("value", "reason"), [(np.nan, "non-finite"), (np.inf, "non-finite"), (0.5, "constant")])
@pytest.mark.parametrize("stage", ["rank", "rerank"])
async def test_scores_that_say_nothing(shop, make, stage, value, reason):
    broken = {"scorer": Scorer(result=value)} if stage == "rank" else {"reranker": Reranker(result=value)}
    slate = await make(**broken).recommend(shop.query(), within(5_000))
    assert slate.fallbacks == (f"{stage}:{reason}",)
    assert slate.tier == (Tier.RETRIEVAL if stage == "rank" else Tier.RANK)
    assert whole(slate, shop)


@pytest.mark.parametrize(("fault", "reason"), FAULTS)
async def test_item_features(shop, make, store, fault, reason):
    """Without them nothing is ranked. What is sold out is not known then."""
    slate = await make(features=Store(store, items=fault)).recommend(shop.query(), within())
    assert (slate.tier, slate.fallbacks) == (Tier.RETRIEVAL, (f"hydrate:{reason}",))
    assert len(slate.items) == 10


@pytest.mark.parametrize(("fault", "reason"), FAULTS)
async def test_one_source_of_many(shop, make, fault, reason):
    slate = await make(ann=Source(fault)).recommend(shop.query(), within())
    assert (slate.tier, slate.fallbacks) == (Tier.FULL, (f"ann:{reason}",))
    assert whole(slate, shop)


@pytest.mark.parametrize("name", [f.source for f in ARMS["full"].feeds])
async def test_any_source_can_be_missing(shop, make, name):
    """The slate is whole without it, of the best tier, and says which one was missing."""
    slate = await make(sources={name: Source(DOWN, name=name)}).recommend(shop.query(), within(5_000))
    assert (slate.tier, slate.fallbacks) == (Tier.FULL, (f"{name}:unavailable",))
    assert whole(slate, shop)
    assert not any(name in i.sources for i in slate.items)


async def test_a_source_may_take_its_share_of_the_time_and_no_more(shop, make):
    """All but one hang: each is given up at the end of the sources' budget, the slate is the other one's."""
    names = [f.source for f in ARMS["full"].feeds if f.source != "covisit"]
    slate = await make(sources={n: Source("hang", name=n) for n in names}).recommend(shop.query(), within(2_000))
    assert slate.tier == Tier.FULL
    assert set(slate.fallbacks) == {f"{n}:timeout" for n in names}
    assert {s for i in slate.items for s in i.sources} == {"covisit"}


async def test_a_source_is_given_up_at_the_end_of_its_own_budget(shop, make):
    """Nothing but that budget ends the wait: the request has minutes. The other sources' items are there."""
    cut, before = FALLBACKS.labels("ann", "timeout"), FALLBACKS.labels("ann", "timeout")._value.get()
    cascade = make(ann=Source("hang"), budget=Budget(source_ms_max={"ann": 5}))
    slate = await cascade.recommend(shop.query(), within(600_000))
    assert (slate.tier, slate.fallbacks) == (Tier.FULL, ("ann:timeout",))
    assert whole(slate, shop)
    assert cut._value.get() == before + 1


@pytest.mark.parametrize("name", ["covisit", "swing", "trending"])
async def test_a_source_without_its_index_is_left_out(shop, store, tmp_path, name):
    run = shop.write_run(tmp_path / "run", more=lambda writer: writer.path(f"index/{name}.parquet").unlink())
    slate = await build("retrieval", run, shop.ports(store)).recommend(shop.query(), within(5_000))
    assert (slate.tier, slate.fallbacks) == (Tier.RETRIEVAL, ())
    assert not any(name in i.sources for i in slate.items)


@pytest.mark.parametrize("arm", ["full", "rank", "popular"])
async def test_who_lets_nothing_pass_gets_nothing_and_no_lower_tier(shop, make, arm):
    """A tier that falls has a reason; here no stage failed."""
    nothing = Where(categories=frozenset({"no such"}))
    slate = await make(arm).recommend(shop.query(where=nothing), within(5_000))
    assert (slate.items, slate.tier, slate.fallbacks) == ((), ARMS[arm].tier, ())


@pytest.mark.parametrize(("fault", "reason"), FAULTS)
async def test_user_features_then_the_last_slate_then_popular(shop, make, store, fault, reason):
    broken = Store(store)
    cascade = make(features=broken)
    good = await cascade.recommend(shop.query(), within(5_000))
    broken.faults["user"] = fault
    seen = good.items[0].item_id
    slate = await cascade.recommend(shop.query(exclude=frozenset({seen})), within())
    assert (slate.tier, slate.fallbacks) == (Tier.CACHED, (f"user:{reason}",))
    assert [i.item_id for i in slate.items[:9]] == [i.item_id for i in good.items[1:]]
    assert len({i.item_id for i in slate.items} - {seen}) == 10  # filled up with a popular item
    for query in (shop.query("never-seen"), shop.query(new_only=True)):
        slate = await cascade.recommend(query, within())
        assert (slate.tier, slate.fallbacks) == (Tier.POPULAR, (f"user:{reason}",))
        assert len(slate.items) == 10


async def test_a_forgotten_user_is_not_answered_from_the_cache(shop, make, store):
    """Forgotten = the store knows nothing of the user any more, and has said so once."""
    broken = Store(store)
    cascade = make(features=broken)
    for new_only in (False, True):
        await cascade.recommend(shop.query(new_only=new_only), within(5_000))
    broken.store = type(store)()
    await cascade.recommend(shop.query(stress=True), within(5_000))
    assert len(cascade.slates) == 2, "stress traffic leaves no trace"
    newcomers = await cascade.recommend(shop.query(), within(5_000))
    broken.faults["user"] = DOWN
    slate = await cascade.recommend(shop.query(), within())
    assert slate.tier == Tier.CACHED
    assert [i.item_id for i in slate.items] == [i.item_id for i in newcomers.items]
    assert (await cascade.recommend(shop.query(new_only=True), within())).tier == Tier.POPULAR


async def test_a_newcomers_last_slate_is_kept_though_the_store_knows_nothing_of_him(shop, make, store):
    """There is no past to forget: sources that fail cost him no more than anybody."""
    cascade, query = make(), shop.query("never-seen")
    first = await cascade.recommend(query, within(5_000))
    broken = replace(cascade, sources=[Source(DOWN, name=s.name) for s in cascade.sources])
    slate = await broken.recommend(query, within(5_000))
    assert slate.tier == Tier.CACHED
    assert [i.item_id for i in slate.items] == [i.item_id for i in first.items]


async def test_a_caller_who_goes_while_sources_are_asked_leaves_nothing_behind(shop, make, recwarn):
    asked = asyncio.create_task(make().recommend(shop.query(), within(5_000)))
    await asyncio.sleep(0)  # sources have their tasks, none of which has begun
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    gc.collect()
    assert not [str(w.message) for w in recwarn if "never awaited" in str(w.message)]


async def test_without_a_cache_popular_answers(shop, store, run):
    broken = Store(store, user=DOWN)
    cascade = build("retrieval", run, shop.ports(broken), config=PipelineConfig(cached_users_max=0))
    broken.faults["user"] = None
    await cascade.recommend(shop.query(), within(5_000))
    broken.faults["user"] = DOWN
    assert (await cascade.recommend(shop.query(), within())).tier == Tier.POPULAR


@pytest.mark.parametrize(
    "error",
    [
        DeadlineExceeded("x", came="x", expected="x", fix="x"),
        Overloaded("x", came="x", expected="x", fix="x"),
        VersionMismatch("x", came="x", expected="x", fix="x"),
    ],
)
async def test_every_error_of_the_tree_falls_through_and_is_counted(shop, make, error):
    reason = "timeout" if isinstance(error, DeadlineExceeded) else error.code.lower().replace("_", "-")
    metric = FALLBACKS.labels("rank", reason)
    before = metric._value.get()
    slate = await make(scorer=Scorer(error)).recommend(shop.query(), within(5_000))
    assert slate.fallbacks == (f"rank:{reason}",)
    assert metric._value.get() == before + 1


async def test_everything_at_once(shop, make, store):
    cascade = make(features=Store(store, items=DOWN), ann=Source(DOWN), scorer=Scorer(DOWN), reranker=Reranker(DOWN))
    slate = await cascade.recommend(shop.query(), within(5_000))
    assert (slate.tier, slate.fallbacks) == (Tier.RETRIEVAL, ("ann:unavailable", "hydrate:unavailable"))
    assert len(slate.items) == 10


async def test_an_answer_comes_within_the_deadline_though_every_port_hangs(shop, make, store):
    loop = asyncio.get_running_loop()
    for ports in ({"ann": Source("hang")}, {"scorer": Scorer("hang")}, {"reranker": Reranker("hang")}):
        cascade, start = make(**ports), loop.time()
        slate = await cascade.recommend(shop.query(), within(600))
        assert loop.time() - start < 0.6
        assert slate.items


async def test_a_training_list_is_whole_or_refused(shop, make):
    with pytest.raises(Unavailable, match=r"ann:unavailable"):
        await make(ann=Source(DOWN)).collect(shop.query(), shop.NEVER)


async def test_a_reranker_of_weight_zero_changes_nothing(shop, store, tmp_path):
    run = shop.write_run(tmp_path / "run", blend_weight=0.0)
    full, rank = [
        await build(arm, run, shop.ports(store, ann=Source(DOWN), scorer=Scorer(), reranker=Reranker())).recommend(
            shop.query(limit=80), shop.NEVER
        )
        for arm in ("full", "rank")
    ]
    assert [(i.item_id, i.score) for i in full.items] == [(i.item_id, i.score) for i in rank.items]
    assert full.tier == Tier.FULL


async def test_the_rerankers_order_counts_within_its_depth_only(shop, store, tmp_path):
    run = shop.write_run(tmp_path / "run", blend_weight=1.0)
    ports = shop.ports(store, ann=Source(DOWN), scorer=Scorer(), reranker=Reranker())
    full, rank = [await build(arm, run, ports).recommend(shop.query(limit=80), shop.NEVER) for arm in ("full", "rank")]
    ids, ranked = [i.item_id for i in full.items], [i.item_id for i in rank.items]
    depth = ARMS["full"].rerank_depth
    assert ids[:depth] == ranked[:depth][::-1], "this reranker turns the ranker's order round"
    assert ids[depth:] == ranked[depth:]
