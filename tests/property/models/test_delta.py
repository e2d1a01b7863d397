import numpy as np
import pytest
import torch
from double11.v1 import delta_pb2
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from recsys.candidates.rows import FreshRows
from recsys.core import BadInput, CorruptData, VersionMismatch
from recsys.core.index_rows import IndexRows
from recsys.models.delta import UNKNOWN_KEY, DeltaTarget, ModelDelta, Rows, decode, encode
from recsys.models.embeddings import Vocabulary
from recsys.serving.deltas import decoded

KEYS = np.array([7, 3, 2**63 - 1, 11, 5], np.int64)
DIM = 3
finite = st.floats(-1e6, 1e6, width=32)


def _target():
    return DeltaTarget("r", {"item": (Vocabulary(KEYS), torch.zeros(6, DIM))}, {"w": torch.zeros(2, 2)})


@st.composite
def deltas(draw, sequence=1):
    keys = np.array(draw(st.lists(st.sampled_from([*KEYS.tolist(), UNKNOWN_KEY]), unique=True)), np.int64)
    values = draw(hnp.arrays(np.float32, (len(keys), DIM), elements=finite))
    dense = draw(hnp.arrays(np.float32, (2, 2), elements=finite))
    return ModelDelta(
        run_id="r", sequence=sequence, tables={"item": Rows(keys, values)}, dense={"w": dense}, samples_until_us=5
    )


@given(delta=deltas(), part_bytes_max=st.integers(1, 200), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_parts_in_any_order_give_the_delta_back(delta, part_bytes_max, seed):
    parts = encode(delta, part_bytes_max=part_bytes_max)
    order = np.random.default_rng(seed).permutation(len(parts))
    again = decode([parts[i] for i in order] + parts[:1])
    np.testing.assert_array_equal(again.dense["w"], delta.dense["w"])
    found = again.tables.get("item", Rows(np.empty(0, np.int64), np.empty((0, DIM), np.float32)))
    np.testing.assert_array_equal(found.keys, delta.tables["item"].keys)
    np.testing.assert_array_equal(found.values, delta.tables["item"].values)
    assert (again.run_id, again.sequence, again.samples_until_us) == ("r", 1, 5)


@given(first=deltas(), second=deltas(sequence=2), part_bytes_max=st.integers(1, 200))
@settings(deadline=None, max_examples=40)
def test_offered_in_order_with_repeats_it_applies_once_and_whole(first, second, part_bytes_max):
    target = _target()
    messages = encode(first, part_bytes_max=part_bytes_max)
    done = [target.offer(m) for m in messages]
    assert done == [False] * (len(messages) - 1) + [True]
    once = target.tables["item"][1].clone()
    assert not any(target.offer(m) for m in messages)
    assert torch.equal(target.tables["item"][1], once)
    vocabulary, weight = target.tables["item"]
    np.testing.assert_array_equal(weight[vocabulary.rows(first.tables["item"].keys)], first.tables["item"].values)
    assert target.apply(second)
    assert target.sequence == 2
    np.testing.assert_array_equal(target.dense["w"], second.dense["w"])


def _delta(**changes):
    fields = {
        "run_id": "r", "sequence": 1, "tables": {"item": Rows(KEYS[:2], np.ones((2, DIM), np.float32))},
        "dense": {"w": np.ones((2, 2), np.float32)},
    }  # fmt: skip
    return ModelDelta(**(fields | changes))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"sequence": 2}, VersionMismatch),
        ({"run_id": "other"}, VersionMismatch),
        ({"tables": {"item": Rows(KEYS[:2], np.ones((2, DIM + 1), np.float32))}}, VersionMismatch),
        ({"tables": {"brand": Rows(KEYS[:2], np.ones((2, DIM), np.float32))}}, VersionMismatch),
        ({"tables": {"item": Rows(np.array([99]), np.ones((1, DIM), np.float32))}}, VersionMismatch),
        ({"dense": {"w": np.ones(4, np.float32)}}, VersionMismatch),
        ({"dense": {"w": np.full((2, 2), np.nan, np.float32)}}, BadInput),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_changes(changes, error):
    target = _target()
    (message,) = encode(_delta(**changes))
    with pytest.raises(error):
        target.offer(message)
    assert not target.tables["item"][1].any()
    assert not target.dense["w"].any()
    assert target.sequence == 0


def test_bytes_that_are_no_delta_are_refused():
    with pytest.raises(CorruptData):
        _target().offer(b"\xff\xff\xff")
    whole = encode(_delta(), part_bytes_max=1)
    with pytest.raises(CorruptData, match="parts"):
        decode(whole[:-1])


@st.composite
def index_rows(draw):
    num = np.array(draw(st.lists(st.integers(0, 5), max_size=12)), np.int64)
    key = draw(hnp.arrays(np.int64, len(num), elements=st.integers(0, 2**63 - 1), unique=True))
    entry_key = draw(hnp.arrays(np.int64, int(num.sum()), elements=st.integers(0, 2**63 - 1)))
    score = draw(hnp.arrays(np.float32, len(entry_key), elements=finite))
    return IndexRows(key=key, num=num, entry_key=entry_key, score=score)


@given(rows=index_rows(), part_bytes_max=st.integers(1, 200))
@settings(deadline=None, max_examples=60)
def test_rows_of_indexes_travel_in_parts_and_are_no_business_of_the_models(rows, part_bytes_max):
    delta = ModelDelta(
        run_id="r", sequence=1, tables={}, dense={"w": np.ones((2, 2), np.float32)}, index_rows={"x": rows}
    )
    parts = encode(delta, part_bytes_max=part_bytes_max)
    fresh, target = FreshRows(), _target()
    for message in parts:
        for some in delta_pb2.Delta.FromString(message).index_rows:
            fresh.put(some.index, decoded(some))
        target.offer(message)
    stop = np.cumsum(rows.num)
    assert set(fresh.of("x")) == set(rows.key.tolist())
    for item, begin, end in zip(rows.key.tolist(), stop - rows.num, stop, strict=True):
        np.testing.assert_array_equal(fresh.of("x")[item][0], rows.entry_key[begin:end])
        np.testing.assert_array_equal(fresh.of("x")[item][1], rows.score[begin:end])
    assert target.sequence == 1
