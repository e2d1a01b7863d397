"""The FAISS index: round trip, refusals, exact and graph."""

import json

import numpy as np
import pytest

from recsys.candidates import ann
from recsys.candidates.ann import AnnIndex, LocalAnnSource
from recsys.core import BadInput, CorruptData, RunDirectory, RunWriter, VersionMismatch


def vectors(n: int, dim: int = 16):
    x = np.random.default_rng(0).normal(size=(n, dim)).astype(np.float32)
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


def test_the_graph_agrees_with_the_exact_scan(monkeypatch):
    keys, x = vectors(2_000)
    exact, _ = AnnIndex.build(keys, x).search(x[:50], 10)
    monkeypatch.setattr(ann, "EXACT_ITEMS_MAX", 100)
    graph, _ = AnnIndex.build(keys, x).search(x[:50], 10)
    hits = [len(set(a) & set(b)) for a, b in zip(exact.tolist(), graph.tolist(), strict=True)]
    assert sum(hits) >= 0.98 * 500


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
    with pytest.raises(CorruptData, match=r"ann\.faiss"):
        AnnIndex.load(run)


@pytest.mark.parametrize("bad", [np.full((3, 4), np.nan, np.float32), np.zeros((2, 4), np.float32)])
def test_vectors_that_do_not_fit_are_refused(bad):
    with pytest.raises(BadInput, match="one finite vector per key"):
        AnnIndex.build(np.arange(3), bad)


def test_an_empty_index_finds_nothing():
    empty = AnnIndex.build(np.empty(0, np.int64), np.empty((0, 4), np.float32))
    found, _ = empty.search(np.zeros((1, 4), np.float32), 5)
    assert (found == -1).all()
