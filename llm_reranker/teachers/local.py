"""A Hugging Face checkpoint in a local folder as teacher: Qwen3 or Qwen3-MoE, asked for yes or no. Heavy: torch.

The prompt is Qwen3-Reranker's where the tokenizer knows `<think>` (llm_reranker.prompt); the answer is the log-odds of
"yes" against "no" at the last position. The user's context is computed once per list, by the forward that also serves.

Shape legend: n rows of one list, D hidden.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llm_reranker import checkpoint
from llm_reranker.attention import PackedCausal, SharedPrefix
from llm_reranker.config import RerankConfig
from llm_reranker.lists import Lists
from llm_reranker.prompt import Prompt
from llm_reranker.teachers.base import Judgement
from recsys.core.errors import NotFound
from recsys.core.run_dir import sha256_file

_TELLING = ("config.json", "tokenizer.json")


class LocalTeacher:
    """A checkpoint folder, used as it is."""

    fitted = False

    def __init__(self, folder: Path, config: RerankConfig) -> None:
        """config: how many tokens of history and item it reads, in which precision and where.

        Raises: NotFound, CorruptData, BadInput for too few.
        """
        if not folder.is_dir():
            raise NotFound(
                "--teacher hf", came=str(folder), expected="a Hugging Face folder", fix="Download a Qwen3 checkpoint."
            )
        self._loaded = checkpoint.read(folder, precision=config.precision, device=config.device)
        self._prompt = Prompt(
            self._loaded.tokenizer,
            prefix_tokens_max=config.prefix_tokens_max,
            item_tokens_max=config.item_tokens_max,
        )
        model = self._loaded.model
        self._direction_D = model.label_direction(self._loaded.yes, self._loaded.no)
        self._folder, self._read = folder.resolve(), f"{config.prefix_tokens_max}:{config.item_tokens_max}"
        self._active = model.config.active_parameters()

    @cached_property
    def name(self) -> str:
        """Folder, what is in it and how much it reads: many a fine-tuned model lies in a `checkpoint-final`."""
        digest = hashlib.sha256()
        for path in sorted(self._folder.iterdir()):
            if path.name in _TELLING or path.suffix == ".safetensors":
                digest.update(f"{path.name} {sha256_file(path)}\n".encode())
        return f"hf:{self._folder.name}:{digest.hexdigest()[:12]}:{self._read}"

    @property
    def facts(self) -> Mapping[str, Any]:
        """Name and active parameters."""
        return {"name": self.name, "active_parameters": self._active}

    def label(
        self, lists: Lists, queries: Sequence[int], rows: Sequence[npt.NDArray[np.int64]]
    ) -> Iterator[tuple[int, Judgement]]:
        """Log-odds of "yes" for the given rows of each query."""
        for at, (query, part) in enumerate(zip(queries, rows, strict=True)):
            yield at, self._judge(lists.history_text[query], [lists.item_text[r] for r in part])

    def _judge(self, history: str, texts: Sequence[str]) -> Judgement:
        model, prefix = self._loaded.model, self._prompt.prefix(history)
        suffixes = [(*ids, *self._prompt.tail) for ids in self._prompt.items(texts)]
        lengths = [len(s) for s in suffixes]
        with torch.inference_mode():
            context = PackedCausal([len(prefix)], states=False, device=model.device)
            at = torch.arange(len(prefix), device=model.device)
            model.hidden(model.embed(torch.tensor(prefix, device=model.device)), at, context)
            own = SharedPrefix(context.kept, [lengths], last_only=True, device=model.device)
            position = len(prefix) + torch.cat([torch.arange(n) for n in lengths])
            ids = torch.tensor([i for s in suffixes for i in s])
            hidden_nD = model.hidden(model.embed(ids.to(model.device)), position.to(model.device), own)
            log_odds: npt.NDArray[np.float32] = (hidden_nD.float() @ self._direction_D).cpu().numpy()
        return Judgement(
            log_odds=log_odds,
            prompt=f"{self._prompt.template.head}{history}{self._prompt.template.middle}ITEM{self._prompt.template.tail}",
            prompt_tokens=len(prefix) + sum(lengths),
        )
