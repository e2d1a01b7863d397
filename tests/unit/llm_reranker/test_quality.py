"""NDCG, calibration and the choice of the blend weight."""

from __future__ import annotations

import numpy as np
import pytest

from llm_reranker.quality import beside, choose_weight, ece, ndcg, platt


def test_ndcg_by_hand() -> None:
    score, label = np.array([3, 2, 1, 0], np.float32), np.array([0, 1, 0, 1], np.float32)
    expected = (1 / np.log2(3) + 1 / np.log2(5)) / (1 + 1 / np.log2(3))
    assert ndcg([score], [label]).tolist() == [pytest.approx(expected)]
    assert ndcg([score], [np.zeros(4, np.float32)]).size == 0
    assert ndcg([-score], [np.ones(4, np.float32)])[0] == 1


@pytest.mark.parametrize(("strength", "lowest", "highest"), [(0.0, 0.0, 0.0), (2.0, 0.3, 1.0)])
def test_the_reranker_gets_a_say_only_where_it_adds(strength: float, lowest: float, highest: float) -> None:
    rng = np.random.default_rng(0)
    rank, rerank, labels = [], [], []
    for _ in range(150):
        a, b = rng.normal(size=(2, 20)).astype(np.float32)
        labels.append((rng.random(20) < 1 / (1 + np.exp(2 - a - strength * b))).astype(np.float32))
        rank.append(a)
        rerank.append(a * 0.3 + b)
    assert lowest <= choose_weight(rank, rerank, labels, seed=0) <= highest


def test_a_handful_of_lists_gives_no_say() -> None:
    rank, label = np.array([2, 1, 0], np.float32), np.array([0, 0, 1], np.float32)
    for lists, say in ((1, 0.0), (5, 0.0), (6, 0.6)):
        assert choose_weight([rank] * lists, [-rank] * lists, [label] * lists, seed=0) == say


def test_platt_finds_the_calibration_and_ece_sees_it() -> None:
    rng = np.random.default_rng(1)
    raw = rng.normal(size=20_000).astype(np.float32) * 3
    label = (rng.random(20_000) < 1 / (1 + np.exp(-(0.5 * raw - 1)))).astype(np.float32)
    scale, bias = platt(raw, label)
    assert (scale, bias) == (pytest.approx(0.5, abs=0.05), pytest.approx(-1, abs=0.1))
    assert ece((scale * raw + bias).astype(np.float32), label) < 0.02 < ece(raw, label)
    assert ece(1e4 * (2 * label - 1), label) == 0  # however sure


def test_platt_never_turns_the_order_round() -> None:
    raw = np.linspace(-2, 2, 200).astype(np.float32)
    assert platt(raw, (raw < 0).astype(np.float32)) == (1.0, 0.0)
    assert platt(raw, np.zeros(200, np.float32))[0] > 0


@pytest.mark.parametrize("unit", [1e-3, 1.0, 1e3])
def test_what_a_teacher_adds_to_the_ranker_is_found_on_any_scale(unit: float) -> None:
    rng = np.random.default_rng(2)
    rank, said = rng.normal(size=(2, 20_000)).astype(np.float32)
    label = (rng.random(20_000) < 1 / (1 + np.exp(1 - 0.8 * rank - 0.4 * said))).astype(np.float32)
    a, b, bias = beside(rank, (unit * said).astype(np.float32), label)
    assert (a, b * unit, bias) == pytest.approx((0.8, 0.4, -1), abs=0.05)
    a, b, bias = beside(rank, np.full(20_000, unit, np.float32), label)  # nothing said: the ranker's calibration
    assert (a, b * unit + bias) == pytest.approx(platt(rank, label), abs=0.01)
