"""An OpenAI-compatible endpoint as teacher, against llama.cpp's server with a small chat model."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import polars as pl
import pytest
from chat_world import KEY, THROTTLED, Said, chat_server, front

from llm_reranker.config import TeacherConfig
from llm_reranker.lists import Lists, read
from llm_reranker.teachers.base import Judgement, Teacher
from llm_reranker.teachers.endpoint import EndpointTeacher
from llm_reranker.teachers.labels import Kept, LabelFile
from recsys.core import BadInput, Overloaded, Unavailable

MODEL = "smollm2"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with chat_server() as url:
        yield url


@pytest.fixture
def config(server: str, monkeypatch: pytest.MonkeyPatch) -> TeacherConfig:
    monkeypatch.setenv("OUR_TEST_KEY", KEY)
    return TeacherConfig(
        base_url=server, api_key_variable="OUR_TEST_KEY", answer_format="json_schema", permutations=2, concurrency=2,
        history_lines_max=2, requests_per_minute_max=60_000, usd_per_million_prompt_tokens=1.0,
        usd_per_million_completion_tokens=2.0, timeout_s=120,
    )  # fmt: skip


@pytest.fixture
def lists(world: ModuleType, tmp_path: Path) -> Lists:
    return read(world.write_lists(tmp_path / "lists.parquet", queries=8, candidates=4))


def ask(teacher: Teacher, lists: Lists, queries: range) -> dict[int, Judgement]:
    return dict(teacher.label(lists, list(queries), [lists.rows(q)[:3] for q in queries]))


def test_listwise_labels_are_kept_with_prompt_and_cost_and_made_once(
    config: TeacherConfig, lists: Lists, tmp_path: Path
) -> None:
    teacher = EndpointTeacher(MODEL, config)
    said = ask(Kept(teacher, LabelFile(tmp_path / "labels", teacher.name)), lists, range(2))
    assert sorted(said) == [0, 1]
    assert all(np.isfinite(j.log_odds).all() and len(set(j.log_odds.tolist())) > 1 for j in said.values())
    frame = pl.read_parquet(tmp_path / "labels/*.parquet")
    assert (len(frame), frame["teacher"].unique().to_list()) == (6, [teacher.name])
    prompt = json.loads(frame["prompt"][0])
    assert lists.item_text[lists.rows(0)[0]] in prompt[1]["content"]
    first = frame.unique("query_id")
    spent = (first["prompt_tokens"].sum() + 2 * first["completion_tokens"].sum()) / 1e6
    assert first["cost_usd"].sum() == pytest.approx(spent)
    assert teacher.facts["cost_usd"] == pytest.approx(spent, abs=1e-6)
    assert teacher.facts["requests"] == 4
    gone = dataclasses.replace(config, base_url="http://127.0.0.1:9/v1")
    again = Kept(EndpointTeacher(MODEL, gone), LabelFile(tmp_path / "labels", teacher.name))
    assert {at: j.log_odds.tolist() for at, j in ask(again, lists, range(2)).items()} == {
        at: pytest.approx(j.log_odds.tolist()) for at, j in said.items()
    }
    assert again.facts["lists"] == {"reused": 2, "made": 0}


def test_a_teacher_is_called_by_all_that_may_make_it_say_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model's name means another model, or another build of it, at another endpoint."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    usual = TeacherConfig(history_lines_max=2)
    said = f"openai:{MODEL}:listwise:3:history_lines_max=2"
    assert EndpointTeacher(MODEL, usual).name == said
    there = dataclasses.replace(usual, base_url="http://localhost:8000/v1")
    other = (
        there, dataclasses.replace(usual, answer_format="json_schema"),
        dataclasses.replace(usual, base_url="http://localhost:8001/v1"),
    )  # fmt: skip
    assert len({said, *(EndpointTeacher(MODEL, config).name for config in other)}) == 4
    openai = dataclasses.replace(usual, base_url="https://api.openai.com/v1/")
    assert EndpointTeacher(MODEL, openai).name == said
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:8000/v1/")
    assert EndpointTeacher(MODEL, usual).name == EndpointTeacher(MODEL, there).name
    assert "localhost" not in EndpointTeacher(MODEL, usual).name


def test_pointwise_labels_are_log_odds_of_yes(config: TeacherConfig, lists: Lists) -> None:
    teacher = EndpointTeacher(MODEL, dataclasses.replace(config, mode="pointwise"))
    said = ask(teacher, lists, range(1))[0]
    assert np.isfinite(said.log_odds).all()
    assert said.completion_tokens == 3
    assert "yes or no" in said.prompt


def test_a_spent_budget_keeps_what_was_said_and_a_larger_one_goes_on(
    config: TeacherConfig, lists: Lists, tmp_path: Path
) -> None:
    small = dataclasses.replace(config, permutations=1, concurrency=1, tokens_max=1)
    teacher = EndpointTeacher(MODEL, small)
    with pytest.raises(Overloaded, match="budget"):
        ask(Kept(teacher, LabelFile(tmp_path, teacher.name)), lists, range(2))
    kept = Kept(EndpointTeacher(MODEL, dataclasses.replace(small, tokens_max=10**6)), LabelFile(tmp_path, teacher.name))
    assert sorted(ask(kept, lists, range(2))) == [0, 1]
    assert kept.facts["lists"] == {"reused": 1, "made": 1}


def test_refusals_that_pass_are_retried_and_others_are_said(
    config: TeacherConfig, lists: Lists, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with front(server, lambda n, _: THROTTLED if n < 2 else None) as (url, answered):
        patient = dataclasses.replace(config, base_url=url, permutations=1)
        assert len(ask(EndpointTeacher(MODEL, patient), lists, range(1))) == 1
        assert answered == [429, 429, 200]
        answered.clear()
        with pytest.raises(Unavailable, match="RateLimitError after 1 retries"):
            ask(EndpointTeacher(MODEL, dataclasses.replace(patient, retries_max=1)), lists, range(1))
    monkeypatch.setenv("OUR_TEST_KEY", "wrong")
    with pytest.raises(BadInput, match="AuthenticationError"):
        ask(EndpointTeacher(MODEL, config), lists, range(1))
    monkeypatch.delenv("OUR_TEST_KEY")
    with pytest.raises(BadInput, match="no OUR_TEST_KEY in the environment"):
        EndpointTeacher(MODEL, config)


@pytest.mark.parametrize("status", [408, 409, 503])
def test_what_may_pass_but_stayed_is_unavailable(status: int, config: TeacherConfig, lists: Lists) -> None:
    with (
        front("http://127.0.0.1:9/v1", lambda *_: Said(status, b'{"error": {"message": "not now"}}')) as (
            url,
            answered,
        ),
        pytest.raises(Unavailable, match=r"after 1 retries.*not now"),
    ):
        ask(EndpointTeacher(MODEL, dataclasses.replace(config, base_url=url, retries_max=1)), lists, range(1))
    assert len(answered) >= 2


def test_every_try_waits_for_its_turn(config: TeacherConfig, lists: Lists) -> None:
    """Of 600 a minute one in a tenth of a second; the client's own pauses are nothing here."""
    order, at_s = Said(200, CHOICE % b'"[2] > [1] > [3]"'), []

    def flaky(n: int, _: object) -> Said:
        at_s.append(time.monotonic())
        return order if n % 3 == 2 else THROTTLED

    with front("http://127.0.0.1:9/v1", flaky) as (url, answered):
        paced = dataclasses.replace(config, base_url=url, permutations=1, requests_per_minute_max=600)
        assert len(ask(EndpointTeacher(MODEL, paced), lists, range(3))) == 3
    assert len(answered) == 9
    assert at_s[-1] - at_s[0] >= 0.75


