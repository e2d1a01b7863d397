"""A model behind an OpenAI-compatible endpoint as teacher: DashScope, Kimi, GLM, Gemini, vLLM, llama.cpp.

Needs the extra `teachers`. The key comes from the environment alone. The client retries what may pass (429, 5xx, lost
connections) with growing pauses; requests are paced and bounded in number at a time, and no more are sent once the
budget of money or tokens is spent. Who does not say what an answer took is taken at a token for three bytes. A list
that the endpoint refuses to read (a filter, a context too small) is of no use, as long as it reads others. What is
sent: histories and item texts, no user ids.

Shape legend: n rows of one list.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import json
import os
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from llm_reranker.config import TeacherConfig
from llm_reranker.lists import Lists
from llm_reranker.teachers import asking
from llm_reranker.teachers.base import Judgement
from recsys.core.errors import BadInput, Double11Error, Overloaded, Unavailable
from recsys.core.ids import key

_BLOCK_PER_SLOT = 4  # lists under way, per request at a time
_ANSWER_TOKENS_PER_ITEM, _ANSWER_TOKENS_MIN = 8, 32
_TOP_LOGPROBS = 20
_BYTES_PER_TOKEN = 3  # where the endpoint does not count: rather too many tokens than too few
_PASSING = (408, 409, 429)  # what the client asks again, and 5xx
_REFUSALS = (400, 403, 413, 422)  # of one request, if the endpoint answers others
_USELESS_LISTS_MAX = 20  # one after another, all that was asked of them: then it is not the lists
_OTHER_QUESTIONS = (  # that make it another teacher
    "history_lines_max", "list_items_max", "reasoning_tokens_max", "answer_format",
)  # fmt: skip
_OPENAI_URL = "https://api.openai.com/v1"
_PAUSE_S, _PAUSE_S_MAX = 0.25, 8.0  # as the client's own
Call: TypeAlias = Callable[..., Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class _Asked:
    """One list in words. key: of the query's id."""

    history: str
    texts: list[str]
    key: int

    @classmethod
    def of(cls, lists: Lists, query: int, rows: npt.NDArray[np.int64]) -> _Asked:
        return cls(lists.history_text[query], [lists.item_text[r] for r in rows], key(lists.query_id[query]))


