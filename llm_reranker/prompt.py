"""What the model reads: instruction, history, candidate. Text from outside can never become a control token.

Two templates. A tokenizer that knows `<think>` gets Qwen3-Reranker's own; the small vocabularies we train get the
compact one, whose suffix is one token. Soft tokens, where an item has them, stand in the place of its text.

Truncation rule: a text is cut to TEXT_BYTES_MAX bytes and then to its first `item_tokens_max` tokens; a history keeps
its newest lines. White space inside a title becomes one blank, so that a title can't forge a line.
Source: Qwen3-Reranker model card (https://huggingface.co/Qwen/Qwen3-Reranker-0.6B), section "Transformers usage".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from llm_reranker.base import HistoryItem
from recsys.core.errors import BadInput
from recsys.core.events import EventType
from recsys.core.items import ItemTable

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TEXT_BYTES_MAX = 4096
HISTORY_TOKENS_MIN = 8  # fewer say nothing of a shopper
HISTORY_BYTES_MAX = 16_384
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_ZERO_WIDTH = "\u200b"  # breaks a control string where the tokenizer is not ours to call
_INSTRUCTION = "Judge whether the shopper will choose the item next."
_AGES_S = ((365 * 86_400, "y"), (30 * 86_400, "mo"), (86_400, "d"), (3_600, "h"), (60, "min"))


def clip(text: str, bytes_max: int = TEXT_BYTES_MAX) -> str:
    """One line of valid UTF-8 of at most `bytes_max` bytes; lone surrogates become "?"."""
    raw = text[:bytes_max].encode("utf-8", "replace")[:bytes_max]
    return " ".join(raw.decode("utf-8", "ignore").split())


def item_text(title: str | None, category: str | None = None, brand: str | None = None) -> str:
    """How an item is written, in lists and in serving: "title | category | brand", absent parts left out."""
    return clip(" | ".join(p for p in (title, category, brand) if p))


def item_texts(items: ItemTable, item_key: npt.NDArray[np.int64]) -> list[str]:
    """`item_text` of the keys [N]; empty where the table does not know the item."""
    parts = (items.values(name, item_key) for name in ("title", "category", "brand"))
    return [item_text(*row) for row in zip(*parts, strict=True)]


def history_text(history: Sequence[HistoryItem], as_of_us: int, query_text: str = "") -> str:
    """How a history is written, in lists and in serving: one line per action, newest first, and what was searched.

    A line is "purchase 3d: title | category | brand". Oldest lines are dropped beyond HISTORY_BYTES_MAX bytes.
    """
    lines = [f"search: {clip(query_text, 512)}"] if query_text else []
    used = sum(len(line.encode()) for line in lines)
    for event in reversed(history):
        line = f"{_label(event.event_type)} {_age(as_of_us - event.event_time_us)}: {clip(event.text)}"
        used += len(line.encode()) + 1
        if used > HISTORY_BYTES_MAX:
            break
        lines.append(line)
    return "\n".join(lines)


def _label(event_type: int) -> str:
    return EventType(event_type).label if event_type in EventType._value2member_map_ else "event"


def _age(age_us: int) -> str:
    age_s = max(0, age_us) // 1_000_000
    return next((f"{age_s // size}{unit}" for size, unit in _AGES_S if age_s >= size), "now")


@dataclass(frozen=True, slots=True)
class Template:
    """Control text around the parts; only these strings may produce control tokens."""

    head: str
    middle: str
    tail: str


_QWEN3_RERANKER = Template(
    head="<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    f"<Instruct>: {_INSTRUCTION}\n<Query>: ",
    middle="\n<Document>: ",
    tail="<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
)
_COMPACT = Template(head="<|im_start|>", middle="\n<|im_start|>", tail="<|im_end|>")


class Prompt:
    """Turns texts into token ids with one tokenizer: prefix (shared by all candidates), item text, tail."""

    def __init__(self, tokenizer: Tokenizer, *, prefix_tokens_max: int, item_tokens_max: int) -> None:
        """tokenizer: a `tokenizers.Tokenizer` with Qwen's control tokens.

        Raises: BadInput where the instruction leaves no room for a history.
        """
        self._tokenizer = tokenizer
        self._item_tokens_max = item_tokens_max
        added = {token.content: id_ for id_, token in tokenizer.get_added_tokens_decoder().items()}
        self.control: Mapping[str, int] = added
        self._control_ids = frozenset(added.values())
        self.template = _QWEN3_RERANKER if "<think>" in added else _COMPACT
        self._head, self._middle, self.tail = (
            tuple(tokenizer.encode(part, add_special_tokens=False).ids)
            for part in (self.template.head, self.template.middle, self.template.tail)
        )
        self._history_tokens_max = prefix_tokens_max - len(self._head) - len(self._middle)
        if self._history_tokens_max < HISTORY_TOKENS_MIN:
            instruction = prefix_tokens_max - self._history_tokens_max
            raise BadInput(
                "prefix_tokens_max", came=prefix_tokens_max, expected=f"at least {instruction + HISTORY_TOKENS_MIN}",
                fix=f"Raise it: with this tokenizer the instruction alone is {instruction} tokens.",
            )  # fmt: skip

    def prefix(self, history: str) -> tuple[int, ...]:
        """Ids of instruction and history, at most `prefix_tokens_max`; the newest lines (the first) are kept."""
        return (*self._head, *self.encode(history, self._history_tokens_max), *self._middle)

    def item(self, text: str) -> tuple[int, ...]:
        """Ids of a candidate's text, at most `item_tokens_max`, without the tail."""
        return self.encode(clip(text), self._item_tokens_max)

    def items(self, texts: Iterable[str]) -> list[tuple[int, ...]]:
        """`item` of each text."""
        return [self.item(text) for text in texts]

    def history_as_text(self, history: str) -> str:
        """What `prefix` reads of a history, for a server that takes no ids; control strings are broken."""
        return self._as_text(history, self._history_tokens_max)

    def item_as_text(self, text: str) -> str:
        """What `item` reads of a candidate's text, in the same way."""
        return self._as_text(clip(text), self._item_tokens_max)

    def _as_text(self, text: str, tokens_max: int) -> str:
        pieces: list[str] = []
        for piece in _broken([_bounded(text)], self.control):
            at = self._tokenizer.encode(piece, add_special_tokens=False).offsets
            # A character of several tokens, such as an emoji, is left out where not all of them are read.
            pieces.append(piece if len(at) <= tokens_max else piece[: min(at[tokens_max - 1][1], at[tokens_max][0])])
            tokens_max -= len(at)
            if tokens_max <= 0:
                break
        return _ZERO_WIDTH.join(pieces)

    def encode(self, text: str, tokens_max: int) -> tuple[int, ...]:
        """Ids of foreign text: no control token, whatever the text says; at most `tokens_max`, the first ones."""
        ids: list[int] = []
        for piece in _broken([_bounded(text)], self.control):
            found = self._tokenizer.encode(piece, add_special_tokens=False).ids
            ids += [i for i in found if i not in self._control_ids]  # a normaliser may write the string after all
            if len(ids) >= tokens_max:
                break
        return tuple(ids[:tokens_max])


def _bounded(text: str) -> str:
    return text.encode("utf-8", "replace")[:HISTORY_BYTES_MAX].decode("utf-8", "ignore")


def _broken(pieces: list[str], control: Iterable[str]) -> list[str]:
    """The text cut inside every control string, so that no piece contains one: the pieces join to the same text."""
    for token in control:
        cut: list[str] = []
        for piece in pieces:
            while (at := piece.find(token)) >= 0:
                cut.append(piece[: at + 1])
                piece = piece[at + 1 :]
            cut.append(piece)
        pieces = cut
    return [p for p in pieces if p]
