"""Label files: whole parts, resumable, of one teacher and of the texts it read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from llm_reranker.lists import Lists, read
from llm_reranker.teachers.base import Judgement
from llm_reranker.teachers.labels import Kept, LabelFile
from recsys.core import Conflict, CorruptData, Unavailable


class Counting:
    """A teacher that says how long a text is, and breaks after `breaks_after` lists."""

    name, fitted = "counting", False

    def __init__(self, breaks_after: int = 1_000) -> None:
        self.asked: list[int] = []
        self._breaks_after = breaks_after

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"name": self.name}

    def label(
        self, lists: Lists, queries: Sequence[int], rows: Sequence[npt.NDArray[np.int64]]
    ) -> Iterator[tuple[int, Judgement]]:
        for at, (query, part) in enumerate(zip(queries, rows, strict=True)):
            if len(self.asked) == self._breaks_after:
                raise Unavailable("teacher", came="nothing", expected="an answer", fix="Again.")
            self.asked.append(query)
            scores = np.array([len(lists.item_text[r]) for r in part], np.float32)
            scores[0] = np.nan  # of no use
            yield at, Judgement(log_odds=scores, prompt="how long?", cost_usd=0.5)


@pytest.fixture
def lists(world: ModuleType, tmp_path: Path) -> Lists:
    return read(world.write_lists(tmp_path / "lists.parquet", queries=50, candidates=4))


def ask(kept: Kept, lists: Lists, queries: Sequence[int]) -> dict[int, list[float]]:
    rows = [lists.rows(q) for q in queries]
    return {queries[at]: j.log_odds.tolist() for at, j in kept.label(lists, queries, rows)}


def test_a_run_that_broke_off_goes_on_where_it_was(lists: Lists, tmp_path: Path) -> None:
    queries = list(range(50))
    with pytest.raises(Unavailable):
        ask(Kept(Counting(40), LabelFile(tmp_path / "l", "counting")), lists, queries)
    file = LabelFile(tmp_path / "l", "counting")
    assert len(file) == 160
    teacher = Counting()
    said = ask(kept := Kept(teacher, file), lists, queries)
    assert teacher.asked == queries[40:]
    assert kept.facts["lists"] == {"reused": 40, "made": 10}
    whole = ask(Kept(Counting(), LabelFile(tmp_path / "other", "counting")), lists, queries)
    assert sorted(said) == queries
    for q in queries:
        np.testing.assert_array_equal(said[q], whole[q])  # NaN, of no use, is remembered too


@pytest.mark.parametrize(("list_s", "kept"), [(10.0, 40), (0.0, 32)])
def test_a_run_that_was_killed_keeps_every_list_that_took_its_time(
    list_s: float, kept: int, lists: Lists, tmp_path: Path
) -> None:
    now_s = 0.0
    labelling = Kept(Counting(), LabelFile(tmp_path / "l", "counting", clock=lambda: now_s)).label(
        lists, range(50), [lists.rows(q) for q in range(50)]
    )
    for _ in range(40):
        now_s += list_s
        next(labelling)
    assert len(LabelFile(tmp_path / "l", "counting")) == 4 * kept  # nothing has been closed
    labelling.close()
    assert len(LabelFile(tmp_path / "l", "counting")) == 160
    assert len(list((tmp_path / "l").iterdir())) == 2


def test_a_part_that_was_being_written_when_the_power_went_is_no_part(lists: Lists, tmp_path: Path) -> None:
    ask(Kept(Counting(), LabelFile(tmp_path / "l", "counting")), lists, [0, 1])
    whole = next((tmp_path / "l").glob("*.parquet"))
    whole.with_name("part-000001-0badcafe.tmp").write_bytes(whole.read_bytes()[:50])
    teacher = Counting()
    ask(Kept(teacher, LabelFile(tmp_path / "l", "counting")), lists, [0, 1, 2])
    assert teacher.asked == [2]
    assert len(list((tmp_path / "l").glob("*.parquet"))) == 2


def test_other_texts_are_asked_about_again(lists: Lists, tmp_path: Path) -> None:
    ask(Kept(Counting(), LabelFile(tmp_path / "l", "counting")), lists, [0, 1])
    lists.item_text[int(lists.rows(1)[2])] += " in blue"
    teacher = Counting()
    ask(Kept(teacher, LabelFile(tmp_path / "l", "counting")), lists, [0, 1])
    assert teacher.asked == [1]


def test_labels_of_another_teacher_and_damaged_parts_are_refused(lists: Lists, tmp_path: Path) -> None:
    ask(Kept(Counting(), LabelFile(tmp_path / "l", "counting")), lists, [0])
    with pytest.raises(Conflict, match="made by counting"):
        LabelFile(tmp_path / "l", "reading")
    part = next((tmp_path / "l").glob("*.parquet"))
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(CorruptData, match="part-"):
        LabelFile(tmp_path / "l", "counting")
