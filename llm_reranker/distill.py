"""Distils a reranker from candidate lists: teacher, student, calibration, blend weight, folder. Heavy: torch.

Only data before the run's `until` comes in. Validation is the last block of query_time; what is chosen on it (whether
to believe the teacher, calibration, blend weight) is in the report. Seeded; the same input gives the same folder.

Shape legend: R rows of the lists, M items, C collaborative embedding width, n rows of one list.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from llm_reranker import checkpoint, fit, quality
from llm_reranker.base import HistoryItem
from llm_reranker.blend import blend
from llm_reranker.checkpoint import Card, Checkpoint
from llm_reranker.config import DistillConfig
from llm_reranker.encoded import Encoded, align
from llm_reranker.engine import encode_items
from llm_reranker.extras import Extras
from llm_reranker.lists import FEATURE_NAMES, Lists, read
from llm_reranker.model import Model, ModelConfig
from llm_reranker.prompt import Prompt, history_text, item_texts
from llm_reranker.teachers import TEACHERS, Teacher
from llm_reranker.teachers.qwen3_moe import Qwen3MoeTeacher
from llm_reranker.trainable import INIT_STD, TrainableReranker, build
from recsys.core.errors import BadInput
from recsys.core.ids import keys
from recsys.core.items import ItemTable

ItemVectors = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]
_BLOCKS_MAX = 64  # more distinct query times than this are no windows of towers trained apart
_ENCODE_ITEMS = 4096
_KNOWN_ANSWER_ITEMS = 6


@dataclass(frozen=True, slots=True)
class _Split:
    train: list[int]
    validation: list[int]


def distill(
    lists_path: Path,
    items: ItemTable,
    out_dir: Path,
    *,
    seed: int = 0,
    config: DistillConfig | None = None,
    teacher: str = "qwen3-moe",
    item_vectors: ItemVectors | None = None,
    version: str = "1",
) -> dict[str, Any]:
    """Train a teacher and a student on the lists and write the student's folder.

    items: the catalogue, whose soft tokens are computed. item_vectors: the vectors (item_key [M], float32 [M, C]) that
    serving's tower gives the items; the lists' embeddings are rotated into their space. None: those of the last block.
    Returns the report, which is also in double11.json.
    Raises: BadInput for lists that cannot be split or a teacher that does not exist; see lists.read for the rest.
    """
    if teacher not in TEACHERS:
        raise BadInput("--teacher", came=teacher, expected=f"one of {TEACHERS}", fix="Name one of those.")
    config = config or DistillConfig()
    started_s = time.perf_counter()
    lists = read(lists_path)
    split = _split(lists, config, seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        work = _Work(lists, items, split, config, seed, item_vectors)
        report = work.run(out_dir, version)
    report["seconds"]["total"] = round(time.perf_counter() - started_s, 1)
    return report


class _Work:
    """One distillation: what its steps share."""

    def __init__(
        self,
        lists: Lists,
        items: ItemTable,
        split: _Split,
        config: DistillConfig,
        seed: int,
        vectors: ItemVectors | None,
    ) -> None:
        self.lists, self.items, self.split, self.config, self.seed = lists, items, split, config, seed
        self.item_texts = item_texts(items, items.item_key)
        self.tokenizer = self._tokenizer()
        self.prompt = Prompt(
            self.tokenizer, prefix_tokens_max=config.prefix_tokens_max, item_tokens_max=config.item_tokens_max
        )
        self.vectors, embedding_RC = _common_space(lists, vectors)
        self.data = Encoded(lists, self.prompt, embedding_RC)
        self.seconds: dict[str, float] = {}

    def run(self, out_dir: Path, version: str) -> dict[str, Any]:
        """Every step in order; the report."""
        c, lists = self.config, self.lists
        train = [fit.Chosen(q, self.data.training_rows(q, c.depth)) for q in self.split.train]
        validation = [fit.Chosen(q, lists.rows(q)[: c.depth]) for q in self.split.validation]
        labels = [lists.label[v.rows] for v in validation]
        rank = [lists.rank_score[v.rows] for v in validation]

        teacher, teacher_active = self._timed("teacher", lambda: self._teach(train))
        judged = self._timed("judge", lambda: self._label(teacher, validation))
        rank_ndcg, teacher_ndcg = _mean(quality.ndcg(rank, labels)), _mean(quality.ndcg(judged, labels))
        believed = teacher_ndcg > rank_ndcg  # a teacher that knows less than the ranker has nothing to teach
        if believed:
            soft = self._timed("labels", lambda: self._label(teacher, train))
            train = [replace(one, teacher=scores) for one, scores in zip(train, soft, strict=True)]

        student = self._network(c.hidden_size, c.num_layers, c.expert_width)
        loss = self._timed("student", lambda: self._fit_student(student, train))
        raw = fit.predict(student, self.data, validation, c.batch_lists)
        weight = quality.choose_weight(rank, raw, labels, self.seed)
        blended = [blend(a, b, weight) for a, b in zip(rank, raw, strict=True)]
        scale, bias = quality.platt(np.concatenate(raw[::2]), np.concatenate(labels[::2]))
        held_raw, held_label = np.concatenate(raw[1::2] or raw), np.concatenate(labels[1::2] or labels)
        report: dict[str, Any] = {
            "queries": {"train": len(train), "validation": len(validation)},
            "ndcg@10": {
                "rank": rank_ndcg,
                "teacher": teacher_ndcg,
                "student": _mean(quality.ndcg(raw, labels)),
                "blended": _mean(quality.ndcg(blended, labels)),
            },
            "blend_weight": weight,
            "teacher": {**teacher.facts, "beats_rank": believed},
            "active_parameters": {"student": _active(student), "teacher": teacher_active},
            "expert_usage": fit.expert_usage(student, self.data, validation[:32]),
            "ece": {"raw": _rounded(quality.ece(held_raw, held_label)),
                    "calibrated": _rounded(quality.ece((scale * held_raw + bias).astype(np.float32), held_label))},
            "loss": round(loss, 4),
            "seed": self.seed,
        }  # fmt: skip
        self._timed("write", lambda: self._write(student, out_dir, version, report, (scale, bias)))
        return {**report, "version": version, "seconds": self.seconds}

    def _teach(self, train: Sequence[fit.Chosen]) -> tuple[Teacher, int]:
        c = self.config
        network = self._network(c.teacher_hidden_size, c.teacher_layers, c.teacher_expert_width)
        return Qwen3MoeTeacher.train(network, self.data, train, c, self.seed), _active(network)

    def _label(self, teacher: Teacher, chosen: Sequence[fit.Chosen]) -> list[fit.Scores]:
        return teacher.label(self.lists, [c.query for c in chosen], [c.rows for c in chosen])

    def _fit_student(self, student: TrainableReranker, train: Sequence[fit.Chosen]) -> float:
        epochs = self.config.student_epochs
        return fit.train(student, self.data, train, self.config, epochs=epochs, seed=self.seed + 1, what="student")

    def _network(self, hidden: int, layers: int, width: int) -> TrainableReranker:
        c = self.config
        extras = Extras(hidden, FEATURE_NAMES, self.vectors[1].shape[1], c.soft_tokens)
        sample = [self.lists.features(self.lists.rows(q)) for q in self.split.train]
        extras.start_as_ranker(torch.from_numpy(np.concatenate(sample)), INIT_STD)
        return build(
            self.tokenizer, self.prompt.tail, extras, hidden_size=hidden, layers=layers, experts=c.num_experts,
            experts_per_token=c.experts_per_token, expert_width=width,
        )  # fmt: skip

    def _tokenizer(self) -> Tokenizer:
        histories = [self.lists.history_text[q] for q in self.split.train]
        texts = dict.fromkeys([*self.item_texts, *self.lists.item_text, *histories])
        return checkpoint.train_tokenizer(list(texts), self.config.vocab_size)

    def _write(
        self,
        student: TrainableReranker,
        out: Path,
        version: str,
        report: dict[str, Any],
        calibration: tuple[float, float],
    ) -> None:
        out.mkdir(parents=True, exist_ok=True)
        student.lm.save_pretrained(out)
        self.tokenizer.save(str(out / "tokenizer.json"))
        names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
        tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
        (out / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=1), "utf-8")
        save_file(student.extras.state_dict(), out / "extras.safetensors")
        config = ModelConfig.from_json(checkpoint.read_json(out / "config.json"), str(out))
        model = Model(config, checkpoint.read_model_tensors(out, config))
        yes, no = (checkpoint.label_token(self.tokenizer, word, out) for word in ("yes", "no"))
        ours = Checkpoint(
            model=model, tokenizer=self.tokenizer, yes=yes, no=no, card=None, extras=student.extras, items=None
        )
        vectors = self._catalogue_vectors()
        with torch.inference_mode():
            parts = [
                encode_items(ours, self.prompt, self.item_texts[i : i + _ENCODE_ITEMS], vectors[i : i + _ENCODE_ITEMS])
                for i in range(0, len(self.items), _ENCODE_ITEMS)
            ]
        empty = torch.empty(0, self.config.soft_tokens, config.hidden_size)
        checkpoint.write_items(out / "items.safetensors", self.items.item_key, torch.cat([empty, *parts]))
        Card(
            version=version,
            feature_names=FEATURE_NAMES,
            soft_tokens=self.config.soft_tokens,
            embedding_dim=self.vectors[1].shape[1],
            prefix_tokens_max=self.config.prefix_tokens_max,
            item_tokens_max=self.config.item_tokens_max,
            calibration_scale=calibration[0],
            calibration_bias=calibration[1],
            blend_weight=report["blend_weight"],
            known_answer=self._known_answer(student, vectors, calibration),
            report=report,
        ).write(out / "double11.json")

    def _catalogue_vectors(self) -> torch.Tensor:
        """Collaborative embeddings [M, C] of the catalogue, NaN rows where there is none."""
        key, vectors = self.vectors
        found = np.full((len(self.items), vectors.shape[1]), np.nan, np.float32)
        rows = self.items.rows(key)
        found[rows[rows >= 0]] = vectors[rows >= 0]
        return torch.from_numpy(found)

    def _known_answer(
        self, student: TrainableReranker, vectors: torch.Tensor, calibration: tuple[float, float]
    ) -> dict[str, Any]:
        """A request and the scores that transformers' module gives it; serving must give the same."""
        ids = self.items.column("item_id")[:_KNOWN_ANSWER_ITEMS]
        texts = [*self.item_texts[: len(ids)], "an item the catalogue does not know"]
        n, as_of_us = len(texts), 1_700_000_000_000_000
        history = [
            HistoryItem(item_id="", text=text or "nothing", event_type=2 + i % 4, event_time_us=as_of_us - i * 10**11)
            for i, text in reversed(list(enumerate(texts)))
        ]
        features = np.stack([np.linspace(-1, 1, n), self.lists.rank_score[:1].repeat(n), np.arange(n)], 1)
        features[0, 0] = np.nan
        probe = Lists(
            query_id=["known-answer"], query_time_us=np.array([as_of_us]),
            history_text=[history_text(history, as_of_us)],
            offsets=np.array([0, n]), item_id=[*ids, ""], item_text=texts, item_embedding=np.empty((n, 0), np.float32),
            retrieval_score=features[:, 0].astype(np.float32), rank_score=features[:, 1].astype(np.float32),
            origin=[""] * n, label=np.zeros(n, np.float32),
        )  # fmt: skip
        embedding = np.full((n, vectors.shape[1]), np.nan, np.float32)
        embedding[: len(ids)] = vectors[: len(ids)].numpy()
        data = Encoded(probe, self.prompt, embedding)
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

    def _timed(self, what: str, step: Any) -> Any:
        started_s = time.perf_counter()
        value = step()
        self.seconds[what] = round(time.perf_counter() - started_s, 1)
        return value


