import numpy as np
import pytest
import torch

from recsys.core import BadInput
from recsys.models.history import Histories
from recsys.models.jagged import Jagged, keyed, padded


def test_ranges_are_the_slices_of_the_column():
    column = np.arange(10) * 10
    found = Jagged.from_ranges(column, np.array([2, 5, 7]), np.array([4, 5, 10]))
    assert found.values.tolist() == [20, 30, 70, 80, 90]
    assert found.lengths.tolist() == [2, 0, 3]


def test_keyed_features_keep_their_lists():
    kjt = keyed(
        {
            "a": Jagged.from_lists([np.array([1, 2]), np.array([3])]),
            "b": Jagged.from_lists([np.empty(0, int), np.array([4])]),
        }
    )
    assert kjt["a"].to_dense()[0].tolist() == [1, 2]
    assert kjt["b"].lengths().tolist() == [0, 1]


def test_lengths_that_do_not_sum_are_refused():
    with pytest.raises(BadInput, match="lengths"):
        Jagged(np.array([1, 2, 3]), np.array([1, 1], np.int32))


def test_features_of_other_sizes_are_refused():
    one, two = Jagged.from_lists([np.array([1])]), Jagged.from_lists([np.array([1]), np.array([2])])
    with pytest.raises(BadInput, match="as many lists"):
        keyed({"a": one, "b": two})


def test_padding_puts_values_first_and_marks_them():
    dense, mask = padded(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([2, 0, 1]))
    assert dense.squeeze(-1).tolist() == [[1, 2], [0, 0], [3, 0]]
    assert mask.tolist() == [[True, True], [False, False], [True, False]]
    assert padded(torch.empty(0, 4), torch.tensor([0]))[0].shape == (1, 1, 4)


def test_last_keeps_the_newest_and_age_is_logarithmic():
    second = 1_000_000
    histories = Histories.from_lists(
        [np.array([1, 2, 3]), np.array([9])],
        [np.array([2, 2, 5], np.int8), np.array([5], np.int8)],
        [np.array([0, 7, 8]) * second, np.array([8]) * second],
        [8 * second, 7 * second],
    )
    used = histories.last(2)
    assert used.item_key.tolist() == [2, 3, 9]
    assert used.age_bucket().tolist() == [1, 0, 0]  # an age is never negative
    assert histories.take(np.array([1, 0])).item_key.tolist() == [9, 1, 2, 3]