def test_a_service_that_is_away_is_said_so(config: TeacherConfig, lists: Lists) -> None:
    away = dataclasses.replace(config, base_url="http://127.0.0.1:9/v1", retries_max=0)
    with pytest.raises(Unavailable, match="APIConnectionError"):
        ask(EndpointTeacher(MODEL, away), lists, range(1))


def test_a_list_the_endpoint_refuses_to_read_is_of_no_use_and_the_others_go_on(
    config: TeacherConfig, lists: Lists, server: str
) -> None:
    """A provider's filter says 400 to a title; asked about that one first, the endpoint is seen to answer others."""
    poison = lists.item_text[lists.rows(0)[0]] = "a forbidden title"

    def filtered(_: int, body: dict[str, object]) -> Said | None:
        found = poison in json.dumps(body, ensure_ascii=False)
        return Said(400, b'{"error": {"code": "data_inspection_failed"}}') if found else None

    with front(server, filtered) as (url, answered):
        one = dataclasses.replace(config, base_url=url, permutations=1, concurrency=1)
        teacher = EndpointTeacher(MODEL, one)
        said = ask(teacher, lists, range(2))
        assert [np.isnan(said[q].log_odds).all() for q in (0, 1)] == [True, False]
        assert answered == [400, 200, 200]
        assert teacher.facts["refused"] == 1
    with (
        front(server, lambda *_: Said(400, b'{"error": {"message": "no such parameter"}}')) as (url, _),
        pytest.raises(BadInput, match="BadRequestError"),
    ):
        ask(EndpointTeacher(MODEL, dataclasses.replace(one, base_url=url)), lists, range(1))


