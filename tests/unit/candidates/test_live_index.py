"""The live index: refusals, rebuilds while others read and write, compiled filters, the recall monitor."""

import threading

import numpy as np
import pytest
import vectors_world as world

from recsys.candidates.nearest.live import LiveIndex
from recsys.candidates.nearest.monitor import RecallMonitor
from recsys.candidates.nearest.sharded import ShardedIndex
from recsys.candidates.nearest.static import AnnIndex
from recsys.core import BadInput, Overloaded, VersionMismatch, metrics
from recsys.core.attributes import Attributes, Where
from recsys.models.config import IndexConfig, LiveIndexConfig

M = 3_000
IVF = IndexConfig(kind="ivf", recall_k=10, tuning_queries=64)


def index(n=M, config=IVF, **live):
    return LiveIndex(
        AnnIndex.build(world.keys(n), world.vectors(n), config), config=config, live=LiveIndexConfig(**live)
    )


def nearest(live, vector, where=Where()):  # noqa: B008 - frozen
    return int(live.search(vector[None], 1, where)[0][0, 0])


def test_an_upsert_is_seen_by_the_next_search_and_replaces():
    live, (first, second) = index(), world.vectors(2, seed=50)
    live.upsert(np.array([7]), first[None])
    assert nearest(live, first) == 7
    live.upsert(np.array([7]), second[None])
    assert nearest(live, second) == 7
    assert nearest(live, first) != 7
    assert len(live) == M + 1


def test_of_a_repeated_key_the_last_counts():
    live, pair = index(), world.vectors(2, seed=51)
    live.upsert(np.array([7, 7]), pair)
    assert (nearest(live, pair[1]), len(live)) == (7, M + 1)
    assert nearest(live, pair[0]) != 7


def test_a_sold_out_item_leaves_at_once_and_comes_back():
    live, item_key, vector = index(), int(world.keys(M)[10]), world.vectors(M)[10]
    assert nearest(live, vector) == item_key
    assert live.update(np.array([item_key]), stock_units=np.array([0]))
    assert nearest(live, vector) != item_key
    assert nearest(live, vector, Where(sold_out=True)) == item_key
    assert live.update(np.array([item_key]), stock_units=np.array([3]))
    assert nearest(live, vector) == item_key
    assert not live.update(np.array([-5]), stock_units=np.array([3]))


def test_a_compiled_filter_follows_the_prices():
    live, item_key, vector = index(filters_max=1), int(world.keys(M)[10]), world.vectors(M)[10]
    cheap = Where(price_max_minor=100)
    assert nearest(live, vector, cheap) == -1
    live.update(np.array([item_key]), price_minor=np.array([50]))
    assert nearest(live, vector, cheap) == item_key
    assert nearest(live, vector, Where(price_max_minor=60)) == item_key  # pushes the other filter out
    live.update(np.array([item_key]), price_minor=np.array([500]))
    assert nearest(live, vector, cheap) == -1


def test_what_does_not_fit_is_refused():
    live = index(50, IndexConfig(), delta_items_max=4, rebuild_items=4)
    with pytest.raises(VersionMismatch, match="dimension 16"):
        live.upsert(np.array([1]), np.zeros((1, 3), np.float32))
    with pytest.raises(BadInput, match="one finite vector"):
        live.upsert(np.array([1, 2]), world.vectors(1))
    with pytest.raises(BadInput, match="one finite vector"):
        live.upsert(np.array([1]), np.full((1, world.DIM), np.inf, np.float32))
    with pytest.raises(BadInput, match="one dimension"):
        ShardedIndex([live, LiveIndex(AnnIndex.build(world.keys(3), world.vectors(3, dim=8)))])


def test_a_full_delta_refuses_until_it_is_rebuilt():
    live = index(50, IndexConfig(), delta_items_max=8, rebuild_items=8)
    with pytest.raises(Overloaded, match="delta_items_max"):
        live.upsert(world.keys(9, start=100), world.vectors(9))
    live.upsert(world.keys(8, start=100), world.vectors(8))
    assert live.wait_rebuilt(20)
    live.upsert(world.keys(8, start=200), world.vectors(8))
    assert live.wait_rebuilt(20)
    assert len(live) == 66
    live.report()
    assert metrics.INDEX_ITEMS.labels("base")._value.get() == 66


