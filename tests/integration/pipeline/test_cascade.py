"""The cascade over a real store, real indexes, a real tower and ranker (untrained), and what it refuses."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from recsys.candidates.ann import LocalAnnSource
from recsys.candidates.fusion import FILE, Fusion, share
from recsys.candidates.nearest.live import LiveIndex
from recsys.candidates.nearest.static import AnnIndex
from recsys.core import (
    BadInput,
    CorruptData,
    Deadline,
    DeadlineExceeded,
    NotFound,
    RunDirectory,
    Tier,
    VersionMismatch,
    key,
)
from recsys.models.config import RankerConfig, TowerConfig
from recsys.models.embeddings import Vocabulary
from recsys.models.ranker import Ranker, RankerNet
from recsys.models.tower import ItemRows, Tower, TowerNet
from recsys.pipeline import ARMS, Arm, Feed, build
from recsys.ranking.features import FEATURE_NAMES
from recsys.ranking.score import LocalScorer

SIMPLE = ("popular", "own_history", "own_history_popular", "item_knn", "retrieval")


@pytest.fixture(scope="module")
def trained(shop):
    """The real tower and ranker with weights from a seed."""
    torch.manual_seed(0)
    rows, num_rows = ItemRows.build(shop.items(), shop.items().item_key)
    tower = Tower(TowerNet(num_rows, TowerConfig()), rows, TowerConfig())
    vocabulary = Vocabulary(shop.items().item_key)
    net = RankerNet(len(FEATURE_NAMES), vocabulary.num_rows, RankerConfig())
    for parameter in net.parameters():  # as they begin, every score is 0
        torch.nn.init.normal_(parameter, std=0.1)
    ranker = Ranker(net.eval(), FEATURE_NAMES, vocabulary, RankerConfig())
    return tower, ranker


@pytest.fixture(scope="module")
def models(trained):
    """Both behind the ports."""
    tower, ranker = trained
    ann = LocalAnnSource(tower, LiveIndex(AnnIndex.build(*tower.item_vectors())))
    return {"ann": ann, "scorer": LocalScorer(ranker)}


async def test_without_ports_the_runs_own_models_answer(shop, store, trained, models, tmp_path):
    tower, ranker = trained

    def more(run):
        tower.save(run.path("models/tower.json").parent)
        ranker.save(run.path("models/ranker.json").parent)
        AnnIndex.build(*tower.item_vectors()).save(run.path("index/ann.json").parent, "shop")

    run = shop.write_run(tmp_path / "run", more=more)
    own, ported = [
        await build("rank", run, shop.ports(store, **ports)).recommend(shop.query(1), Deadline.never())
        for ports in ({}, models)
    ]
    assert own.tier == Tier.RANK
    assert [i.item_id for i in own.items] == [i.item_id for i in ported.items]
    assert own.versions["ranker"] == ranker.version


@pytest.mark.parametrize("arm", SIMPLE)
async def test_simple_arms_answer_at_their_tier(shop, store, run, arm):
    slate = await build(arm, run, shop.ports(store)).recommend(shop.query(1), Deadline.after_ms(5_000))
    assert slate.tier == ARMS[arm].tier
    assert slate.fallbacks == ()
    assert slate.request_id == "r"
    assert 0 < len(slate.items) <= 10
    assert all(i.item_key == key(i.item_id) for i in slate.items)


async def test_the_ranker_sees_every_source(shop, store, run, models):
    cascade = build("rank", run, shop.ports(store, **models))
    slate = await cascade.recommend(shop.query(1, limit=60), Deadline.never())
    assert (slate.tier, slate.fallbacks) == (Tier.RANK, ())
    assert {s for i in slate.items for s in i.sources} >= {"own_history", "covisit", "ann", "popular", "trending"}
    bought = [i for i in slate.items if i.reason == "bought-before"]
    assert {i.item_key for i in bought} <= shop.purchases("user-1")


async def test_sources_count_as_the_run_has_learnt_for_each_task(shop, store, models, tmp_path):
    only = {"all": "popular", "new_only": "ann"}
    learnt = Fusion(
        **{task: {f.source: float(f.source == name) for f in ARMS["retrieval"].feeds} for task, name in only.items()}
    )
    run = shop.write_run(tmp_path / "run", more=lambda run: learnt.save(run.path(FILE)))
    cascade = build("retrieval", run, shop.ports(store, ann=models["ann"]))
    for task, name in only.items():
        found = (await cascade.collect(shop.query(1, new_only=task == "new_only"), Deadline.never())).candidates
        np.testing.assert_allclose(found.score("retrieval"), share(found.score(name)), rtol=1e-6)
    alone = build("own_history", run, shop.ports(store))
    assert len((await alone.recommend(shop.query(1), Deadline.never())).items), "an arm of one source needs no weights"


def test_weights_that_are_none_are_refused(shop, store, tmp_path):
    run = shop.write_run(tmp_path / "run", more=lambda run: run.path(FILE).write_text('{"all": {"ann": "much"}}'))
    with pytest.raises(CorruptData, match=FILE):
        build("retrieval", run, shop.ports(store))


async def test_same_query_same_slate(shop, store, run, models):
    slates = [
        await build("rank", run, shop.ports(store, **models)).recommend(shop.query(2), Deadline.never())
        for _ in range(2)
    ]
    assert slates[0].items == slates[1].items


async def test_collect_is_what_the_ranker_is_asked(shop, store, run, models):
    cascade = build("rank", run, shop.ports(store, **models))
    query = shop.query(3, limit=70)
    collected = await cascade.collect(query, Deadline.never())
    slate = await cascade.recommend(query, Deadline.never())
    assert collected.features.names == FEATURE_NAMES
    assert collected.features.values.shape == (len(collected.candidates), len(FEATURE_NAMES))
    assert {i.item_key for i in slate.items} <= set(collected.candidates.item_key.tolist())
    score = await models["scorer"].score(
        query, collected.user, collected.candidates, collected.features, Deadline.never()
    )
    by_key = dict(zip(collected.candidates.item_key.tolist(), score.tolist(), strict=True))
    np.testing.assert_allclose([i.score for i in slate.items], [by_key[i.item_key] for i in slate.items], rtol=1e-5)


async def test_a_newcomer_gets_a_full_slate(shop, store, run):
    slate = await build("retrieval", run, shop.ports(store)).recommend(shop.query("nobody"), Deadline.never())
    assert (len(slate.items), slate.tier) == (10, Tier.RETRIEVAL)


async def test_an_empty_result_that_nothing_caused_is_an_answer(shop, store, run):
    cascade = build("own_history", run, shop.ports(store))
    slate = await cascade.recommend(shop.query("nobody"), Deadline.never())
    assert (slate.items, slate.tier, slate.fallbacks) == ((), Tier.RETRIEVAL, ())


async def test_a_long_slate_is_filled_up_with_popular_items(shop, store, run):
    slate = await build("retrieval", run, shop.ports(store)).recommend(shop.query(1, limit=1_000), Deadline.never())
    assert len(slate.items) >= 70
    assert not {shop.SOLD_OUT, shop.DELISTED} & {i.item_id for i in slate.items}


@pytest.mark.parametrize("limit", [0, -1, 1_001])
async def test_a_limit_out_of_range_is_refused(shop, store, run, limit):
    with pytest.raises(BadInput, match="1 to 1000"):
        await build("popular", run, shop.ports(store)).recommend(shop.query(1, limit=limit), Deadline.never())


async def test_no_time_on_arrival_is_refused(shop, store, run):
    with pytest.raises(DeadlineExceeded):
        await build("popular", run, shop.ports(store)).recommend(shop.query(1), Deadline.after_ms(-1))


def test_an_unknown_arm_or_source_is_named(shop, store, run):
    with pytest.raises(BadInput, match=r"pupular.*own_history"):
        build("pupular", run, shop.ports(store))
    with pytest.raises(BadInput, match="oracle"):
        build(Arm(name="x", feeds=(Feed(source="oracle", quota=1),)), run, shop.ports(store))


def test_a_run_of_other_feature_views_is_refused(shop, store, tmp_path):
    run = shop.write_run(tmp_path / "run", feature_views="v0")
    with pytest.raises(VersionMismatch, match=r"v0.*Train again"):
        build("popular", run, shop.ports(store))


def test_a_run_without_ranker_or_popular_says_which_file(shop, store, run):
    with pytest.raises(NotFound, match=r"models/ranker"):
        build("rank", run, shop.ports(store))
    bare = RunDirectory(run.root, {**run.manifest, "files": {"items.parquet": run.manifest["files"]["items.parquet"]}})
    with pytest.raises(NotFound, match=r"index/popular\.parquet"):
        build("popular", bare, shop.ports(store))


def test_a_run_without_reranker_names_the_command(shop, store, run, models):
    bare = RunDirectory(run.root, {**run.manifest, "rerankers": []})
    with pytest.raises(VersionMismatch, match="double11 distill"):
        build("full", bare, shop.ports(store, **models))


@pytest.mark.parametrize("arm", ["popular", "full"])
def test_a_cascade_with_remote_ports_loads_nothing_heavy(shop, run, arm):
    """In a fresh interpreter, as the gateway does: import, build, look at sys.modules."""
    code = textwrap.dedent(
        """
        import sys
        import numpy as np
        import recsys.candidates, recsys.ranking
        from recsys.core import ManualClock, RunDirectory
        from recsys.pipeline import Ports, build

        class Remote:
            view_set, name, version, feature_names = sys.argv[3], "ann", "1", ()

        remote = Remote()
        ports = Ports(features=remote, clock=ManualClock(0), rng=np.random.default_rng(0),
                      ann=remote, scorer=remote, reranker=remote)
        build(sys.argv[2], RunDirectory.open(sys.argv[1]), ports)
        heavy = {"torch", "torchrec", "faiss", "transformers"} & set(sys.modules)
        sys.exit(f"loaded {sorted(heavy)}" if heavy else 0)
        """
    )
    views = run.manifest["feature_views"]
    done = subprocess.run([sys.executable, "-c", code, str(run.root), arm, views], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
