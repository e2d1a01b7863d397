import dataclasses

import numpy as np
import pytest
from rank_lists_world import make_lists

from recsys.candidates.fusion import fuse
from recsys.core import Candidates
from recsys.pipeline import Feed
from recsys.training.fusion import learn_fusion

FEEDS = (
    Feed(source="own_history", quota=9, absolute=True),
    Feed(source="good", quota=9, weight=0.3),
    Feed(source="noise", quota=9, weight=1.0),
    Feed(source="unknown", quota=9, weight=0.4),
)


def sources(queries=120, **changes):
    lists = make_lists(queries)
    return dataclasses.replace(lists, names=("own_history_score", "good_score", "noise_score"), **changes)


def hits_at_1(lists, weights):
    """Share of lists whose first item, by `fuse`, is relevant."""
    first = []
    for start, stop in zip(lists.offsets[:-1], lists.offsets[1:], strict=True):
        names = tuple(name.removesuffix("_score") for name in lists.names)
        found = Candidates(
            item_key=lists.item_key[start:stop],
            source_bits=np.zeros(stop - start, np.uint32),
            scores=lists.values[start:stop],
            source_names=names,
            score_names=names,
        )
        first.append(lists.label[start:stop][np.argmax(fuse(found, weights, ["own_history"]))])
    return np.mean(first)


def test_what_a_source_is_worth_is_learnt_for_lists_never_seen():
    feeds = {f.source: f.weight for f in FEEDS}
    learnt = learn_fusion([sources()], FEEDS)
    unseen = dataclasses.replace(make_lists(60, seed=9), names=sources().names)
    for weights in (learnt.all, learnt.new_only):
        assert weights["good"] > 5 * weights["noise"]
        assert hits_at_1(unseen, weights) > 0.6 > 0.2 > hits_at_1(unseen, feeds)


def test_weights_keep_their_sum_and_who_was_not_asked_keeps_the_feeds():
    learnt = learn_fusion([sources()], FEEDS)
    assert sum(learnt.all.values()) == pytest.approx(sum(f.weight for f in FEEDS))
    assert learnt.all["unknown"] == learnt.new_only["unknown"] == 0.4
    assert min(learnt.all.values()) >= 0


def test_without_a_hit_nothing_is_learnt():
    none = sources(label=np.zeros(120 * 20, bool))
    feeds = {f.source: f.weight for f in FEEDS}
    assert learn_fusion([none], FEEDS).all == feeds


def test_few_lists_change_less():
    own = {f.source: f.weight for f in FEEDS}
    moved = [
        sum(abs(learn_fusion([sources(queries)], FEEDS).all[name] - own[name]) for name in own) for queries in (3, 300)
    ]
    assert 0 < moved[0] < moved[1]


def test_each_task_has_weights_of_its_own():
    lists = sources()
    swapped = lists.values.copy()
    new = lists.new_only[lists.query_of_row()]
    swapped[new] = swapped[new][:, [0, 2, 1]]
    learnt = learn_fusion([dataclasses.replace(lists, values=swapped)], FEEDS)
    assert learnt.all["good"] > 5 * learnt.all["noise"]
    assert learnt.new_only["noise"] > learnt.new_only["good"]


def said_of_history(lists, relevant, others):
    """`lists` whose relevant rows the user had bought on `relevant` days, and one other row of each on `others`."""
    values = np.nan_to_num(lists.values)
    values[:, 0] = np.where(lists.label, relevant, 0)
    values[np.arange(len(lists)) * 20 + np.roll(lists.label.reshape(-1, 20).argmax(axis=1), 1), 0] += others
    return dataclasses.replace(lists, values=values)


def test_own_history_counts_for_as_much_as_does_no_harm():
    one_in_three = np.repeat(np.arange(120) % 3 == 0, 20)
    harmless = learn_fusion([said_of_history(sources(), one_in_three, 0)], FEEDS)
    assert harmless.all["own_history"] == 8 > 1 > harmless.new_only["own_history"]  # where it says nothing
    assert learn_fusion([said_of_history(sources(), 0, 1)], FEEDS).all["own_history"] < 0.5