@dataclass(frozen=True, slots=True)
class _Answer:
    """What came back. text: empty where the endpoint had nothing to say. top: see asking.read_yes_no."""

    text: str = ""
    top: Mapping[str, float] | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    refused: bool = False

    @classmethod
    def read(cls, completion: Any, messages: asking.Messages) -> _Answer:
        """Of a ChatCompletion, whatever an endpoint left out of it. Raises: ValueError for an error said with 200."""
        if "choices" not in completion.model_fields_set or completion.model_extra.get("error"):
            raise ValueError(f"{completion.model_extra}")
        choice = completion.choices[0] if completion.choices else None
        message = choice.message if choice is not None else None
        text = message.content if message is not None and isinstance(message.content, str) else ""
        usage = completion.usage
        said, told = (getattr(usage, f"{kind}_tokens", None) for kind in ("prompt", "completion"))
        if not said:
            asked = json.dumps(messages, ensure_ascii=False)
            said, told = (-(-len(part.encode("utf-8", "replace")) // _BYTES_PER_TOKEN) for part in (asked, text))
        return cls(text, _top(choice), said, told or 0)


class Pace:
    """Requests spread evenly over the minute."""

    def __init__(self, per_minute_max: float, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
        self._gap_s, self._next_s, self._sleep = 60.0 / per_minute_max, 0.0, sleep

    async def turn(self, now_s: float) -> None:
        """Wait for this request's turn."""
        wait_s = max(0.0, self._next_s - now_s)
        self._next_s = now_s + wait_s + self._gap_s
        if wait_s:
            await self._sleep(wait_s)


class EndpointTeacher:
    """One model of one endpoint."""

    fitted = False

    def __init__(self, model: str, config: TeacherConfig, *, seed: int = 0) -> None:
        """seed: of the permutations. Raises: BadInput without the extra `teachers` or without a key."""
        self._openai = _openai()
        api_key = os.environ.get(config.api_key_variable)
        if not api_key:
            raise BadInput(
                "--teacher openai", came=f"no {config.api_key_variable} in the environment", expected="a key",
                fix=f"export {config.api_key_variable}=..., or name another variable in [llm_reranker.teacher].",
            )  # fmt: skip
        self._settings = {
            "api_key": api_key, "base_url": config.base_url or None, "max_retries": config.retries_max,
            "timeout": config.timeout_s,
        }  # fmt: skip
        self._model, self._config, self._seed = model, config, seed
        self._pace = Pace(config.requests_per_minute_max)
        self._spent_usd, self._spent_tokens, self._requests, self._unusable = 0.0, 0, 0, 0
        self._refused, self._useless_lists = 0, 0  # the latter in a row
        how = f"{config.mode}:{config.permutations}" if config.mode == "listwise" else config.mode
        told = ((name, getattr(config, name), getattr(TeacherConfig(), name)) for name in _OTHER_QUESTIONS)
        url = (config.base_url or os.environ.get("OPENAI_BASE_URL") or _OPENAI_URL).rstrip("/")
        elsewhere = [f"at={hashlib.sha256(url.encode()).hexdigest()[:8]}"] if url != _OPENAI_URL else []
        self.name = ":".join(
            ["openai", model, how, *(f"{name}={value}" for name, value, usual in told if value != usual), *elsewhere]
        )

    @property
    def facts(self) -> Mapping[str, Any]:
        """Name, and what this process spent; the endpoint does not say how large its model is."""
        return {
            "name": self.name, "active_parameters": 0, "requests": self._requests, "refused": self._refused,
            "unusable_answers": self._unusable, "tokens": self._spent_tokens, "cost_usd": round(self._spent_usd, 6),
        }  # fmt: skip

    def label(
        self, lists: Lists, queries: Sequence[int], rows: Sequence[npt.NDArray[np.int64]]
    ) -> Iterator[tuple[int, Judgement]]:
        """Log-odds of the given rows of each query.

        Raises: BadInput when the endpoint refuses key, model or request; Unavailable when it does not answer;
        Overloaded when the budget is spent.
        """
        step = self._config.concurrency * _BLOCK_PER_SLOT
        with asyncio.Runner() as runner:
            for start in range(0, len(queries), step):
                part = range(start, min(start + step, len(queries)))
                failed = None
                for at, said in self._block(runner, [_Asked.of(lists, queries[i], rows[i]) for i in part]):
                    if isinstance(said, Judgement):
                        yield start + at, said
                    else:
                        failed = failed or said
                if failed is not None:
                    raise failed

    def _block(
        self, runner: asyncio.Runner, asked: Sequence[_Asked]
    ) -> Iterator[tuple[int, Judgement | Double11Error]]:
        """What is said of each list, as soon as it is: what was paid for is not held back for the slowest."""
        judge = self._listwise if self._config.mode == "listwise" else self._pointwise
        gate = asyncio.Semaphore(self._config.concurrency)

        async def turn(_: object) -> None:  # of every try, also of those that the client makes by itself
            await self._pace.turn(asyncio.get_running_loop().time())

        http = self._openai.DefaultAsyncHttpxClient(event_hooks={"request": [turn]})
        client = self._openai.AsyncOpenAI(**self._settings, http_client=http)

        async def call(*, answer_tokens: int, **request: Any) -> Any:
            async with gate:
                return await self._ask(client.chat.completions.create, request, answer_tokens)

        async def one(at: int, of_list: _Asked) -> tuple[int, Judgement | Double11Error]:
            try:
                return at, await judge(call, of_list)
            except Double11Error as error:
                return at, error

        loop = runner.get_loop()
        pending = {loop.create_task(one(at, of_list)) for at, of_list in enumerate(asked)}
        try:
            while pending:
                done, pending = runner.run(asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED))
                yield from sorted((task.result() for task in done), key=itemgetter(0))
        finally:
            runner.run(client.close())

    async def _listwise(self, call: Call, asked: _Asked) -> Judgement:
        c, n = self._config, len(asked.texts)
        rng = np.random.default_rng([self._seed, asked.key])  # the same orders, whichever run asks
        parts = [
            part
            for _ in range(c.permutations)
            for part in np.array_split(rng.permutation(n), max(1, -(-n // c.list_items_max)))
            if len(part)
        ]
        questions = [
            asking.listwise(asked.history, [asked.texts[i] for i in part], c.history_lines_max) for part in parts
        ]
        answers = await asyncio.gather(
            *(
                call(
                    messages=question,
                    answer_tokens=_ANSWER_TOKENS_MIN + _ANSWER_TOKENS_PER_ITEM * len(part),
                    **({"response_format": asking.order_schema(len(part))} if c.answer_format == "json_schema" else {}),
                )
                for part, question in zip(parts, questions, strict=True)
            )
        )
        orders = [asking.read_order(a.text, len(part)) for part, a in zip(parts, answers, strict=True)]
        self._unusable += sum(o is None for o in orders)
        placed = [(part, order) for part, order in zip(parts, orders, strict=True) if order is not None]
        return self._judgement(asking.borda(placed, n), questions, answers)

    async def _pointwise(self, call: Call, asked: _Asked) -> Judgement:
        questions = [asking.pointwise(asked.history, text, self._config.history_lines_max) for text in asked.texts]
        wanted = {"answer_tokens": 1, "logprobs": True, "top_logprobs": _TOP_LOGPROBS}
        answers = await asyncio.gather(*(call(messages=question, **wanted) for question in questions))
        values = np.array([asking.read_yes_no(a.text, a.top) for a in answers], np.float32)
        self._unusable += int(np.isnan(values).sum())
        return self._judgement(values, questions, answers)

    async def _ask(self, create: Call, request: Mapping[str, Any], answer_tokens: int) -> _Answer:
        c, openai = self._config, self._openai
        if self._spent_usd >= c.cost_usd_max or self._spent_tokens >= c.tokens_max:
            raise Overloaded(
                f"budget of {self.name}", came=f"{self._spent_usd:.4f} USD, {self._spent_tokens} tokens spent",
                expected=f"less than {c.cost_usd_max} USD and {c.tokens_max} tokens",
                fix="The labels so far are kept: raise the budget in [llm_reranker.teacher] and run again.",
            )  # fmt: skip
        thinking = {"max_completion_tokens": c.reasoning_tokens_max + answer_tokens}
        how = thinking if c.reasoning_tokens_max else {"max_tokens": answer_tokens, "temperature": 0}
        try:
            answer = await self._answered(create, request, how)
        except openai.APIError as error:
            status = getattr(error, "status_code", 0)
            if isinstance(error, openai.APIConnectionError) or status in _PASSING or status >= 500:
                raise Unavailable(
                    self.name, came=f"{type(error).__name__} after {c.retries_max} retries: {error}",
                    expected="an answer",
                    fix="The labels so far are kept: run again later, or lower requests_per_minute_max.",
                ) from error  # fmt: skip
            if status in _REFUSALS and await self._is_of_the_text(create, request, how):
                return _Answer(refused=True)
            raise self._not_taken(f"{type(error).__name__}: {error}") from error
        self._requests += 1
        self._spent_tokens += answer.prompt_tokens + answer.completion_tokens
        self._spent_usd += self._cost_usd([answer])
        return answer

    async def _answered(self, create: Call, request: Mapping[str, Any], how: Mapping[str, Any]) -> _Answer:
        """What can be read. From one who has answered before, a body cut short is as good as a lost connection."""
        tries = 0
        while True:
            try:
                return _Answer.read(await create(model=self._model, **how, **request), request["messages"])
            except (AttributeError, TypeError, ValueError, LookupError) as error:  # the client passes on what it gets
                tries += 1
                if tries > self._config.retries_max or not self._requests:
                    raise Unavailable(
                        self.name, came=f"no chat completion ({error!r})", expected="JSON of the chat completions API",
                        fix="Check base_url: most end in /v1. The labels so far are kept.",
                    ) from error  # fmt: skip
                await asyncio.sleep(min(_PAUSE_S * 2**tries, _PAUSE_S_MAX))

    async def _is_of_the_text(self, create: Call, request: Mapping[str, Any], how: Mapping[str, Any]) -> bool:
        """Whether a refusal is of what was in this request: the endpoint answers, or has answered, others like it."""
        self._refused += 1
        if not self._requests:
            harmless = {**request, "messages": [{"role": "user", "content": "Answer yes."}]}
            try:
                await create(model=self._model, **how, **harmless)
            except self._openai.APIError:
                return False
        return True

    def _judgement(
        self, log_odds: npt.NDArray[np.float32], questions: Sequence[asking.Messages], answers: Sequence[_Answer]
    ) -> Judgement:
        self._useless_lists = self._useless_lists + 1 if answers and np.isnan(log_odds).all() else 0
        if self._useless_lists > _USELESS_LISTS_MAX:
            what = "refused" if all(a.refused for a in answers) else f"of no use, lastly {answers[-1].text!r:.80}"
            raise self._not_taken(f"{self._useless_lists} lists one after another {what}")
        return Judgement(
            log_odds=log_odds,
            lost=bool(np.isnan(log_odds).all()) and not all(a.refused for a in answers),
            prompt=json.dumps(questions[0], ensure_ascii=False) if questions else "",
            prompt_tokens=sum(a.prompt_tokens for a in answers),
            completion_tokens=sum(a.completion_tokens for a in answers),
            cost_usd=self._cost_usd(answers),
        )

    def _not_taken(self, came: str) -> BadInput:
        return BadInput(
            self.name, came=came, expected="a request the endpoint takes and the model answers",
            fix="Check key, model name, base_url, mode, answer_format and reasoning_tokens_max.",
        )  # fmt: skip

    def _cost_usd(self, answers: Sequence[_Answer]) -> float:
        c = self._config
        prompt, completion = sum(a.prompt_tokens for a in answers), sum(a.completion_tokens for a in answers)
        return (prompt * c.usd_per_million_prompt_tokens + completion * c.usd_per_million_completion_tokens) / 1e6


def _top(choice: Any) -> dict[str, float] | None:
    """Log-probabilities of the likeliest first tokens; None where the endpoint gives none."""
    logprobs = getattr(choice, "logprobs", None)
    if logprobs is None or not logprobs.content:
        return None
    top: dict[str, float] = {}
    for token in logprobs.content[0].top_logprobs or []:
        top[token.token] = float(np.logaddexp(top.get(token.token, -np.inf), token.logprob))
    return top


def _openai() -> Any:
    try:
        return importlib.import_module("openai")
    except ImportError as error:
        raise BadInput(
            "--teacher openai", came=f"no module {error.name}", expected="the extra `teachers`",
            fix="pip install 'double11[teachers]'",
        ) from error  # fmt: skip