def test_a_rebuild_that_fails_leaves_the_old_index_serving(monkeypatch):
    live = index(200, IndexConfig(), rebuild_items=4)
    before = metrics.INDEX_REBUILDS.labels("failed")._value.get()

    def broken(*args, **kwargs):
        raise RuntimeError("Error in faiss: out of memory")

    monkeypatch.setattr(AnnIndex, "build", broken)
    new = world.vectors(6, seed=60)
    live.upsert(world.keys(6, start=500), new)
    assert live.wait_rebuilt(20)
    assert metrics.INDEX_REBUILDS.labels("failed")._value.get() == before + 1
    live.upsert(world.keys(6, start=600), new)  # no second try at once
    assert live.wait_rebuilt(20)
    assert metrics.INDEX_REBUILDS.labels("failed")._value.get() == before + 1
    assert len(live) == 212


def test_writes_during_a_rebuild_are_in_the_new_base(monkeypatch):
    live, vectors, keys = index(), world.vectors(M), world.keys(M)
    live.upsert(world.keys(5, start=M), world.vectors(5, seed=61), Attributes.of(5, category=["tea"] * 5))
    build, new = AnnIndex.build, world.vectors(3, seed=62)

    def build_while_others_write(*args, **kwargs):
        built = build(*args, **kwargs)
        live.delete(keys[:2])  # deleted from the base
        live.upsert(keys[2:3], new[:1])  # replaced
        live.upsert(world.keys(1, start=M), new[1:2])  # replaced a row of the delta
        live.upsert(np.array([4_242]), new[2:])  # new
        live.delete(keys[3:4])
        live.upsert(keys[3:4], vectors[3:4])  # deleted and back
        live.update(np.array([int(keys[4])]), stock_units=np.array([0]))
        live.update(np.array([int(world.keys(1, start=M + 1)[0])]), price_minor=np.array([5]))
        live.delete(world.keys(1, start=M + 2))
        return built

    monkeypatch.setattr(AnnIndex, "build", build_while_others_write)
    live.rebuild()
    assert len(live) == M + 5 - 2 + 1 - 1
    assert nearest(live, vectors[0]) != keys[0]
    assert nearest(live, new[0]) == keys[2]
    assert nearest(live, vectors[2]) != keys[2]
    assert nearest(live, new[1]) == world.keys(1, start=M)[0]
    assert nearest(live, new[2]) == 4_242
    assert nearest(live, vectors[3]) == keys[3]
    assert nearest(live, vectors[4]) != keys[4]
    gone = world.vectors(5, seed=61)
    assert (
        nearest(live, gone[1], Where(price_max_minor=5, categories=frozenset({"tea"}))) == world.keys(1, start=M + 1)[0]
    )
    assert nearest(live, gone[2]) != world.keys(1, start=M + 2)[0]


def test_no_query_fails_or_gives_a_deleted_item_while_bases_are_swapped():
    live = index(rebuild_items=150)
    keys, vectors, probes = world.keys(M), world.vectors(M), world.vectors(8, seed=70)
    dead: set[int] = set()
    done, wrong, asked = threading.Event(), [], [0]

    def read():
        rng = np.random.default_rng(threading.get_ident() % 1_000)
        while not done.is_set():
            before = set(dead)  # deleted before the search began
            some = np.concatenate([probes, vectors[rng.integers(0, M, 2)]])
            got = live.search(some, 10)[0]
            asked[0] += 1
            for row in got.tolist():
                if set(row) & before or -1 in row or len(set(row)) != 10:
                    wrong.append((row, sorted(set(row) & before)))

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    swaps = 0
    for round_ in range(40):
        part = slice(round_ * 40, round_ * 40 + 40)
        base = live._state.base
        live.upsert(world.keys(40, start=M + 40 * round_), world.vectors(40, seed=round_))
        live.upsert(keys[M - 40 :], vectors[M - 40 :])  # the same again: never missing, never twice
        live.delete(keys[part])
        dead.update(keys[part].tolist())
        live.wait_rebuilt(20)
        swaps += live._state.base is not base
    done.set()
    for reader in readers:
        reader.join()
    assert wrong == []
    assert swaps >= 5
    assert asked[0] > 20
    assert len(live) == M


def test_the_monitor_compares_sampled_queries_with_the_exact_scan():
    live = index(recall_sample_every=2)
    monitor = RecallMonitor(live, LiveIndexConfig(recall_sample_every=2))
    judged, total = metrics.INDEX_RECALL_SAMPLES.labels("judged"), metrics.INDEX_RECALL._sum
    before, before_sum = judged._value.get(), total.get()
    for query in world.vectors(10, seed=80):
        live.search(query[None], 10, Where(sold_out=True))
    monitor.close()
    assert judged._value.get() == before + 5
    assert 0.9 * 5 <= total.get() - before_sum <= 5
    live.search(world.vectors(1), 10)  # closed: no longer watched
    assert judged._value.get() == before + 5
