"""Scores candidates with a checkpoint, in this process: shared prefix, soft tokens, batches. Heavy: torch.

A request becomes one prefix (instruction and history), computed once and kept in a cache bounded in bytes, and N short
suffixes that see the prefix and themselves. All suffix tokens of a batch go through the layers together.

Shape legend: N candidates of a request, T tokens, D hidden, F features.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llm_reranker.attention import KeyValues, PackedCausal, SharedPrefix, WithPrefixes
from llm_reranker.base import RerankRequest, RerankResult
from llm_reranker.checkpoint import Checkpoint
from llm_reranker.config import RerankConfig
from llm_reranker.graphs import Graphs
from llm_reranker.prefix_cache import PrefixCache
from llm_reranker.prompt import Prompt, history_text, item_texts
from llm_reranker.score_cache import ScoreCache
from llm_reranker.speed import SpeedModel
from recsys.core import metrics
from recsys.core.errors import BadInput, DeadlineExceeded, Double11Error, Internal
from recsys.core.ids import keys
from recsys.core.items import ItemTable
from recsys.core.logging import get_logger

Scores = npt.NDArray[np.float32]
_Ids = tuple[int, ...]
_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A request as the layers want it: of its first `depth` candidates those whose scores are not known.

    known: scores of the first `depth`, NaN for those to be computed. keys: of those in the score cache.
    """

    prefix: tuple[int, ...]
    known: Scores
    keys: list[bytes]
    suffix_TD: Tensor
    lengths: list[int]
    signals_NX: Tensor | None


