"""The candidate lists of the stacked windows: each from a run and a store that know nothing from its start on."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from feature_store.online.memory import MemoryStore
from recsys.core import BadInput, EventBatch
from recsys.core.logging import get_logger
from recsys.data import Dataset
from recsys.evaluation import make_queries, parse_positives
from recsys.evaluation.queries import ANY_POSITIVE, TASKS
from recsys.pipeline import ARMS
from recsys.ranking.features import FEATURE_NAMES
from recsys.training.base_run import found_window_run, iso, known_events, window_run
from recsys.training.config import AUTO, TrainingConfig
from recsys.training.fusion import learn_fusion
from recsys.training.rank_lists import ARM, COLUMNS, RankLists, bit_of, collect
from recsys.training.settings import Settings
from recsys.training.windows import DAY_US, HOUR_US, Window, span_us, stacked, window_length_us

_log = get_logger(__name__)
# lists of other features or columns are made anew
_FORM = hashlib.sha256(",".join((*FEATURE_NAMES, *COLUMNS)).encode()).hexdigest()[:8]
_PURCHASERS_MIN = 100  # of a window, on average: with fewer there is nothing to learn from, and nothing to judge it by


def window_starts(dataset: Dataset, until_us: int, settings: Settings) -> list[Window]:
    """The stacked windows of a dataset before `until_us`, oldest first."""
    config = settings.training
    first_us = span_us(times_us(dataset, until_us))[0]
    length_us = window_length_us(first_us, until_us, config.window_days)
    if not config.window_days and HOUR_US < length_us < DAY_US:
        length_us = _shortened(dataset, until_us, length_us, config.queries_per_window_max)
    return stacked(first_us, until_us, windows=config.windows, length_us=length_us)


def times_us(dataset: Dataset, until_us: int | None = None) -> npt.NDArray[np.int64]:
    """When the events before `until_us` happened, all of them by default; microseconds UTC, at least one."""
    times = dataset.events(before_us=until_us)["event_time"].dt.epoch("us").to_numpy()
    return times if len(times) else np.array([dataset.first_event_us])


def _shortened(dataset: Dataset, until_us: int, length_us: int, enough: int) -> int:
    """The length, halved down to an hour while at least `enough` users act in the last window of it.

    Where the data lasts hours, several of them take most of what anybody did away from the first window's users; more
    users than lists are made of teach nothing.
    """
    acted = known_events(dataset, until_us).select("user_id", at=pl.col("event_time").dt.epoch("us"))
    while length_us > HOUR_US:
        half_us = max(length_us // 2, HOUR_US)
        if acted.filter(pl.col("at") >= until_us - half_us)["user_id"].n_unique() < enough:
            break
        length_us = half_us
    return length_us


def window_lists(
    dataset: Dataset,
    windows: list[Window],
    positives: tuple[str, ...],
    *,
    seed: int,
    settings: Settings,
    work: Path,
    ahead: bool = False,
) -> list[RankLists]:
    """The candidate lists of every window, oldest first; one feature store is folded forward from start to start.

    Each window's sources are fused as the windows before it teach. positives: from `foreseen`. They are left in `work`
    for whoever asks next. ahead: while others still make runs of windows, up to the first whose run is not there yet.
    Raises: BadInput when no window has a query, unless `ahead`.
    """
    store, folded_us = MemoryStore(), None
    unknown: list[EventBatch] = []  # had happened, and is learnt later
    lists = []
    for window in windows:
        if ahead:
            run = found_window_run(dataset, window.from_us, seed=seed, settings=settings, work=work)
        else:
            run, _ = window_run(dataset, window.from_us, seed=seed, settings=settings, work=work)
        if run is None:
            break
        # from the first window on: those before this one have taught how its sources are fused
        span = f"{window.to_us}-{windows[0].from_us}"
        kept = work / f"lists-{run.run_id}-{span}-{'+'.join(positives)}-{_FORM}.safetensors"
        if kept.is_file():
            lists.append(RankLists.load(kept))
            continue
        happened = itertools.chain(unknown, dataset.event_batches(before_us=window.from_us, from_us=folded_us))
        folded_us, unknown = window.from_us, []
        for batch in happened:
            known = batch.numpy("known_at") < window.from_us
            store.apply(batch.filter(known))
            unknown.append(batch.filter(~known))
        queries = window_queries(dataset, window, positives, settings.training, seed)
        if queries.is_empty():
            _log.warning("window_without_queries", start=iso(window.from_us), end=iso(window.to_us))
            continue
        fusion = learn_fusion(lists, ARMS[ARM].feeds) if lists else None
        most = settings.training.candidates_max
        lists.append(collect(queries, run, store, candidates_max=most, seed=seed, fusion=fusion))
        lists[-1].save(kept)
    if not lists and not ahead:
        raise BadInput(
            "training windows",
            came=f"nobody who acted both before and in one of {len(windows)} windows",
            expected="users who come back",
            fix="Pass a longer --window-days, other training.positives, or more data.",
        )
    return lists


def foreseen(dataset: Dataset, windows: list[Window], config: TrainingConfig) -> tuple[str, ...]:
    """The behaviours that the ranker is to foresee: `config.positives`, where auto means purchases if they are enough.

    Purchases by few users teach less about purchases than all actions by many do.
    """
    if config.positives != AUTO:
        return parse_positives(config.positives)
    events = known_events(dataset, windows[-1].to_us)
    users = [len(make_queries(events, from_us=w.from_us, to_us=w.to_us, positives=("purchase",))) for w in windows]
    enough = sum(users) >= _PURCHASERS_MIN * len(windows)
    _log.info("ranker_foresees", positives="purchase" if enough else "any", purchasers=sum(users), windows=len(windows))
    return parse_positives("purchase" if enough else "any")


def window_queries(
    dataset: Dataset, window: Window, positives: tuple[str, ...], config: TrainingConfig, seed: int
) -> pl.DataFrame:
    """The users asked about in a window and what they acted on, for either task: columns as for `collect`."""
    events = known_events(dataset, window.to_us)  # the windows after this one, and the run, learn from it
    tasks = [
        make_queries(
            events,
            from_us=window.from_us,
            to_us=window.to_us,
            positives=positives,
            task=task,
            queries_max=config.queries_per_window_max,
            seed=seed,
        ).with_columns(new_only=pl.lit(task == "new-only"))
        for task in TASKS
    ]
    return pl.concat(tasks).join(_acted(events, window), on="user_id", how="left", maintain_order="left")


def _acted(events: pl.DataFrame, window: Window) -> pl.DataFrame:
    """All that each user did in a window, whatever is to be foreseen: user_id, and lists `acted_id`, `acted_bits`."""
    at = pl.col("event_time").dt.epoch("us")
    done = events.filter(
        at.is_between(window.from_us, window.to_us, closed="left"), pl.col("event_type").is_in(ANY_POSITIVE)
    )
    bit = pl.col("event_type").replace_strict({b: bit_of(b) for b in ANY_POSITIVE}, return_dtype=pl.UInt8)
    pairs = done.select("user_id", "item_id", bit=bit).drop_nulls().unique()
    items = pairs.group_by("user_id", "item_id").agg(pl.col("bit").sum()).sort("user_id", "item_id")
    return items.group_by("user_id", maintain_order=True).agg(acted_id="item_id", acted_bits="bit")
