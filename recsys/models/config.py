"""Settings of the models. Light: read by the command line and by tests without torch."""

from __future__ import annotations

from dataclasses import dataclass

from recsys.core.config import in_range, section
from recsys.core.errors import BadInput

INDEX_KINDS, INDEX_DEVICES = ("auto", "flat", "hnsw", "ivf"), ("cpu", "cuda")


@section("models.tower")
@dataclass(frozen=True, kw_only=True, slots=True)
class TowerConfig:
    """The two towers. dim: dimension of user and item vectors; heads: attention queries over the history.

    item_rows_max: item ids with a row of their own; the most frequent and recent have one, the others are "some item"
    of their category and brand. 0 = every item with training events. item_admission_count: how often an id has to come
    among 65,536 actions to be given a row.
    text_encoder: what makes vectors of titles: lsa, fitted on the catalogue in at most text_dim directions; else a
    folder in sentence-transformers layout; empty = titles do not count. A vector takes 2 bytes a direction and item.
    text_cache_path: where vectors of a folder's encoder are kept, so that a title is encoded once; empty = in the
    working folder of the run. price: whether prices count.
    """

    dim: int = 64
    heads: int = 4
    history_items_max: int = 50
    temperature: float = 0.1
    item_rows_max: int = 0
    item_admission_count: int = 1
    text_encoder: str = "lsa"
    text_dim: int = 256
    text_cache_path: str = ""
    price: bool = True

    def __post_init__(self) -> None:
        in_range("models.tower.item_rows_max", self.item_rows_max, 0, 1 << 40)
        in_range("models.tower.item_admission_count", self.item_admission_count, 1, 1 << 16)
        in_range("models.tower.dim", self.dim, 2, 4096)
        in_range("models.tower.text_dim", self.text_dim, 2, 1024)
        in_range("models.tower.heads", self.heads, 1, 64)
        in_range("models.tower.history_items_max", self.history_items_max, 1, 512)
        in_range("models.tower.temperature", self.temperature, 1e-3, 10)


@section("models.ranker")
@dataclass(frozen=True, kw_only=True, slots=True)
class RankerConfig:
    """The ranker. dim: item embedding; hidden: width of the deep part; quantiles: points of the quantile transform.

    bins: of the piecewise linear encoding, per feature.
    """

    dim: int = 16
    hidden: int = 32
    quantiles: int = 33
    bins: int = 4
    dropout: float = 0.5
    history_items_max: int = 50

    def __post_init__(self) -> None:
        in_range("models.ranker.dim", self.dim, 2, 1024)
        in_range("models.ranker.hidden", self.hidden, 2, 4096)
        in_range("models.ranker.quantiles", self.quantiles, 3, 1025)
        in_range("models.ranker.bins", self.bins, 0, 64)
        in_range("models.ranker.dropout", self.dropout, 0, 0.9)
        in_range("models.ranker.history_items_max", self.history_items_max, 1, 512)


@section("models.index")
@dataclass(frozen=True, kw_only=True, slots=True)
class IndexConfig:
    """The index of item vectors, as training and every rebuild make it.

    kind: flat (exact), hnsw, ivf (flat below some hundred items), or auto: flat up to exact_items_max items, ivf
    beyond. recall_target at recall_k is what parameters of hnsw and ivf are tuned to, on tuning_queries sample queries
    against the exact scan.
    exact_rows_max: a filter that leaves no more rows than this is scanned exactly. device: cpu, or cuda where faiss-gpu
    is installed (searches run there, by the exact scan).
    """

    kind: str = "auto"
    device: str = "cpu"
    exact_items_max: int = 50_000
    recall_target: float = 0.98
    recall_k: int = 100
    tuning_queries: int = 256
    exact_rows_max: int = 32_768

    def __post_init__(self) -> None:
        for name, value, known in (("kind", self.kind, INDEX_KINDS), ("device", self.device, INDEX_DEVICES)):
            if value not in known:
                what = f"configuration models.index.{name}"
                raise BadInput(what, came=value, expected=f"one of {', '.join(known)}", fix="Correct it.")
        in_range("models.index.exact_items_max", self.exact_items_max, 0, 1 << 31)
        in_range("models.index.recall_target", self.recall_target, 0.1, 1)
        in_range("models.index.recall_k", self.recall_k, 1, 10_000)
        in_range("models.index.tuning_queries", self.tuning_queries, 1, 100_000)
        in_range("models.index.exact_rows_max", self.exact_rows_max, 1, 1 << 31)


@section("models.index.live")
@dataclass(frozen=True, kw_only=True, slots=True)
class LiveIndexConfig:
    """The live index: what may change between two rebuilds of its base.

    delta_items_max: rows of new or changed items beside the base; a writer beyond it is refused until a rebuild is
    done. rebuild_items: delta rows, and rebuild_dead_share: share of dead base rows, that start a rebuild.
    retrain_share: share of items changed or added since the base's quantizers were trained, that trains them again.
    rebuild_threads: of a rebuild, at a low priority, so that searches have the cores first. filters_max: attribute
    filters kept compiled. recall_sample_every: one query in so many is compared with the exact scan, 0 = none;
    recall_queue_items_max: how many of those may wait.
    """

    delta_items_max: int = 131_072
    rebuild_items: int = 20_000
    rebuild_dead_share: float = 0.1
    retrain_share: float = 0.5
    rebuild_threads: int = 1
    filters_max: int = 64
    recall_sample_every: int = 1_000
    recall_queue_items_max: int = 16

    def __post_init__(self) -> None:
        in_range("models.index.live.delta_items_max", self.delta_items_max, 1, 1 << 24)
        in_range("models.index.live.rebuild_items", self.rebuild_items, 1, self.delta_items_max)
        in_range("models.index.live.rebuild_dead_share", self.rebuild_dead_share, 0.001, 1)
        in_range("models.index.live.retrain_share", self.retrain_share, 0, 100)
        in_range("models.index.live.rebuild_threads", self.rebuild_threads, 1, 1_024)
        in_range("models.index.live.filters_max", self.filters_max, 1, 10_000)
        in_range("models.index.live.recall_sample_every", self.recall_sample_every, 0, 1 << 31)
        in_range("models.index.live.recall_queue_items_max", self.recall_queue_items_max, 1, 10_000)