def test_a_shopper_the_endpoint_refuses_costs_his_list_however_many_requests_it_takes(
    config: TeacherConfig, world: ModuleType, tmp_path: Path, server: str
) -> None:
    many = read(world.write_lists(tmp_path / "many.parquet", queries=3, candidates=25))
    many.history_text[1] = "purchase 1d: a forbidden title"

    def filtered(_: int, body: dict[str, object]) -> Said | None:
        refused = "forbidden" in json.dumps(body, ensure_ascii=False)
        return Said(400, b'{"error": {"code": "data_inspection_failed"}}') if refused else Said(200, CHOICE % b'"yes"')

    with front(server, filtered) as (url, _):
        one_by_one = dataclasses.replace(config, base_url=url, mode="pointwise")
        teacher = EndpointTeacher(MODEL, one_by_one)
        said = dict(teacher.label(many, range(3), [many.rows(q) for q in range(3)]))
        assert [np.isnan(said[q].log_odds).all() for q in range(3)] == [False, True, False]
        assert teacher.facts["refused"] == 25
    few = read(world.write_lists(tmp_path / "few.parquet", queries=24, candidates=3))

    def harmless_alone(_: int, body: dict[str, object]) -> Said | None:
        asked = json.dumps(body).count("Answer yes.") == 1
        return Said(200, CHOICE % b'"yes"') if asked else Said(413, b'{"error": {"message": "context too small"}}')

    with front(server, harmless_alone) as (url, _), pytest.raises(BadInput, match="21 lists one after another refused"):
        ask(EndpointTeacher(MODEL, dataclasses.replace(one_by_one, base_url=url)), few, range(24))


def test_a_model_that_never_answers_to_the_point_is_not_asked_for_ever(
    config: TeacherConfig, world: ModuleType, tmp_path: Path
) -> None:
    many = read(world.write_lists(tmp_path / "many.parquet", queries=48, candidates=3))
    one = dataclasses.replace(config, permutations=1, concurrency=1)
    answer = Said(200, CHOICE % b'"I am sorry, but I"')
    with (
        front("http://127.0.0.1:9/v1", lambda *_: answer) as (url, answered),
        pytest.raises(BadInput, match=r"21 lists one after another of no use, lastly 'I am sorry, but I'.*answer_form"),
    ):
        ask(EndpointTeacher(MODEL, dataclasses.replace(one, base_url=url)), many, range(48))
    assert len(answered) == 24  # those under way together


