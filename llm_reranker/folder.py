"""Writes the folder of a distilled student: what transformers loads, and what Qwen3 has no place for. Heavy: torch.

Shape legend: M items, C collaborative embedding width, n rows of one list.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers.utils import logging

from llm_reranker import checkpoint, fit
from llm_reranker.base import HistoryItem
from llm_reranker.checkpoint import Card, Checkpoint
from llm_reranker.config import DistillConfig
from llm_reranker.encoded import Encoded
from llm_reranker.engine import encode_items
from llm_reranker.lists import FEATURE_NAMES, Lists
from llm_reranker.model import Model, ModelConfig
from llm_reranker.prompt import Prompt, history_text
from llm_reranker.splits import ItemVectors
from llm_reranker.trainable import TrainableReranker
from recsys.core import disk
from recsys.core.items import ItemTable

_ENCODE_ITEMS = 4096
_KNOWN_ANSWER_ITEMS = 6


class Distilled(Protocol):
    """What a folder is made of, besides the network."""

    config: DistillConfig
    lists: Lists
    items: ItemTable
    item_texts: list[str]
    tokenizer: Tokenizer
    prompt: Prompt
    vectors: ItemVectors


def write(
    work: Distilled,
    student: TrainableReranker,
    out: Path,
    version: str,
    report: Mapping[str, Any],
    calibration: tuple[float, float],
) -> None:
    """Write the student's folder. calibration: scale and bias of the log-odds."""
    out.mkdir(parents=True, exist_ok=True)
    logging.disable_progress_bar()  # of a second's writing
    with disk.writing(out):
        student.lm.save_pretrained(out)
        save_file(student.extras.state_dict(), out / "extras.safetensors")
    work.tokenizer.save(str(out / "tokenizer.json"))
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=1), "utf-8")
    shape = ModelConfig.from_json(checkpoint.read_json(out / "config.json"), str(out))
    model = Model(shape, checkpoint.read_model_tensors(out, shape))
    yes, no = (checkpoint.label_token(work.tokenizer, word, out) for word in ("yes", "no"))
    ours = Checkpoint(
        model=model, tokenizer=work.tokenizer, yes=yes, no=no, card=None, extras=student.extras, items=None
    )
    vectors = _catalogue_vectors(work)
    with torch.inference_mode():
        parts = [
            encode_items(ours, work.prompt, work.item_texts[i : i + _ENCODE_ITEMS], vectors[i : i + _ENCODE_ITEMS])
            for i in range(0, len(work.items), _ENCODE_ITEMS)
        ]
    empty = torch.empty(0, work.config.soft_tokens, shape.hidden_size)
    checkpoint.write_items(out / "items.safetensors", work.items.item_key, torch.cat([empty, *parts]))
    Card(
        version=version,
        feature_names=FEATURE_NAMES,
        soft_tokens=work.config.soft_tokens,
        embedding_dim=work.vectors[1].shape[1],
        prefix_tokens_max=work.config.prefix_tokens_max,
        item_tokens_max=work.config.item_tokens_max,
        calibration_scale=calibration[0],
        calibration_bias=calibration[1],
        blend_weight=report["tasks"]["all"]["weight"],
        blend_weight_new_only=report["tasks"]["new-only"]["weight"],
        known_answer=_known_answer(work, student, vectors, calibration),
        report=report,
    ).write(out / "double11.json")


def _catalogue_vectors(work: Distilled) -> torch.Tensor:
    """Collaborative embeddings [M, C] of the catalogue, NaN rows where there is none."""
    key, vectors = work.vectors
    found = np.full((len(work.items), vectors.shape[1]), np.nan, np.float32)
    rows = work.items.rows(key)
    found[rows[rows >= 0]] = vectors[rows >= 0]
    return torch.from_numpy(found)


def _known_answer(
    work: Distilled, student: TrainableReranker, vectors: torch.Tensor, calibration: tuple[float, float]
) -> dict[str, Any]:
    """A request and the scores that transformers' module gives it; serving must give the same."""
    ids = work.items.column("item_id")[:_KNOWN_ANSWER_ITEMS]
    texts = [*work.item_texts[: len(ids)], "an item the catalogue does not know"]
    n, as_of_us = len(texts), 1_700_000_000_000_000
    history = [
        HistoryItem(item_id="", text=text or "nothing", event_type=2 + i % 4, event_time_us=as_of_us - i * 10**11)
        for i, text in reversed(list(enumerate(texts)))
    ]
    features = np.stack([np.linspace(-1, 1, n), work.lists.rank_score[:1].repeat(n), np.arange(n)], 1)
    features[0, 0] = np.nan
    probe = Lists(
        query_id=["known-answer"], query_time_us=np.array([as_of_us]), new_only=np.zeros(1, np.bool_),
        history_text=[history_text(history, as_of_us)],
        offsets=np.array([0, n]), item_id=[*ids, ""], item_text=texts, item_embedding=np.empty((n, 0), np.float32),
        retrieval_score=features[:, 0].astype(np.float32), rank_score=features[:, 1].astype(np.float32),
        origin=[""] * n, label=np.zeros(n, np.float32),
    )  # fmt: skip
    embedding = np.full((n, vectors.shape[1]), np.nan, np.float32)
    embedding[: len(ids)] = vectors[: len(ids)].numpy()
    data = Encoded(probe, work.prompt, embedding)
    raw = fit.predict(student, data, [fit.Chosen(0, np.arange(n))], 1)[0]
    return {
        "as_of_us": as_of_us,
        "history": [
            {"item_id": h.item_id, "text": h.text, "event_type": h.event_type, "event_time_us": h.event_time_us}
            for h in history
        ],
        "item_ids": [*ids, "\u0000unknown"],
        "texts": [*[""] * len(ids), texts[-1]],
        "features": [[None if np.isnan(x) else float(np.float32(x)) for x in row] for row in features],
        "scores": [float(calibration[0] * x + calibration[1]) for x in raw],
    }
