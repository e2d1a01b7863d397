"""Distils a reranker from candidate lists: teacher, student, calibration, blend weights, folder. Heavy: torch.

Only data before the run's `until` comes in. Validation is the last block of query_time; what is chosen on it (whether
to believe the teacher, calibration, blend weights) is in the report. Each task, all and new-only, has its own lists and
its own weight, and weight 0, the ranker's own order, unless the gain on validation is sure. Seeded: the same input, the
same folder.

Shape legend: R rows of the lists, M items, C collaborative embedding width, n rows of one list.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from tokenizers import Tokenizer

from llm_reranker import ablation, checkpoint, fit, folder, quality
from llm_reranker.config import DistillConfig, RerankConfig, TeacherConfig
from llm_reranker.encoded import Encoded
from llm_reranker.extras import Extras
from llm_reranker.lists import FEATURE_NAMES, Lists, read
from llm_reranker.model import ModelConfig
from llm_reranker.prompt import Prompt, item_texts
from llm_reranker.splits import TASKS, Held, ItemVectors, Split, common_space, held, split, task_of, training
from llm_reranker.teachers import Teacher, parse
from llm_reranker.teachers.labels import Kept, LabelFile
from llm_reranker.teachers.qwen3_moe import Qwen3MoeTeacher
from llm_reranker.trainable import INIT_STD, TrainableReranker, build
from llm_reranker.upcycle import upcycle
from recsys.core.items import ItemTable

T = TypeVar("T")
_USAGE_LISTS = 32
_EPOCHS_TIMES_MAX = 4
_AS_SERVED = ablation.Variant()


def distill(
    lists_path: Path,
    items: ItemTable,
    out_dir: Path,
    *,
    seed: int = 0,
    config: DistillConfig | None = None,
    teacher: str = "qwen3-moe",
    teacher_config: TeacherConfig | None = None,
    labels: Path | None = None,
    item_vectors: ItemVectors | None = None,
    version: str = "1",
    ablate: bool = False,
    until_us: int | None = None,
) -> dict[str, Any]:
    """Train a student on the lists and a teacher's labels, and write the student's folder.

    items: the catalogue, whose soft tokens are computed. teacher: see llm_reranker.teachers. labels: where each
    teacher's label file is kept (None: nowhere). item_vectors: the vectors (item_key [M], float32 [M, C]) that
    serving's tower gives the items; the lists' embeddings are rotated into their space. None: those of the last block.
    ablate: train the students of llm_reranker.ablation too, for the report. until_us: see lists.read.
    Returns the report, which is also in double11.json.
    Raises: BadInput for lists that cannot be split or a teacher that does not exist; Unavailable, Overloaded from a
    teacher, whose labels so far are kept; see lists.read for the rest.
    """
    kind, rest = parse(teacher)
    config = config or DistillConfig()
    started_s = time.perf_counter()
    lists = read(lists_path, until_us=until_us)
    parts = split(lists, config, seed)
    with torch.random.fork_rng():
        work = _Work(lists, items, parts, config, seed, item_vectors)
        asked = work.teacher(kind, rest, teacher_config or TeacherConfig(), _digest(lists_path))
        if labels is not None:
            asked = Kept(asked, LabelFile(labels / re.sub(r"[^\w.-]+", "_", asked.name), asked.name))
        report = work.run(asked, out_dir, version, ablate=ablate)
    report["seconds"]["total"] = round(time.perf_counter() - started_s, 1)
    return report


@dataclass(frozen=True, slots=True)
class Student:
    """A trained student and its raw log-odds of the validation lists, by task."""

    network: TrainableReranker
    loss: float
    raw: Mapping[str, list[fit.Scores]]


class _Work:
    """One distillation: what its steps share."""

    def __init__(
        self,
        lists: Lists,
        items: ItemTable,
        parts: Split,
        config: DistillConfig,
        seed: int,
        vectors: ItemVectors | None,
    ) -> None:
        self.lists, self.items, self.config, self.seed = lists, items, config, seed
        self.item_texts = item_texts(items, items.item_key)
        self._train_queries = sorted(parts.train)
        self.tokenizer = self._tokenizer()
        self.prompt = Prompt(
            self.tokenizer, prefix_tokens_max=config.prefix_tokens_max, item_tokens_max=config.item_tokens_max
        )
        self.vectors, self._embedding_RC = common_space(lists, vectors)
        self.data = self.encoded(_AS_SERVED)
        self.train = training(self.data, parts.train, config.depth)
        self.held: Mapping[str, Held] = {task: held(lists, parts.validation[task], config.depth) for task in TASKS}
        self.seconds: dict[str, float] = {}

    def teacher(self, kind: str, rest: str, config: TeacherConfig, digest: str) -> Teacher:
        """The named teacher; nothing is trained or asked yet."""
        if kind == "hf":
            from llm_reranker.teachers.local import LocalTeacher

            on_cuda = RerankConfig(device="cuda", precision="bf16")
            return LocalTeacher(Path(rest), on_cuda if config.device == "cuda" else RerankConfig())
        if kind == "openai":
            from llm_reranker.teachers.endpoint import EndpointTeacher

            return EndpointTeacher(rest, config, seed=self.seed)
        c = self.config
        learnt = [one.query for one in self.train]
        facts = json.dumps([dataclasses.asdict(c), digest, self.seed, learnt], sort_keys=True)

        def make() -> TrainableReranker:
            return self.network(c, c.teacher_hidden_size, c.teacher_layers, c.teacher_expert_width)

        return Qwen3MoeTeacher(
            make, self.data, self.train, c, seed=self.seed,
            fingerprint=hashlib.sha256(facts.encode() + self.vectors[1].tobytes()).hexdigest()[:16],
            active_parameters=active_parameters(make()),
        )  # fmt: skip

    def run(self, teacher: Teacher, out_dir: Path, version: str, *, ablate: bool) -> dict[str, Any]:
        """Every step in order; the report."""
        judged = self.timed("judge", lambda: {t: self._judged(teacher, self.held[t]) for t in TASKS})
        says = {t: 1.0 if teacher.fitted else self.held[t].weight(judged[t], self.seed) for t in TASKS}
        gains = {t: _gain(self.held[t].blended(judged[t], says[t]), self.held[t], self.seed) for t in TASKS}
        # A teacher that adds nothing to what the ranker knows has nothing to teach.
        believed = {t: g["sure"] for t, g in gains.items()}
        train = self.timed("labels", lambda: self._taught(teacher, believed))
        student = self.timed("student", lambda: self.student(_AS_SERVED, train, self.seed + 1))
        scale, bias, ece = _calibration(student.raw["all"], self.held["all"].label)
        tasks = {t: self._outcome(t, judged[t], says[t], gains[t], student.raw[t]) for t in TASKS}
        report: dict[str, Any] = {
            "queries": {"train": len(train), "validation": len(self.held["all"].chosen)},
            "tasks": tasks,
            "ndcg@10": tasks["all"]["ndcg@10"],
            "blend_weight": tasks["all"]["weight"],
            "teacher": {**teacher.facts, "beats_rank": believed},
            "active_parameters": {
                "student": active_parameters(student.network),
                "teacher": teacher.facts.get("active_parameters", 0),
            },
            "expert_usage": fit.expert_usage(student.network, self.data, self.held["all"].chosen[:_USAGE_LISTS]),
            "ece": ece,
            "loss": round(student.loss, 4),
            "seed": self.seed,
            "config": dataclasses.asdict(self.config),
        }
        if ablate:
            report["ablation"] = self.timed("ablation", lambda: ablation.rows(self, train, student, judged))
        self.timed("write", lambda: folder.write(self, student.network, out_dir, version, report, (scale, bias)))
        return {**report, "version": version, "seconds": self.seconds}

    def student(self, variant: ablation.Variant, train: Sequence[fit.Chosen], seed: int) -> Student:
        """Train a student, and score the validation lists with it."""
        config = replace(self.config, **variant.changes)
        data = self.encoded(variant)
        sizes = (config.hidden_size, config.num_layers, config.expert_width)
        network = self.network(config, *sizes)
        if config.upcycle_epochs:
            dense = self.network(replace(config, num_experts=0, upcycle_epochs=0), *sizes)
            fit.train(dense, data, train, config, epochs=config.upcycle_epochs, seed=seed, what="dense student")
            upcycle(dense.lm, network.lm)
            network.extras.load_state_dict(dense.extras.state_dict())
        epochs = _epochs(len(train), config)
        loss = fit.train(network, data, train, config, epochs=epochs, seed=seed, what="student")
        raw = {t: fit.predict(network, data, self.held[t].chosen, config.batch_lists) for t in TASKS}
        return Student(network, loss, raw)

    def encoded(self, variant: ablation.Variant) -> Encoded:
        """The lists as a student reads them."""
        embedding = self._embedding_RC if variant.embedding else np.full_like(self._embedding_RC, np.nan)
        return Encoded(self.lists, self.prompt, embedding, text=variant.text)

    def network(self, config: DistillConfig, hidden: int, layers: int, width: int) -> TrainableReranker:
        """A fresh network; the same for the same seed, whatever was made before."""
        torch.manual_seed(self.seed)
        extras = Extras(hidden, FEATURE_NAMES, self.vectors[1].shape[1], config.soft_tokens)
        sample = [self.lists.features(self.lists.rows(q)) for q in self._train_queries]
        extras.start_as_ranker(torch.from_numpy(np.concatenate(sample)), INIT_STD)
        return build(
            self.tokenizer, self.prompt.tail, extras, hidden_size=hidden, layers=layers, experts=config.num_experts,
            experts_per_token=config.experts_per_token, expert_width=width,
        )  # fmt: skip

    def timed(self, what: str, step: Callable[[], T]) -> T:
        """The step's value; how long it took goes into the report."""
        started_s = time.perf_counter()
        value = step()
        self.seconds[what] = round(time.perf_counter() - started_s, 1)
        return value

    def _judged(self, teacher: Teacher, of: Held) -> list[fit.Scores]:
        return quality.usable(self._label(teacher, of.chosen), of.rank)

    def _label(self, teacher: Teacher, chosen: Sequence[fit.Chosen]) -> list[fit.Scores]:
        scores: list[fit.Scores] = [np.empty(0, np.float32)] * len(chosen)
        for at, said in teacher.label(self.lists, [c.query for c in chosen], [c.rows for c in chosen]):
            scores[at] = said.log_odds
        return scores

    def _taught(self, teacher: Teacher, believed: Mapping[str, bool]) -> list[fit.Chosen]:
        """The training lists, with soft labels where the teacher beats the ranker.

        A teacher that never saw these shoppers does not know what the ranker says of them either: its soft labels are
        what the two say together, on the scale of what the shoppers did.
        """
        taught = [c for c in self.train if believed[task_of(self.lists, c.query)]]
        soft = self._label(teacher, taught)
        if soft and not teacher.fitted:
            rank = [self.lists.rank_score[c.rows] for c in taught]
            a, b, bias = _beside(rank, soft, [self.lists.label[c.rows] for c in taught])
            soft = [(a * r + b * s + bias).astype(np.float32) for r, s in zip(rank, soft, strict=True)]
        by_query = {c.query: s for c, s in zip(taught, soft, strict=True)}
        return [replace(c, teacher=by_query.get(c.query)) for c in self.train]

    def _outcome(
        self,
        task: str,
        judged: Sequence[fit.Scores],
        teacher_weight: float,
        gain: Mapping[str, Any],
        raw: Sequence[fit.Scores],
    ) -> dict[str, Any]:
        """What validation says of one task."""
        of = self.held[task]
        weight = of.weight(list(raw), self.seed)
        blended = of.blended(raw, weight)
        orders = {"rank": of.rank, "teacher": judged, "student": raw, "blended": blended}
        return {
            "queries": len(of.chosen),
            "ndcg@10": {name: quality.mean_ndcg(scores, of.label) for name, scores in orders.items()},
            "weight": weight,
            "teacher_weight": teacher_weight,
            "teacher_gain": gain,
            "student_gain": _gain(blended, of, self.seed),
        }

    def _tokenizer(self) -> Tokenizer:
        histories = [self.lists.history_text[q] for q in self._train_queries]
        texts = dict.fromkeys([*self.item_texts, *self.lists.item_text, *histories])
        return checkpoint.train_tokenizer(list(texts), self.config.vocab_size)


