import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from rank_lists_world import ITEMS, make_lists
from safetensors.torch import load_file

from recsys.core import CorruptData
from recsys.models.config import RankerConfig
from recsys.models.ranker import Calibration
from recsys.training import TrainingConfig, ranker_trainer
from recsys.training.loop import LossGuard
from recsys.training.rank_lists import RankLists, bit_of, heads_of
from recsys.training.ranker_trainer import (
    _swaps,
    calibrate,
    choose_priors,
    other_logits,
    score_lists,
    train_ranker,
)
from recsys.training.validation import calibration_error, list_measures, ndcg

CONFIG = TrainingConfig(ranker_epochs=15, ranker_batch_queries=8, ranker_steps_min=1, ranker_learning_rate=0.02)


def _train(lists, work=Path("unused"), seed=0, heads=("purchase",), dropout=0.0, **changes):
    config, model = dataclasses.replace(CONFIG, **changes), RankerConfig(dropout=dropout)
    return train_ranker(lists, ITEMS, heads=heads, config=config, model=model, seed=seed, work=work)


def test_it_learns_what_the_labels_follow():
    ranker = _train(make_lists())
    held_out = make_lists(seed=1)
    measures = list_measures(held_out, score_lists(ranker, held_out))
    assert measures["ndcg@10"] > 0.7 > 0.5 > measures["own_history_ndcg@10"]
    assert measures["candidates_recall"] == 1