class Engine:
    """Computes scores with one checkpoint; plain functions, no waiting, not thread-safe (one thread owns it)."""

    def __init__(self, loaded: Checkpoint, items: ItemTable, config: RerankConfig, *, version: str) -> None:
        """items: for texts that a request leaves empty. version: the name answers carry."""
        self.version, self._loaded, self._items, self._config = version, loaded, items, config
        card = loaded.card
        self.feature_names: tuple[str, ...] = card.feature_names if card else ()
        self.blend_weight = card.blend_weight if card else 1.0
        prefix_max = card.prefix_tokens_max if card else config.prefix_tokens_max
        self._item_tokens_max = card.item_tokens_max if card else config.item_tokens_max
        if prefix_max + self._item_tokens_max + 32 > loaded.model.positions:
            raise BadInput(
                "[llm_reranker] prefix_tokens_max + item_tokens_max",
                came=prefix_max + self._item_tokens_max,
                expected=f"at most {loaded.model.positions - 32}, the model's positions",
                fix="Lower them.",
            )
        self.prompt = Prompt(loaded.tokenizer, prefix_tokens_max=prefix_max, item_tokens_max=self._item_tokens_max)
        self._direction_D = loaded.model.label_direction(loaded.yes, loaded.no)
        self._device = loaded.model.device
        self._tail_TD = loaded.model.embed(self._ids(self.prompt.tail)).float()
        recorded = self._device.type == "cuda" and config.cuda_graphs_max
        self._graphs = Graphs(loaded.model, graphs_max=config.cuda_graphs_max) if recorded else None
        self._cache = PrefixCache(config.prefix_cache_bytes_max)
        self._scores = ScoreCache(config.score_cache_items_max)
        self.speed = SpeedModel()
        self._prefix_tokens_max = prefix_max

    @property
    def suffix_tokens(self) -> int:
        """Tokens per candidate, at most: what a request's cost is estimated with."""
        card = self._loaded.card
        return ((card.soft_tokens if card else 0) or self._item_tokens_max) + len(self.prompt.tail)

    def cost_tokens(self, request: RerankRequest) -> int:
        """Tokens a request will take at most, prefix not cached."""
        return self._prefix_tokens_max + len(request.item_ids) * self.suffix_tokens

    def forget_scores(self) -> None:
        """Empty the score cache: what is asked next is computed."""
        self._scores = ScoreCache(self._config.score_cache_items_max)

    def affordable_tokens(self, remaining_ms: float) -> int:
        """Tokens that fit the time by the measured speed, whatever number of batches they take."""
        return self.speed.affordable_tokens(remaining_ms)

    def check(self, request: RerankRequest) -> None:
        """Raise BadInput for a request outside the limits of rerank.proto."""
        n, f = len(request.item_ids), len(self.feature_names)
        if n > self._config.candidates_max:
            raise BadInput(
                "rerank candidates", came=n, expected=f"0 to {self._config.candidates_max}", fix="Send the best ones."
            )
        if len(request.texts) != n or request.features.shape != (n, f):
            raise BadInput(
                "rerank candidates",
                came=f"{n} ids, {len(request.texts)} texts, features {request.features.shape}",
                expected=f"as many texts as ids and features ({n}, {f}) = {self.feature_names}",
                fix="Fill the features named by the reranker, NaN where missing.",
            )

    def score(
        self, requests: Sequence[RerankRequest], queue_ms: Sequence[float], tokens_max: int | None = None
    ) -> list[RerankResult | Double11Error]:
        """Answers of a batch. Where `tokens_max` is too small, the first request is cut to the depth that fits."""
        started_s = time.perf_counter()
        with torch.inference_mode():
            depths = [len(r.item_ids) for r in requests]
            if tokens_max is not None and self._config.adaptive_depth:
                room = tokens_max - sum(map(self.cost_tokens, requests[1:])) - self._prefix_tokens_max
                depths[0] = min(depths[0], room // self.suffix_tokens)
                if depths[0] <= 0:
                    self.speed.refused()
                    late = DeadlineExceeded(
                        "rerank", came=f"time for {tokens_max} tokens", expected="time for one candidate",
                        fix="Send a longer deadline, or take the ranker's order.",
                    )  # fmt: skip
                    rest = self.score(requests[1:], queue_ms[1:], tokens_max) if len(requests) > 1 else []
                    return [late, *rest]
            batch = [self._prepare(r, d) for r, d in zip(requests, depths, strict=True)]
            cached = [len(p.prefix) if p.prefix in self._cache else 0 for p in batch]
            scored, tokens = self._forward(batch)
        compute_ms = (time.perf_counter() - started_s) * 1e3
        if tokens:
            self.speed.observe(tokens, compute_ms)
        metrics.RERANK_BATCH_ITEMS.observe(sum(depths))
        metrics.RERANK_BATCH_TOKENS.observe(tokens)
        results: list[RerankResult | Double11Error] = []
        for request, depth, wait_ms, values, hit in zip(requests, depths, queue_ms, scored, cached, strict=True):
            metrics.RERANK_QUEUE_MS.observe(wait_ms)
            metrics.RERANK_DEPTH.observe(depth)
            if depth < len(request.item_ids):
                metrics.RERANK_CUT.inc()
            scores = np.full(len(request.item_ids), np.nan, np.float32)
            scores[:depth] = values
            if not np.isfinite(values).all():
                results.append(
                    Internal("rerank", came="a score that is not finite", expected="numbers", fix="Report it.")
                )
                continue
            results.append(
                RerankResult(
                    scores=scores,
                    depth=depth,
                    version=self.version,
                    queue_ms=wait_ms,
                    compute_ms=compute_ms,
                    cached_prefix_tokens=hit,
                )
            )
        return results

    def _forward(self, batch: list[_Prepared]) -> tuple[list[Scores], int]:
        """Scores per request, and the tokens that were computed."""
        live = [p for p in batch if p.lengths]
        if not live:
            return [p.known for p in batch], 0
        found = {p.prefix: self._cache.get(p.prefix) for p in live}
        missing = [ids for ids, kv in found.items() if kv is None]
        computed, hidden_ND = self._states(live, found, missing)
        for ids, kv in computed.items():
            self._cache.put(ids, kv)
        raw_N = hidden_ND.float() @ self._direction_D
        if (extras := self._loaded.extras) and (card := self._loaded.card):
            signals_NX = torch.cat([p.signals_NX for p in live if p.signals_NX is not None])
            raw_N = card.calibration_scale * (raw_N + extras.score(signals_NX)[:, 0]) + card.calibration_bias
        for p, raw in zip(live, torch.split(raw_N.cpu(), [len(p.lengths) for p in live]), strict=True):
            scores = raw.numpy()
            p.known[np.isnan(p.known)] = scores
            if p.keys:
                self._scores.put(p.keys, scores)
        return [p.known for p in batch], sum(map(len, missing)) + sum(len(p.suffix_TD) for p in live)

    def _states(
        self, live: list[_Prepared], found: Mapping[_Ids, KeyValues | None], missing: list[_Ids]
    ) -> tuple[dict[_Ids, KeyValues], Tensor]:
        """Keys and values of the missing prefixes, and the final states [N, D] of all candidates' last tokens."""
        model, known = self._loaded.model, {ids: kv for ids, kv in found.items() if kv is not None}
        if self._graphs is not None:
            try:
                computed = {ids: self._graphs.prefix(ids) for ids in missing}
                kept = known | computed
                parts = [self._graphs.states(kept[p.prefix], p.suffix_TD, p.lengths) for p in live]
            except RuntimeError as error:  # of a device, or a kernel for it, that cannot be recorded
                _log.warning("cuda_graphs_off", reason=str(error))
                metrics.RERANK_GRAPHS_OFF.inc()
                self._graphs = None
            else:
                return computed, torch.cat(parts)
        packed = PackedCausal([len(ids) for ids in missing], states=False, device=self._device)
        computed = dict(zip(missing, packed.kept, strict=True))  # filled while the candidates are computed
        kept = known | computed
        prefixes, tokens = [kept[p.prefix] for p in live], sum(map(len, missing))
        shared = SharedPrefix(prefixes, [p.lengths for p in live], last_only=True, device=self._device)
        new_TD = model.embed(self._ids([i for ids in missing for i in ids]))
        steps = [torch.arange(len(ids)) for ids in missing]
        steps += [len(p.prefix) + torch.arange(n) for p in live for n in p.lengths]
        position_T = torch.cat(steps).to(self._device)
        attention = WithPrefixes(packed, tokens, shared) if missing else shared
        return computed, model.hidden(torch.cat([new_TD, *(p.suffix_TD for p in live)]), position_T, attention)

    def _prepare(self, request: RerankRequest, depth: int) -> _Prepared:
        if not depth:
            return _Prepared((), np.empty(0, np.float32), [], torch.empty(0), [], None)
        prefix = self.prompt.prefix(self._context(request))
        ids, texts, features = request.item_ids[:depth], request.texts[:depth], request.features[:depth]
        keys = self._scores.keys(prefix, ids, texts, features)
        known = self._scores.get(keys, depth)
        new = np.flatnonzero(np.isnan(known)).tolist()
        if not new:
            return _Prepared(prefix, known, [], torch.empty(0), [], None)
        bodies = self._bodies([ids[i] for i in new], [texts[i] for i in new])
        lengths = [len(b) + len(self._tail_TD) for b in bodies]
        tails, signals_NX = self._tail_TD.expand(len(new), *self._tail_TD.shape), None
        if extras := self._loaded.extras:
            features_NF = torch.from_numpy(np.ascontiguousarray(features[new], np.float32)).to(self._device)
            context_1PD = self._loaded.model.embed(self._ids(prefix)).float()[None]
            real_1P = torch.ones(1, len(prefix), dtype=torch.bool, device=self._device)
            signals_NX = extras.signals(features_NF[None], torch.stack(bodies)[None], context_1PD, real_1P)[0]
            tails = tails.clone()
            tails[:, -1] += extras.signals_to_hidden(signals_NX)
        suffix_TD = torch.cat([x for body, tail in zip(bodies, tails, strict=True) for x in (body, tail)])
        suffix_TD = suffix_TD.to(self._loaded.model.embed_VD.dtype)
        return _Prepared(prefix, known, [keys[i] for i in new] if keys else [], suffix_TD, lengths, signals_NX)

    def _bodies(self, item_ids: Sequence[str], texts: Sequence[str]) -> list[Tensor]:
        """What stands for each item: its cached soft tokens; else soft tokens of its text; without extras, its text."""
        extras, items = self._loaded.extras, self._loaded.items
        key_N = keys(item_ids)
        if extras is None:
            ids = self.prompt.items(self._texts(key_N, texts))
            return list(
                torch.split(
                    self._loaded.model.embed(self._ids([i for t in ids for i in t])),
                    [len(t) for t in ids],
                )
            )
        rows = items.rows(key_N) if items is not None else np.full(len(key_N), -1)
        soft = torch.empty(len(key_N), extras.soft_tokens, self._loaded.model.config.hidden_size)
        if items is not None:
            soft[rows >= 0] = items.soft_MSD[rows[rows >= 0]]
        if new := np.flatnonzero(rows < 0).tolist():
            texts = self._texts(key_N[new], [texts[i] for i in new])
            nothing = torch.full((len(new), extras.embedding_dim), math.nan)
            soft[new] = encode_items(self._loaded, self.prompt, texts, nothing)
        return list(soft.to(self._device))

    def _ids(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor(ids, dtype=torch.long, device=self._device)

    def _texts(self, key_N: npt.NDArray[np.int64], texts: Sequence[str]) -> list[str]:
        """The given texts, empty ones looked up in the item table."""
        filled, empty = list(texts), [i for i, t in enumerate(texts) if not t]
        if empty:
            for i, text in zip(empty, item_texts(self._items, key_N[empty]), strict=True):
                filled[i] = text
        return filled

    def _context(self, request: RerankRequest) -> str:
        """History as text: the newest actions; a text that is missing is the item's, as in the lists of training."""
        recent = request.history[-self._prefix_tokens_max :]  # a line is more than one token
        texts = self._texts(keys(h.item_id for h in recent), [h.text for h in recent])
        history = [replace(h, text=t) for h, t in zip(recent, texts, strict=True)]
        return history_text(history, request.as_of_us, request.query_text)

    def texts(self, request: RerankRequest) -> tuple[str, list[str]]:
        """A request in words, context and candidates, for a scorer that is elsewhere."""
        return self._context(request), self._texts(keys(request.item_ids), request.texts)


def encode_items(loaded: Checkpoint, prompt: Prompt, texts: Sequence[str], embedding_NC: Tensor) -> Tensor:
    """Soft tokens [N, S, D] of items from their texts and collaborative embeddings (NaN rows = none), on the CPU."""
    assert loaded.extras is not None
    device = loaded.model.device
    ids = prompt.items(texts)
    width = max(1, max(map(len, ids), default=1))
    ids_NL = torch.tensor([[*row, *[0] * (width - len(row))] for row in ids])
    real_NL = torch.arange(width) < torch.tensor([len(row) for row in ids])[:, None]
    text_NLD = loaded.model.embed(ids_NL.to(device)).float()
    return loaded.extras.encode(text_NLD, real_NL.to(device), embedding_NC.to(device)).cpu()
