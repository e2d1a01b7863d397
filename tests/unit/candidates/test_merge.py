"""Merge and fuse: one row per item, everybody's opinion on it."""

import numpy as np

from recsys.candidates.fusion import fuse
from recsys.candidates.merge import merge


def test_union_with_bits_and_every_sources_score(shop):
    a = shop.candidates([5, 3, 1], [0.9, 0.8, 0.7], "a")
    b = shop.candidates([3, 9, 5], [30, 20, 10], "b")
    union = merge([a, b], {"a": 2, "b": 2})
    assert union.item_key.tolist() == [3, 5, 9]
    assert [union.sources_of(row) for row in range(3)] == [("a", "b"), ("a",), ("b",)]
    np.testing.assert_allclose(union.score("a"), [0.8, 0.9, np.nan])
    np.testing.assert_allclose(union.score("b"), [30, 10, 20], err_msg="b's opinion on 5 is known beyond its quota")


def test_nothing_merged_is_nothing():
    assert len(merge([], {})) == 0


def test_a_silent_source_leaves_its_column(shop):
    union = merge([shop.candidates([1], name="a"), shop.candidates([], name="b")], {"a": 5, "b": 5})
    assert union.score_names == ("a", "b")
    assert np.isnan(union.score("b")).all()


def test_all_silent(shop):
    assert len(merge([shop.candidates([], name="a"), shop.candidates([], name="b")], {"a": 5, "b": 5})) == 0


def test_relative_scores_share_a_scale_and_absolute_ones_keep_theirs(shop):
    union = merge(
        [shop.candidates([1, 2, 3], [1000, 500, 0], "a"), shop.candidates([3], [3], "own")], {"a": 9, "own": 9}
    )
    np.testing.assert_allclose(fuse(union, {"a": 0.5, "own": 1.0}, ["own"]), [0.5, 0.25, 2.0])


def test_a_source_that_says_one_thing_counts_as_full(shop):
    union = merge([shop.candidates([1, 2], [7, 7], "a")], {"a": 9})
    np.testing.assert_allclose(fuse(union, {"a": 0.5}), [0.5, 0.5])


def test_fuse_ignores_what_is_not_there(shop):
    np.testing.assert_allclose(fuse(shop.candidates([1], name="a"), {"missing": 1.0}), [0.0])