def test_a_body_cut_short_is_asked_for_again(config: TeacherConfig, lists: Lists, server: str) -> None:
    def short(n: int, _: object) -> Said | None:
        return Said(200, b'{"choices": [{"ind', "application/json") if n == 1 else None

    with front(server, short) as (url, answered):
        one = dataclasses.replace(config, base_url=url, permutations=1, concurrency=1)
        assert len(ask(EndpointTeacher(MODEL, one), lists, range(2))) == 2
        assert answered == [200, 200, 200]


CHOICE = b'{"choices": [{"index": 0, "message": {"role": "assistant", "content": %s}}]}'


@pytest.mark.parametrize(
    "content",
    [CHOICE % b"null", CHOICE % b'[{"type": "text"}]', CHOICE % b'"?"', b'{"choices": []}', b'{"choices": null}'],
)
def test_answers_that_say_nothing_are_of_no_use_and_count_against_the_budget(
    content: bytes, config: TeacherConfig, lists: Lists, server: str
) -> None:
    with front(server, lambda *_: Said(200, content)) as (url, answered):
        blind = dataclasses.replace(config, base_url=url, permutations=1, concurrency=1, tokens_max=100)
        teacher = EndpointTeacher(MODEL, blind)
        with pytest.raises(Overloaded, match="budget"):  # though it never says what it took
            ask(teacher, lists, range(8))
        assert teacher.facts["unusable_answers"] == len(answered) < 8
        assert teacher.facts["cost_usd"] > 0


@pytest.mark.parametrize(
    "error", [b'{"error": {"message": "internal", "code": 500}}', b'{"choices": null, "error": {"code": 502}}']
)
def test_an_error_said_with_200_is_no_answer(error: bytes, config: TeacherConfig, lists: Lists, server: str) -> None:
    order = Said(200, CHOICE % b'"[2] > [1] > [3]"')
    with front(server, lambda n, _: Said(200, error) if n == 1 else order) as (url, answered):
        one = dataclasses.replace(config, base_url=url, permutations=1, concurrency=1)
        said = ask(EndpointTeacher(MODEL, one), lists, range(2))
        assert (len(said), len(answered)) == (2, 3)
        assert all(np.isfinite(j.log_odds).all() for j in said.values())
    with (
        front(server, lambda n, _: Said(200, error) if n else order) as (url, _),
        pytest.raises(Unavailable, match=r"no chat completion.*code"),
    ):
        ask(EndpointTeacher(MODEL, dataclasses.replace(one, base_url=url, retries_max=0)), lists, range(2))


def test_a_list_without_one_answer_of_use_is_asked_about_again_and_a_refused_one_is_not(
    config: TeacherConfig, lists: Lists, tmp_path: Path, server: str
) -> None:
    poison = lists.item_text[lists.rows(0)[0]] = "a forbidden title"

    def say(_: int, body: dict[str, object]) -> Said:
        refused = poison in json.dumps(body, ensure_ascii=False)
        return Said(400, b'{"error": {"code": "data_inspection_failed"}}') if refused else Said(200, CHOICE % b'"?"')

    with front(server, say) as (url, answered):
        one = dataclasses.replace(config, base_url=url, permutations=1, concurrency=1)
        made = []
        for _ in range(2):
            teacher = EndpointTeacher(MODEL, one)
            kept = Kept(teacher, LabelFile(tmp_path, teacher.name))
            assert all(np.isnan(j.log_odds).all() for j in ask(kept, lists, range(3)).values())
            made.append(kept.facts["lists"])
        assert made == [{"reused": 0, "made": 3}, {"reused": 1, "made": 2}]
        assert answered[-2:] == [200, 200]


@pytest.mark.parametrize(
    "said", [Said(200, b"<html>Welcome</html>", "text/html"), Said(200, b"{", "application/json"), Said(200, b"[1]")]
)
def test_what_is_no_chat_completion_is_said_so(said: Said, config: TeacherConfig, lists: Lists, server: str) -> None:
    with front(server, lambda *_: said) as (url, _), pytest.raises((Unavailable, BadInput)):
        ask(EndpointTeacher(MODEL, dataclasses.replace(config, base_url=url, retries_max=0)), lists, range(1))