def _split(lists: Lists, config: DistillConfig, seed: int) -> _Split:
    """Validation = the fewest last query times that hold `validation_share` of the queries.

    A list without a positive among its best `depth` rows has no order to learn, and is left out.
    """
    times, counts = np.unique(lists.query_time_us, return_counts=True)
    late = np.flatnonzero(np.cumsum(counts[::-1])[::-1] >= config.validation_share * len(lists)).max()
    positive = np.array([(lists.label[lists.rows(q)[: config.depth]] > 0).any() for q in range(len(lists))])
    is_late = lists.query_time_us >= times[late]
    rng = np.random.default_rng(seed)

    def draw(mask: npt.NDArray[np.bool_], at_most: int) -> list[int]:
        return [int(q) for q in np.sort(rng.permutation(np.flatnonzero(mask))[:at_most])]

    train = draw(positive & ~is_late, config.train_queries_max)
    validation = draw(positive & is_late, config.validation_queries_max)
    if not train or not validation:
        raise BadInput(
            "lists",
            came=f"{len(times)} query times; with a positive: {len(train)} lists before, {len(validation)} in the last",
            expected="lists with positives both before and in the last block of query_time",
            fix="Make lists of two windows or more.",
        )
    return _Split(train, validation)


def _common_space(lists: Lists, vectors: ItemVectors | None) -> tuple[ItemVectors, npt.NDArray[np.float32]]:
    """The reference vectors by item key, and the rows' embeddings rotated into their space."""
    embedding, key = lists.item_embedding, keys(lists.item_id)
    if not embedding.shape[1]:
        return (np.empty(0, np.int64), np.empty((0, 0), np.float32)), embedding
    block = np.repeat(np.arange(len(lists)), np.diff(lists.offsets))
    block = np.unique(lists.query_time_us, return_inverse=True)[1][block]
    if vectors is None:
        known = np.flatnonzero(~np.isnan(embedding).any(axis=1) & (block == block.max()))
        latest, first = np.unique(key[known], return_index=True)
        vectors = (latest, embedding[known[first]])
    if vectors[1].shape[1] != embedding.shape[1]:
        raise BadInput(
            "item vectors", came=f"width {vectors[1].shape[1]}", expected=f"the lists' {embedding.shape[1]}",
            fix="Make the lists with the run whose tower is served.",
        )  # fmt: skip
    if not len(vectors[0]) or block.max() >= _BLOCKS_MAX:
        return vectors, embedding
    return vectors, align(embedding, block, key, vectors)


def _active(model: TrainableReranker) -> int:
    config = ModelConfig.from_json(model.lm.config.to_dict(), "student")
    return config.active_parameters()


def _mean(values: npt.NDArray[np.float64]) -> float:
    return _rounded(float(values.mean()))


def _rounded(value: float) -> float:
    return round(value, 5)
