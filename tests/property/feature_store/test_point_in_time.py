"""The join never shows a label what happened at its own time or later, or what was not known yet."""

import polars as pl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from feature_store.point_in_time import ViewFile, join, join_files

_VALUE = st.tuples(st.sampled_from("ab"), st.integers(0, 30), st.integers(0, 10), st.integers(0, 1_000))
_LABEL = st.tuples(st.sampled_from("ab"), st.integers(0, 40))


def frame_of(values):
    columns = {"entity": pl.String, "event_time": pl.Int64, "known_at": pl.Int64, "value": pl.Int64}
    return pl.DataFrame([(e, t, t + late, v) for e, t, late, v in values], schema=columns, orient="row")


def check(label_rows, values, max_age, found):
    """Against a plain search; where one value is as good as another, any of them will do."""
    for (entity, at), got in zip(label_rows, found, strict=True):
        usable = [v for v in values if v[0] == entity and v[1] + v[2] < at]
        newest = max((v[1] for v in usable), default=None)
        if newest is None or (max_age is not None and at - newest > max_age):
            assert got is None
        else:
            assert got in [v[3] for v in usable if v[1] == newest]


@settings(max_examples=60, deadline=None)
@given(st.lists(_VALUE, max_size=25), st.lists(_LABEL, min_size=1, max_size=25), st.none() | st.integers(0, 20))
def test_equals_a_plain_search(values, labels, max_age):
    left = pl.DataFrame(labels, schema={"entity": pl.String, "event_time": pl.Int64}, orient="row")
    joined = join(left, frame_of(values), by="entity", max_age_us=max_age)
    check(labels, values, max_age, joined["value"].to_list())


_LONG = st.sampled_from([0, 0, 0, 1 << 59, 1 << 61])  # times so far apart that few entities fit into a word


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(_VALUE, max_size=25),
    st.lists(_VALUE, max_size=25),
    st.lists(_LABEL, min_size=1, max_size=25),
    st.none() | st.integers(0, 20),
    st.integers(1, 9),
    _LONG,
)
def test_files_are_joined_alike_in_any_number_of_parts(tmp_path, one, other, labels, max_age, rows, late):
    labels = [(e, at + late * (i % 2)) for i, (e, at) in enumerate(labels)]
    left = pl.DataFrame(labels, schema={"entity": pl.String, "event_time": pl.Int64}, orient="row").with_row_index("n")
    # The second view is of another entity: the item of label n is always "i", its time in the label's.
    left = left.with_columns(item=pl.lit("i"))
    other = [("i", *v[1:]) for v in other]
    left.write_parquet(tmp_path / "labels.parquet")
    frame_of(one).write_parquet(tmp_path / "one.parquet")
    frame_of(other).rename({"entity": "item", "value": "other"}).write_parquet(tmp_path / "other.parquet")
    views = [
        ViewFile(path=tmp_path / "one.parquet", by="entity", max_age_us=max_age),
        ViewFile(path=tmp_path / "other.parquet", by="item"),
    ]
    out = tmp_path / "out.parquet"
    assert join_files(tmp_path / "labels.parquet", views, out, rows_in_memory=rows) == len(labels)
    found = pl.read_parquet(out).sort("n")
    assert found.select("entity", "event_time").rows() == labels
    check(labels, one, max_age, found["value"].to_list())
    check([("i", at) for _, at in labels], other, None, found["other"].to_list())
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 1_000), st.integers(1, 1_000))
def test_two_items_in_one_basket_do_not_see_each_other(before, at_basket):
    # A user's running count of purchases is a feature; both lines of the basket are purchases at time 100.
    values = pl.DataFrame({"user": ["u", "u", "u"], "event_time": [50, 100, 100], "count": [before, at_basket, 7]})
    labels = pl.DataFrame({"user": ["u", "u"], "item": ["x", "y"], "event_time": [100, 100]})
    assert join(labels, values, by="user")["count"].to_list() == [before, before]
