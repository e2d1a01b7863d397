"""Peers on real baskets: they see nothing from the cut on, repeat with their seed, and say what they need."""

import asyncio
import sys

import polars as pl
import pytest

from recsys.core import BadInput
from recsys.data import Dataset
from recsys.replay import replay
from recsys.replay.compare import answer
from recsys.replay.peers import fit_peers
from recsys.replay.protocol import Past

ARMS = ("popular", "als", "bpr", "ease", "tifu_knn")


@pytest.fixture(scope="module")
def report(shop, light_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("reports") / "peers"
    return replay(shop, light_run, out, arms=ARMS, seed=5), out


def test_every_peer_answers_and_personal_baskets_beat_popularity(report):
    figures, out = report
    arms = figures["arms"]
    assert all(arms[name]["ndcg@10"] > 0 and not arms[name]["fallbacks"] for name in ARMS)
    assert arms["tifu_knn"]["ndcg@10"] > 1.5 * arms["popular"]["ndcg@10"]
    assert arms["ease"]["ndcg@10"] > arms["popular"]["ndcg@10"]
    assert pl.read_parquet(out / "slates.parquet").filter(pl.col("arm") == "als")["rank"].max() == 100


def test_nothing_from_the_cut_on_is_seen(truncated, light_run, report, cut_us):
    _, out = report
    dataset = Dataset.open(truncated)
    peers = fit_peers(ARMS, dataset, light_run, cut_us, 5)
    queries, past = pl.read_parquet(out / "queries.parquet"), Past(dataset.event_batches())
    answers = asyncio.run(answer(light_run, ARMS, queries, past, k=100, task="all", seed=5, peers=peers))
    again = pl.concat([frame for a in answers.values() for frame in a.slates])
    assert again.equals(pl.read_parquet(out / "slates.parquet"))


def test_what_is_learnt_later_is_not_seen(learnt_late, light_run, report, tmp_path):
    _, out = report
    replay(learnt_late, light_run, tmp_path / "late", arms=["tifu_knn"], seed=5)
    expected = pl.read_parquet(out / "slates.parquet").filter(pl.col("arm") == "tifu_knn")
    assert pl.read_parquet(tmp_path / "late" / "slates.parquet").equals(expected)


def test_new_only_never_repeats_what_was_touched(shop, light_run, cut_us, tmp_path):
    replay(shop, light_run, tmp_path / "new", arms=["ease", "tifu_knn"], task="new-only")
    bought = Dataset.open(shop).events(before_us=cut_us).select("user_id", "item_id")
    bought = bought.filter(pl.len().over("user_id") <= 1_000)
    slates = pl.read_parquet(tmp_path / "new" / "slates.parquet")
    assert set(bought["user_id"]) & set(slates["user_id"])
    assert not len(slates.join(bought, on=["user_id", "item_id"]))


def test_a_missing_package_is_named(shop, light_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "implicit.als", None)
    with pytest.raises(BadInput, match=r"pip install 'double11\[peers\]'"):
        replay(shop, light_run, tmp_path / "out", arms=["als"])


def test_peers_know_one_cut_only(shop, light_run, tmp_path):
    with pytest.raises(BadInput, match="als"):
        replay(shop, light_run, tmp_path / "out", arms=["als"], protocol="online")