def _epochs(lists: int, config: DistillConfig) -> int:
    """Enough for the fewest steps that teach anything, within bounds."""
    enough = math.ceil(config.student_steps_min / math.ceil(lists / config.batch_lists))
    return min(max(config.student_epochs, enough), _EPOCHS_TIMES_MAX * config.student_epochs)


def active_parameters(network: TrainableReranker) -> int:
    """Of the language model, per token."""
    return ModelConfig.from_json(network.lm.config.to_dict(), "student").active_parameters()


def _gain(scores: Sequence[fit.Scores], of: Held, seed: int) -> dict[str, Any]:
    if not of.chosen:
        return {"diff": 0.0, "ci95": [0.0, 0.0], "sure": False}
    gain = quality.gain(scores, of.rank, of.label, seed)
    return {"diff": _rounded(gain.diff), "ci95": [_rounded(x) for x in gain.ci95], "sure": quality.is_sure(gain)}


def _platt(scores: Sequence[fit.Scores], labels: Sequence[fit.Scores]) -> tuple[float, float]:
    log_odds, label = np.concatenate(scores), np.concatenate(labels)
    known = np.isfinite(log_odds)
    return quality.platt(log_odds[known], label[known])


def _beside(
    rank: Sequence[fit.Scores], scores: Sequence[fit.Scores], labels: Sequence[fit.Scores]
) -> tuple[float, float, float]:
    log_odds = np.concatenate(scores)
    known = np.isfinite(log_odds)
    return quality.beside(np.concatenate(rank)[known], log_odds[known], np.concatenate(labels)[known])


def _calibration(raw: Sequence[fit.Scores], labels: Sequence[fit.Scores]) -> tuple[float, float, dict[str, float]]:
    """Scale, bias, and the calibration error on lists they were not fitted on."""
    scale, bias = _platt(raw[::2], labels[::2])
    held_raw, held_label = np.concatenate(raw[1::2] or raw), np.concatenate(labels[1::2] or labels)
    ece = {
        "raw": _rounded(quality.ece(held_raw, held_label)),
        "calibrated": _rounded(quality.ece((scale * held_raw + bias).astype(np.float32), held_label)),
    }
    return scale, bias, ece


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _rounded(value: float) -> float:
    return round(float(value), 5)
