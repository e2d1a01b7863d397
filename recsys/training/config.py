"""[training]: settings of `double11 train`. Light: read by the command line without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from recsys.core.config import in_range, section

AUTO = "auto"
_MINUTE_DAYS = 1 / 1440


@section("training")
@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """How a run is trained. The same data, seed, settings, threads and number of processes give the same bytes.

    windows: stacked windows for ranker data, the last one is validation until the final refit.
    window_days: 0 = a tenth of the data's span, between 1 and 30 days; of data of less than three days the tenth, or as
    short as still has `queries_per_window_max` users, an hour at least. Else a minute to 366 days.
    positives: what the ranker is to foresee, as in `replay --positives`; auto = purchases where 100 users of a window
    make one, on average, else any action.
    queries_per_window_max, candidates_max: bounds of the ranker's training lists.
    ranker_steps_min, ranker_steps_max: small data gets more epochs, large data fewer (one at least).
    ranker_heads_share: how much of the gradients of heads that foresee other behaviours than the target reaches what
    they have in common with it; 0 = they learn from the target's hidden layer and teach it nothing.
    tower_examples_max: (user, time) pairs per epoch, newest kept.
    tower_batch: examples of all processes together.
    tower_half_life_days: an example so much older than the newest counts half; 0 = age does not matter.
    device, sharding: of the tower's tables; auto = row-wise on CPU, on CUDA as TorchRec's planner chooses.
    column_wise leaves tables of less than 256 columns whole, and the halves of others have accumulators of their own.
    checkpoint_steps: tower steps between checkpoints, from which a killed training goes on; 0 = none.
    """

    windows: int = 5
    window_days: float = 0.0
    positives: str = AUTO
    queries_per_window_max: int = 1_000
    candidates_max: int = 300
    tower_epochs: int = 2
    tower_examples_max: int = 200_000
    tower_batch: int = 512
    tower_half_life_days: float = 0.0
    tower_learning_rate: float = 0.003
    tower_table_learning_rate: float = 0.3
    ranker_epochs: int = 8
    ranker_steps_min: int = 80
    ranker_steps_max: int = 1_200
    ranker_batch_queries: int = 32
    ranker_rows_per_query: int = 128
    ranker_learning_rate: float = 0.003
    ranker_weight_decay: float = 0.01
    ranker_table_learning_rate: float = 0.01
    ranker_heads_share: float = 0.0
    threads: int = 1
    device: Literal["cpu", "cuda"] = "cpu"
    sharding: Literal["auto", "row_wise", "table_wise", "column_wise"] = "auto"
    checkpoint_steps: int = 500

    def __post_init__(self) -> None:
        in_range("training.windows", self.windows, 2, 100, fix="One window trains and one validates, at least.")
        in_range("training.window_days", self.window_days, _MINUTE_DAYS if self.window_days else 0, 366)
        in_range("training.queries_per_window_max", self.queries_per_window_max, 1, 10_000_000)
        in_range("training.candidates_max", self.candidates_max, 1, 10_000)
        in_range("training.tower_epochs", self.tower_epochs, 1, 1_000)
        in_range("training.tower_examples_max", self.tower_examples_max, 1, 1 << 40)
        in_range("training.tower_half_life_days", self.tower_half_life_days, 0, 1e6)
        in_range("training.tower_batch", self.tower_batch, 2, 1 << 20)
        in_range("training.tower_learning_rate", self.tower_learning_rate, 1e-7, 10)
        in_range("training.tower_table_learning_rate", self.tower_table_learning_rate, 1e-7, 10)
        in_range("training.ranker_table_learning_rate", self.ranker_table_learning_rate, 1e-7, 10)
        in_range("training.ranker_heads_share", self.ranker_heads_share, 0, 1)
        in_range("training.ranker_epochs", self.ranker_epochs, 1, 1_000)
        in_range("training.ranker_steps_min", self.ranker_steps_min, 1, 1_000_000)
        in_range("training.ranker_steps_max", self.ranker_steps_max, self.ranker_steps_min, 10_000_000)
        in_range("training.ranker_batch_queries", self.ranker_batch_queries, 1, 1 << 20)
        in_range("training.ranker_rows_per_query", self.ranker_rows_per_query, 2, 10_000)
        in_range("training.ranker_weight_decay", self.ranker_weight_decay, 0, 10)
        in_range("training.ranker_learning_rate", self.ranker_learning_rate, 1e-7, 10)
        in_range("training.threads", self.threads, 1, 1_024)
        in_range("training.checkpoint_steps", self.checkpoint_steps, 0, 1 << 40)


@section("training.online")
@dataclass(frozen=True, kw_only=True, slots=True)
class OnlineConfig:
    """`double11 train-online`.

    interval_s: samples are collected that long, or up to samples_max, for one delta. batch: examples of one step;
    negatives_min: uniform negatives of a smaller batch. whole_commits: every so often a commit holds all that changed.
    seen_samples_max: repeats of a sample are found that far back. idle_ms: pause when nothing came.
    index_rows_max: rows of each index (Swing, trending, popular) made anew in a delta, 0 = none.
    index_users_max: shoppers remembered for them.
    metrics_port: Prometheus text over HTTP on metrics_host, 0 = off.
    """

    interval_s: float = 5.0
    samples_max: int = 16_384
    batch: int = 256
    negatives_min: int = 64
    learning_rate: float = 0.0003
    table_learning_rate: float = 0.03
    whole_commits: int = 100
    seen_samples_max: int = 1_000_000
    index_rows_max: int = 1_024
    index_users_max: int = 200_000
    store_timeout_ms: float = 5_000.0
    idle_ms: int = 50
    seed: int = 0
    threads: int = 1
    metrics_host: str = "127.0.0.1"
    metrics_port: int = 0

    def __post_init__(self) -> None:
        in_range("training.online.interval_s", self.interval_s, 0.01, 3_600)
        in_range("training.online.samples_max", self.samples_max, 1, 1 << 24)
        in_range("training.online.batch", self.batch, 1, 1 << 20)
        in_range("training.online.negatives_min", self.negatives_min, 1, 1 << 20)
        in_range("training.online.learning_rate", self.learning_rate, 1e-9, 10)
        in_range("training.online.table_learning_rate", self.table_learning_rate, 1e-9, 10)
        in_range("training.online.whole_commits", self.whole_commits, 1, 1 << 20)
        in_range("training.online.seen_samples_max", self.seen_samples_max, 1, 1 << 28)
        in_range("training.online.index_rows_max", self.index_rows_max, 0, 1 << 20)
        in_range("training.online.index_users_max", self.index_users_max, 1, 1 << 28)
        in_range("training.online.store_timeout_ms", self.store_timeout_ms, 1, 600_000)
        in_range("training.online.idle_ms", self.idle_ms, 1, 10_000)
        in_range("training.online.threads", self.threads, 1, 1_024)
        in_range("training.online.metrics_port", self.metrics_port, 0, 65_535)
