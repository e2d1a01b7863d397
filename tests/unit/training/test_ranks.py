"""Ranks of one host keep to cores of their own while they train, and share them all again afterwards."""

import os

import pytest
import torch

from recsys.training.ranks import Ranks


def _rank(rank: int, size: int) -> Ranks:
    return Ranks(rank, size, size, torch.device("cpu"), None)


def test_ranks_share_the_cores_out_and_give_them_back():
    cores = os.sched_getaffinity(0)
    of_rank = []
    for rank in range(2):
        with _rank(rank, 2).own_cores():
            of_rank.append(os.sched_getaffinity(0))
        assert os.sched_getaffinity(0) == cores
    assert of_rank[0] | of_rank[1] == cores
    assert len(cores) == 1 or not of_rank[0] & of_rank[1]  # on one core they stay together


@pytest.mark.parametrize("size", [1, 100_000])
def test_one_rank_and_more_ranks_than_cores_are_left_alone(size):
    cores = os.sched_getaffinity(0)
    with _rank(0, size).own_cores():
        assert os.sched_getaffinity(0) == cores
