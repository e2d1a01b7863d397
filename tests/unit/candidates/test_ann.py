"""The FAISS index: round trip, refusals, exact and graph."""

import json

import numpy as np
import pytest

from recsys.candidates.ann import LocalAnnSource
from recsys.candidates.nearest import static as ann
from recsys.candidates.nearest.gpu import num_devices
from recsys.candidates.nearest.live import LiveIndex
from recsys.candidates.nearest.sharded import Shard, ShardedIndex
from recsys.candidates.nearest.static import AnnIndex
from recsys.core import BadInput, CorruptData, RunDirectory, RunWriter, Unavailable, VersionMismatch
from recsys.models.config import IndexConfig


def vectors(n: int, dim: int = 16, seed: int = 0):
    x = np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)
    return np.arange(n, dtype=np.int64) * 7 + 1, x / np.linalg.norm(x, axis=1, keepdims=True)


def run_with(tmp_path, index: AnnIndex, **changed) -> RunDirectory:
    fields = dict.fromkeys(("run_id", "parent", "dataset_hash", "config", "versions", "commit", "measures"), "x")
    with RunWriter(tmp_path / "run", {**fields, "until": 0, "seed": 0, "feature_views": "v"}) as run:
        index.save(run.path(ann.INDEX_FILE).parent, "x")
        facts = json.loads(run.path(ann.FACTS_FILE).read_text())
        run.path(ann.FACTS_FILE).write_text(json.dumps({**facts, **changed}))
    return RunDirectory.open(tmp_path / "run")


def test_round_trip_finds_the_same(tmp_path):
    keys, x = vectors(200)
    built = AnnIndex.build(keys, x)
    loaded = AnnIndex.load(run_with(tmp_path, built))
    for index in (built, loaded):
        found, score = index.search(x[:5], 3)
        np.testing.assert_array_equal(found[:, 0], keys[:5])
        np.testing.assert_allclose(score[:, 0], 1.0, rtol=1e-5)
    assert (len(loaded), loaded.dim) == (200, 16)


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf"])
def test_shards_of_a_run_have_each_item_once(tmp_path, kind):
    keys, x = vectors(2_000)
    config = IndexConfig(kind=kind, recall_k=10, tuning_queries=64)
    built = AnnIndex.build(keys, x, config)
    run, asked = run_with(tmp_path, built), vectors(50, seed=1)[1]
    parts = [AnnIndex.load(run, config, Shard(i, 3)) for i in range(3)]
    assert np.sort(np.concatenate([p.row_key for p in parts])).tolist() == keys.tolist()
    assert all(Shard(i, 3).holds(p.row_key).all() and p.engine.kind == kind for i, p in enumerate(parts))
    merged, whole = (
        ShardedIndex([LiveIndex(p, config=config) for p in parts]).search(asked, 10),
        built.search(asked, 10),
    )
    if kind == "flat":
        np.testing.assert_array_equal(merged[0], whole[0])
        np.testing.assert_array_equal(merged[1], whole[1])
    if kind == "ivf":  # three shards scan what one index scans for three times as many, together
        scan = np.array(built.engine.tuned["scan"])
        np.testing.assert_allclose(np.sum([p.engine.tuned["scan"] for p in parts], axis=0), scan)
    exact = AnnIndex.build(keys, x, IndexConfig(kind="flat")).search(asked, 10)[0]
    assert np.mean([np.isin(e, m).mean() for e, m in zip(exact, merged[0], strict=True)]) >= config.recall_target - 0.02


@pytest.mark.parametrize("text", ["2/2", "-1/2", "0/0", "0/1025", "1", "a/b", "0/2/3", ""])
def test_what_is_no_shard_is_refused(text):
    with pytest.raises(BadInput, match="0/2 and 1/2"):
        Shard.parse(text)


def test_a_shard_is_written_as_it_is_read():
    assert Shard.parse("3/16") == Shard(3, 16)
    assert str(Shard(3, 16)) == "3/16"