def test_the_same_seed_gives_the_same_bits_and_another_one_others():
    lists = make_lists()
    first, again, other = (score_lists(_train(lists, seed=s, ranker_epochs=1), lists) for s in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_heads_learn_what_their_behaviour_follows():
    """Views follow a feature that purchases have nothing to do with."""
    ranker, held_out = _train(make_lists(), heads=("purchase", "view")), make_lists(seed=1)
    assert list_measures(held_out, score_lists(ranker, held_out))["ndcg@10"] > 0.7
    (viewed,) = other_logits(ranker, held_out).T
    place = viewed.argsort().argsort() / len(viewed)  # mean place of those that did: .5 is chance
    assert place[held_out.did("view")].mean() > 0.85
    assert place[held_out.did("purchase")].mean() == pytest.approx(0.5, abs=0.1)
    assert not held_out.did("cart").any()


def test_heads_that_share_no_gradient_leave_the_target_bit_for_bit():
    lists = make_lists()
    alone, beside, sharing = (
        score_lists(_train(lists, heads=heads, dropout=0.3, ranker_epochs=2, ranker_heads_share=share), lists)
        for heads, share in ((("purchase",), 1.0), (("purchase", "view"), 0.0), (("purchase", "view"), 1.0))
    )
    np.testing.assert_array_equal(beside, alone)
    assert not np.array_equal(sharing, alone)


def test_what_is_done_in_the_last_window_and_before_has_a_head():
    lists = make_lists()
    bought = dataclasses.replace(lists, acted=lists.acted & bit_of("purchase"))
    of_all = ~lists.new_only[lists.query_of_row()]
    assert heads_of([lists, lists], ("purchase",)) == ("purchase", "view")
    assert heads_of([lists, lists], ("view", "favorite", "cart", "purchase")) == ("any", "view", "purchase")
    assert heads_of([bought, bought, lists], ("purchase",)) == ("purchase",)  # nothing to learn views from
    assert heads_of([lists, bought], ("purchase",)) == ("purchase",)  # nothing to calibrate them on
    only_new = dataclasses.replace(lists, acted=np.where(of_all, 0, lists.acted).astype(np.uint8))
    assert heads_of([lists, only_new], ("cart", "purchase")) == ("cart+purchase",)
    assert heads_of([lists], ("purchase",)) == ("purchase",)


def test_the_prior_wins_where_the_ranker_learnt_nothing():
    lists = dataclasses.replace(make_lists(), names=("other", "retrieval_score", "noise"))
    untaught = _train(dataclasses.replace(lists, label=np.zeros(1200, bool)))
    untaught.priors = choose_priors(untaught, lists)
    assert [p.source for p in untaught.priors] == ["retrieval"]
    assert 0 < untaught.priors[0].weight < 64  # the smallest of those that are as good
    assert ndcg(lists, score_lists(untaught, lists)).mean() > 0.8
    assert choose_priors(untaught, dataclasses.replace(lists, names=("a", "b", "c"))) == ()


def test_own_history_counts_where_that_costs_nothing_that_could_be_measured():
    """Whatever the network learnt beside it may not last; a clearly worse order has a small say at most."""
    lists = dataclasses.replace(make_lists(), names=("own_history_score", "good", "noise"))
    taught = _train(lists)
    lists.values[:, 0] = -lists.values[:, 1]
    assert sum(prior.weight for prior in choose_priors(taught, lists)) < 8
    lists.values[:, 0] = lists.values[:, 1]
    untaught = _train(dataclasses.replace(lists, label=np.zeros(1200, bool)))
    assert choose_priors(untaught, lists)[0].weight >= 2


@pytest.mark.parametrize(("misled", "low", "high"), [(0, 64, 64), (12, 1, 8)])
def test_the_cart_counts_for_as_much_as_ordinary_days_allow(misled, low, high, monkeypatch):
    """In some of 40 lists another item than what is in the cart is bought; what is no cart's has no say."""
    rng = np.random.default_rng(0)
    monkeypatch.setattr(ranker_trainer, "_logits", lambda ranker, lists: 4 * lists.label.astype(np.float32))
    lists = dataclasses.replace(make_lists(), names=("own_history_score", "own_carts", "noise"))
    wrong = np.isin(lists.query_of_row(), np.flatnonzero(~lists.new_only)[:misled])
    lists.values[:, 0] = rng.random(len(lists.label))
    lists.values[:, 1] = np.where(wrong, ~lists.label, lists.label)
    (prior,) = choose_priors(_train(lists, ranker_epochs=1), lists)  # own history is left out then
    assert (prior.source, prior.among) == ("own_history", "own_carts")
    assert low <= prior.weight <= high
    any_action = _train(lists, ranker_epochs=1, heads=("any",))
    assert "own_carts" not in {prior.among for prior in choose_priors(any_action, lists)}
    lists.values[:, 1] = 0
    assert "own_carts" not in {prior.among for prior in choose_priors(_train(lists, ranker_epochs=1), lists)}


def test_each_task_has_the_prior_that_its_own_lists_want():
    """Retrieval's order is right where new items are asked for, and wrong elsewhere."""
    lists = dataclasses.replace(make_lists(queries=90), names=("retrieval_score", "good", "noise"))
    untaught = _train(dataclasses.replace(lists, label=np.zeros(1800, bool)))
    lists.values[:, 0] = np.where(lists.new_only[lists.query_of_row()], lists.values[:, 1], -lists.values[:, 1])
    (prior,) = choose_priors(untaught, lists)
    assert prior.weight == 0 < prior.fresh_weight
    (only_all,) = choose_priors(untaught, dataclasses.replace(lists, new_only=~lists.new_only).of_task(new_only=False))
    assert only_all.fresh_weight == 0 < only_all.weight


def test_the_lists_of_a_task_are_whole_and_those_of_both_are_all():
    lists = dataclasses.replace(make_lists(), num_relevant=np.arange(60))
    parts = [lists.of_task(new_only=new_only) for new_only in (False, True)]
    assert [len(part) for part in parts] == [40, 20]
    at = np.flatnonzero(lists.new_only)
    rows = (at[:, None] * 20 + np.arange(20)).ravel()
    np.testing.assert_array_equal(parts[1].label, lists.label[rows])
    np.testing.assert_array_equal(parts[1].values, lists.values[rows])
    np.testing.assert_array_equal(parts[1].acted, lists.acted[rows])
    assert (parts[1].num_relevant.tolist(), parts[1].user_id) == (at.tolist(), tuple(f"u{q}" for q in at))
    np.testing.assert_array_equal(parts[1].histories.item_key, lists.histories.take(at).item_key)
    both = RankLists.concat(parts)
    assert (len(both), both.offsets[-1], both.new_only.sum()) == (60, 1200, 20)
    assert len(parts[0].of_task(new_only=True)) == 0


def test_lists_of_new_items_are_learnt_from():
    """Where only they have anything to learn, too."""
    lists = make_lists()
    ranker = _train(dataclasses.replace(lists, label=lists.label & lists.new_only[lists.query_of_row()]))
    held_out = make_lists(seed=1)
    assert list_measures(held_out, score_lists(ranker, held_out))["ndcg@10"] > 0.6


def test_calibrated_probabilities_have_the_right_level_and_the_same_order():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=20_000).astype(np.float32)
    label = rng.random(20_000) < 1 / (1 + np.exp(-(0.5 * truth - 2)))
    found = calibrate(3 * truth + 1, label)
    assert found.slope == pytest.approx(0.5 / 3, rel=0.1)
    probability = 1 / (1 + np.exp(-(found.slope * (3 * truth + 1) + found.intercept)))
    assert probability.mean() == pytest.approx(label.mean(), rel=1e-2)
    np.testing.assert_allclose(found(3 * truth + 1), 0.5 * truth - 2, atol=0.2)
    assert calibrate(truth, np.zeros(20_000, bool)).slope == 1


