"""The join never shows a label what happened at its own time or later, or what was not known yet."""

import polars as pl
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_store.point_in_time import join

_VALUE = st.tuples(st.sampled_from("ab"), st.integers(0, 30), st.integers(0, 10), st.integers(0, 1_000))
_LABEL = st.tuples(st.sampled_from("ab"), st.integers(0, 40))


def frame_of(values):
    columns = {"entity": pl.String, "event_time": pl.Int64, "known_at": pl.Int64, "value": pl.Int64}
    return pl.DataFrame([(e, t, t + late, v) for e, t, late, v in values], schema=columns, orient="row")


@settings(max_examples=200, deadline=None)
@given(st.lists(_VALUE, max_size=25), st.lists(_LABEL, min_size=1, max_size=25), st.none() | st.integers(0, 20))
def test_equals_a_plain_search(values, labels, max_age):
    left = pl.DataFrame(labels, schema={"entity": pl.String, "event_time": pl.Int64}, orient="row")
    joined = join(left, frame_of(values), by="entity", max_age_us=max_age)
    for (entity, at), got in zip(labels, joined["value"].to_list(), strict=True):
        usable = [v for v in values if v[0] == entity and v[1] + v[2] < at]
        newest = max((v[1] for v in usable), default=None)
        if newest is None or (max_age is not None and at - newest > max_age):
            assert got is None
        else:
            assert got in [v[3] for v in usable if v[1] == newest]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 1_000), st.integers(1, 1_000))
def test_two_items_in_one_basket_do_not_see_each_other(before, at_basket):
    # A user's running count of purchases is a feature; both lines of the basket are purchases at time 100.
    values = pl.DataFrame({"user": ["u", "u", "u"], "event_time": [50, 100, 100], "count": [before, at_basket, 7]})
    labels = pl.DataFrame({"user": ["u", "u"], "item": ["x", "y"], "event_time": [100, 100]})
    assert join(labels, values, by="user")["count"].to_list() == [before, before]
