"""What a chat model is asked, and what its answers mean."""

from __future__ import annotations

import math

import numpy as np
import pytest

from llm_reranker.teachers import asking, parse
from llm_reranker.teachers.endpoint import Pace
from recsys.core import BadInput


@pytest.mark.parametrize(
    ("answer", "places"),
    [
        ("[2] > [1] > [3]", [1, 0, 2]),
        ('{"order": [3, 1, 2]}', [1, 2, 0]),
        ("The order is: 3, 3, 9, 1.", [1, 2, 0]),  # repeats and strangers passed over, the rest behind
        ("[1, 2, 3]", [0, 1, 2]),
        ("I cannot help with that.", None),
        ("[2]", None),  # one of three is no order
        ('{"answer": true}', None),
        ("Here is the order of all 3 items: [2] > [1] > [3]", [1, 0, 2]),
        ("Here is the order of all 3 items: 2, 1, 3", [1, 0, 2]),
        ("1. [2] lamp\n2. [1] tea for 3\n3. [3] shoe", [1, 0, 2]),
        ("1. [2]\n2. [1]\n3. [3]", [1, 0, 2]),
        ("I looked at [1] and [3] first.\n\n[2] > [1] > [3]", [1, 0, 2]),
        ("The items are [1], [2], [3]. Order: [2] > [1]", [1, 0, 2]),  # what is compared, not what is listed
        ("I considered 1, 2, 3 in turn. Final: 2, 1, 3", [1, 0, 2]),
        ("The shopper saw [1], [2], [3]; final: 2, 1, 3", [1, 0, 2]),
        ('{"order": [2, 1, 3]} because of 3, 1, 2, 7', [1, 0, 2]),
        ("Ranking: [2, 1, 3]\n[3] is no tea.", [1, 0, 2]),
        ("2 -> 1 -> 3", [1, 0, 2]),
        ("**[2]** → **[1]** → **[3]**", [1, 0, 2]),
        ("[2] >\n[1] >\n[3]", [1, 0, 2]),
        ("- 2\n- 1\n- 3", [1, 0, 2]),
        ("1. Item 3\n2. Item 1\n3. Item 2", None),  # numbers of lines and of items, and no telling which
        ('```json\n{"order": [2, 1, 3]}\n```', [1, 0, 2]),
        ("<think>3 purchases, 1 day ago; [3] fits.</think>\n[2] > [1] > [3]", [1, 0, 2]),
        ("3 purchases; [3] fits.</think>[2] > [1] > [3]", [1, 0, 2]),
        ("<think>3 purchases; let me look at [1], [2] and [3]", None),  # cut off
        ("The iPhone 3 and 1 lamp.", None),
        ("[1e999, 2, 1]", [1, 0, 2]),
        ("[2] > " + "1" * 5000, None),
        ("[" * 100_000, None),
        (" ".join(["9"] * 50_000), None),
        ("", None),
    ],
)
def test_an_order_is_read_from_whatever_a_model_says(answer: str, places: list[int] | None) -> None:
    read = asking.read_order(answer, 3)
    assert (None if read is None else read.tolist()) == places


def test_places_of_several_orders_become_log_odds() -> None:
    whole, half = np.arange(4), np.array([0, 1])
    one = asking.borda([(whole, np.array([0, 1, 2, 3]))], 4)
    assert np.all(np.diff(one) < 0)
    assert one == pytest.approx(-one[::-1])
    both = asking.borda([(whole, np.array([0, 1, 2, 3])), (whole, np.array([3, 2, 1, 0]))], 4)
    assert both == pytest.approx(np.zeros(4), abs=1e-6)
    assert np.isnan(asking.borda([(half, half)], 4)).tolist() == [False, False, True, True]
    assert np.isnan(asking.borda([], 2)).all()


@pytest.mark.parametrize(
    ("answer", "top", "low", "high"),
    [
        ("Yes", {"Yes": -0.1, " yes": -3.0, "No": -2.5}, 2.4, 2.6),
        ("No", {"No": -0.1, "Maybe": -2.0}, -9.91, -9.89),  # yes is not among the likeliest
        ("yes, surely", None, 2, 2),
        ("no", None, -2, -2),
        ("<think>Yes? The lamp is dear.</think>\n\nno", {"<think>": -0.1, "yes": -3.0}, -2, -2),
    ],
)
def test_yes_and_no_become_log_odds(answer: str, top: dict[str, float] | None, low: float, high: float) -> None:
    assert low <= asking.read_yes_no(answer, top) <= high


def test_an_answer_that_is_neither_is_of_no_use() -> None:
    assert math.isnan(asking.read_yes_no("A cup.", {"A": -0.1}))
    assert math.isnan(asking.read_yes_no("", None))


def test_titles_stay_on_their_line_and_history_is_bounded() -> None:
    messages = asking.listwise("view 1d: a\n" * 50, ["cup\n[9] fake", ""], lines_max=3)
    lines = messages[1]["content"].split("\n")
    assert lines.count("view 1d: a") == 3
    assert "[1] cup [9] fake" in lines
    assert "[2] (no text)" in lines


def test_teachers_have_names() -> None:
    assert parse("qwen3-moe") == ("qwen3-moe", "")
    assert parse("hf:/models/a:b") == ("hf", "/models/a:b")
    assert parse("openai:qwen3-max") == ("openai", "qwen3-max")
    for wrong in ("gpt-99", "openai:", "hf", "qwen3-moe:x"):
        with pytest.raises(BadInput, match="--teacher"):
            parse(wrong)


async def test_requests_are_spread_over_the_minute() -> None:
    waited: list[float] = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)

    pace = Pace(120, sleep)
    for now_s in (100.0, 100.0, 100.1, 103.0):
        await pace.turn(now_s)
    assert waited == pytest.approx([0.5, 0.9])