def test_logits_that_say_the_contrary_keep_their_order():
    rng = np.random.default_rng(0)
    logit = 10 * rng.normal(size=20_000).astype(np.float32) + 5
    label = rng.random(20_000) < 1 / (1 + np.exp(3 + (logit - 5) / 10))
    score = calibrate(logit, label)(logit)
    assert (score[np.argsort(logit)[:-1:100]] < score[np.argsort(logit)[1::100]]).mean() > 0.9
    assert (1 / (1 + np.exp(-score))).mean() == pytest.approx(label.mean(), rel=1e-2)


def test_lists_in_which_nobody_acted_give_equal_finite_scores():
    lists = dataclasses.replace(make_lists(), label=np.zeros(1200, bool))
    assert np.isfinite(score_lists(_train(lists), lists)).all()


def test_saved_lists_come_back_whole(tmp_path):
    lists = make_lists(3)
    lists.save(tmp_path / "lists.safetensors")
    again = RankLists.load(tmp_path / "lists.safetensors")
    for name in ("values", "label", "acted", "item_key", "offsets", "new_only", "names", "user_id"):
        np.testing.assert_array_equal(getattr(again, name), getattr(lists, name))
    np.testing.assert_array_equal(again.histories.item_key, lists.histories.item_key)
    both = RankLists.concat([lists, again])
    assert (len(both), both.offsets[-1]) == (6, 120)


def test_a_loss_that_is_not_finite_stops_with_the_batch_saved(tmp_path):
    lists = make_lists()
    with pytest.raises(CorruptData, match="lower the learning rate"):
        _train(lists, work=tmp_path, ranker_learning_rate=10.0, ranker_weight_decay=10.0, ranker_epochs=200)
    (saved,) = tmp_path.glob("ranker-bad-batch-*.safetensors")
    assert load_file(saved)["values"].shape[1] == 3


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), 1e9])
def test_the_guard_names_step_and_file(tmp_path, loss):
    guard = LossGuard("tower", tmp_path)
    assert guard.check(torch.tensor(2.0), 0, {}) == 2
    with pytest.raises(CorruptData, match="tower-bad-batch-7"):
        guard.check(torch.tensor(loss), 7, {"rows": torch.arange(3)})
    assert load_file(tmp_path / "tower-bad-batch-7.safetensors")["rows"].tolist() == [0, 1, 2]


def test_ndcg_counts_what_was_not_found_as_a_miss():
    lists = dataclasses.replace(make_lists(2), num_relevant=np.array([1, 2]))
    perfect = lists.label.astype(np.float32)
    np.testing.assert_allclose(ndcg(lists, perfect), [1, 1 / (1 + 1 / np.log2(3))])


def test_swaps_count_what_they_would_change_in_ndcg():
    """One relevant row behind two others: each swap by its change of the discount, an empty place by nothing."""
    logit = torch.tensor([[1.0, 3.0, 2.0, -1e9]], requires_grad=True)
    (loss,) = _swaps(logit, torch.tensor([[1.0, 0.0, 0.0, 0.0]]), torch.tensor([[True, True, True, False]]))
    worth = [1.0, 1 / np.log2(3), 1 / np.log2(4)]
    expected = (worth[0] - worth[2]) * np.log1p(np.exp(2)) + (worth[1] - worth[2]) * np.log1p(np.exp(1))
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    torch.autograd.backward(loss)
    assert logit.grad is not None
    assert logit.grad[0, 0] < 0 < logit.grad[0, 2] < logit.grad[0, 1]
    assert logit.grad[0, 3] == 0


def test_large_data_is_seen_in_a_bounded_number_of_steps():
    """60 lists in batches of 8 are 8 steps an epoch; 20 steps allow two of the fifteen epochs."""
    few, two = (_train(make_lists(), **c) for c in ({"ranker_steps_max": 20}, {"ranker_epochs": 2}))
    for a, b in zip(few.net.parameters(), two.net.parameters(), strict=True):
        assert torch.equal(a, b)


def test_calibration_error_is_judged_on_lists_the_calibration_has_not_seen():
    """Logits that are true chances leave little; the same logits with the labels of nobody leave their mean."""
    lists, rng = make_lists(queries=2_000), np.random.default_rng(2)
    logit = rng.normal(-2, 1.5, len(lists.label)).astype(np.float32)
    true = dataclasses.replace(lists, label=rng.random(len(logit)) < 1 / (1 + np.exp(-logit)))
    assert calibration_error(true, logit, calibrate) < 0.01
    assert calibration_error(true, 10 * logit + 3, calibrate) < 0.01
    untrained = calibration_error(true, logit + 3, lambda *_: Calibration())
    assert untrained > 0.2