@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_approximate_kinds_reach_the_recall_they_are_tuned_to(kind):
    keys, x = vectors(3_000)
    held_out = vectors(200, seed=1)[1]
    exact, _ = AnnIndex.build(keys, x, IndexConfig(kind="flat")).search(held_out, 10)
    index = AnnIndex.build(keys, x, IndexConfig(kind=kind, recall_k=10, recall_target=0.95))
    hits = [len(set(a) & set(b)) for a, b in zip(exact.tolist(), index.search(held_out, 10)[0].tolist(), strict=True)]
    assert sum(hits) >= 0.93 * 10 * len(held_out)
    assert index.facts("x")["tuned"]["recall"] >= 0.95


def test_the_kind_follows_the_size():
    keys, x = vectors(500)
    assert AnnIndex.build(keys, x).engine.kind == "flat"
    assert AnnIndex.build(keys, x, IndexConfig(exact_items_max=100)).engine.kind == "ivf"


def test_few_items_are_scanned_where_lists_were_asked_for():
    keys, x = vectors(300)
    config = IndexConfig(kind="ivf", recall_k=10)
    few = AnnIndex.build(keys[:5], x[:5], config)
    assert (few.engine.kind, few.search(x[:1], 1)[0].tolist()) == ("flat", [[keys[0]]])
    live = LiveIndex(AnnIndex.build(keys, x, config), config=config)
    live.delete(keys[5:])
    live.rebuild(retrain=True)
    assert len(live) == 5


def test_the_same_vectors_give_the_same_index(tmp_path):
    keys, x = vectors(2_000)
    first, second = [AnnIndex.build(keys, x, IndexConfig(kind="ivf")) for _ in range(2)]
    assert first.facts("x") == second.facts("x")
    np.testing.assert_array_equal(first.search(x[:50], 20)[0], second.search(x[:50], 20)[0])


def test_a_device_that_is_not_there_is_refused():
    if num_devices():
        assert AnnIndex.build(*vectors(10), IndexConfig(device="cuda")).engine.kind == "flat"
        return
    with pytest.raises(Unavailable, match=r"faiss-gpu"):
        AnnIndex.build(*vectors(10), IndexConfig(device="cuda"))


def test_the_same_key_twice_is_refused():
    with pytest.raises(BadInput, match="the same key twice"):
        AnnIndex.build(np.zeros(3, np.int64), vectors(3)[1])


def test_another_dimension_is_refused_with_the_fix(tmp_path):
    index = AnnIndex.build(*vectors(10))
    with pytest.raises(VersionMismatch, match=r"dimension 16.*one run"):
        index.search(np.zeros((1, 8), np.float32), 3)

    class SmallTower:
        dim = 8

    with pytest.raises(VersionMismatch, match="tower of dimension 8"):
        LocalAnnSource(SmallTower(), index)


def test_an_index_that_is_not_what_its_facts_say_is_refused(tmp_path):
    with pytest.raises(CorruptData, match=r"ann\.json says"):
        AnnIndex.load(run_with(tmp_path, AnnIndex.build(*vectors(10)), dim=99))


def test_an_index_that_faiss_cannot_read_is_refused(tmp_path):
    run = run_with(tmp_path, AnnIndex.build(*vectors(10)))
    run.path(ann.INDEX_FILE).write_bytes(b"not an index")
    for shard in (Shard(), Shard(0, 2)):
        with pytest.raises(CorruptData, match=r"ann\.faiss"):
            AnnIndex.load(run, shard=shard)


@pytest.mark.parametrize("bad", [np.full((3, 4), np.nan, np.float32), np.zeros((2, 4), np.float32)])
def test_vectors_that_do_not_fit_are_refused(bad):
    with pytest.raises(BadInput, match="one finite vector per key"):
        AnnIndex.build(np.arange(3), bad)


def test_an_empty_index_finds_nothing():
    empty = AnnIndex.build(np.empty(0, np.int64), np.empty((0, 4), np.float32))
    found, _ = empty.search(np.zeros((1, 4), np.float32), 5)
    assert (found == -1).all()
