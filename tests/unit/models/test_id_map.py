"""Ten times more ids than rows stream by: memory stays, the frequent keep their rows, what is saved comes back."""

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from recsys.core import key
from recsys.models.id_map import IdMap

ROWS = 100
FREQUENT = np.array([key(f"hot {i}") for i in range(40)], np.int64)


def stream(ids, batches=20, seed=0):
    """Batches in which the frequent keys come often and 50 others once; 1,000 others in all."""
    rng = np.random.default_rng(seed)
    evicted = []
    for number in range(batches):
        rare = np.array([key(f"rare {number}-{i}") for i in range(50)], np.int64)
        batch = rng.permutation(np.concatenate([np.repeat(FREQUENT, 5), rare]))
        evicted.append(ids.observe(batch))
    return evicted


def test_ten_times_more_ids_than_rows_leave_the_frequent_their_rows_and_memory_bounded():
    ids = IdMap(ROWS)
    sizes = {n: t.numel() for n, t in ids.state().items()}
    stream(ids, batches=1)
    first = ids.rows(FREQUENT)
    evicted = stream(ids)
    assert sizes == {n: t.numel() for n, t in ids.state().items()}
    rows = ids.rows(FREQUENT)
    np.testing.assert_array_equal(rows, first)
    assert len(np.unique(rows)) == len(FREQUENT)
    assert rows.min() >= 1
    assert rows.max() <= ROWS
    assert any(len(given) for given in evicted)
    assert not any(np.isin(rows, given).any() for given in evicted)
    assert (ids.rows(np.array([key("rare 0-0"), key("never seen")], np.int64)) == 0).all()


def test_admission_keeps_out_what_comes_once():
    ids = IdMap(ROWS, admission_count=2)
    stream(ids)
    assert (ids.rows(np.array([key(f"rare 19-{i}") for i in range(50)], np.int64)) == 0).all()
    assert (ids.rows(FREQUENT) > 0).all()


@pytest.mark.parametrize("count", [1, 200_000])
def test_batches_of_any_size_are_counted_whole(count):
    ids = IdMap(ROWS)
    ids.observe(np.full(1, 7, np.int64))
    ids.observe(np.arange(count, dtype=np.int64) % 50 + 1_000)
    assert (ids.rows(np.arange(1_000, 1_000 + min(count, 50), dtype=np.int64)) > 0).all()


def test_it_is_saved_without_pickle_and_goes_on_as_before(tmp_path):
    ids, again = IdMap(ROWS), IdMap(ROWS)
    stream(ids)
    save_file(ids.state(), tmp_path / "ids.safetensors")
    again.restore(load_file(tmp_path / "ids.safetensors"))
    np.testing.assert_array_equal(again.rows(FREQUENT), ids.rows(FREQUENT))
    for one, other in zip(stream(ids, seed=1), stream(again, seed=1), strict=True):
        np.testing.assert_array_equal(one, other)
