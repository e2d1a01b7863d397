"""Which lists judge a task: its own, and none where it has none."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from llm_reranker.lists import Lists, read
from llm_reranker.splits import held, split, task_of
from recsys.core import BadInput


@pytest.fixture(name="lists")
def lists_fixture(world: ModuleType, tmp_path: Path) -> Lists:
    return read(world.write_lists(tmp_path / "l.parquet", queries=120))


def test_each_task_is_judged_on_its_own_lists_and_both_are_learnt_from(world: ModuleType, lists: Lists) -> None:
    parts = split(lists, world.TINY, seed=0)
    last = lists.query_time_us.max()
    for task, queries in parts.validation.items():
        assert queries
        assert {task_of(lists, q) for q in queries} == {task}
        assert (lists.query_time_us[queries] == last).all()
    assert {task_of(lists, q) for q in parts.train} == {"all", "new-only"}
    assert (lists.query_time_us[parts.train] < last).all()


def test_a_task_without_lists_of_its_own_has_no_say(world: ModuleType, lists: Lists) -> None:
    only_all = dataclasses.replace(lists, new_only=np.zeros(len(lists), np.bool_))
    parts = split(only_all, world.TINY, seed=0)
    assert parts.validation["new-only"] == []
    assert held(only_all, [], world.TINY.depth).weight([], seed=0) == 0
    judged = held(only_all, parts.validation["all"], world.TINY.depth)
    assert judged.weight([10 * label for label in judged.label], seed=0) > 0
    with pytest.raises(BadInput, match="task all"):
        split(dataclasses.replace(lists, new_only=~only_all.new_only), world.TINY, seed=0)
