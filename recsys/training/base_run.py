"""The part of a run that needs no ranker: items, towers, and every index, all from events before one time.

A window of the stacked rule is such a run; the final run is one with the ranker beside it.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow.parquet as pq

from feature_store.views import VIEW_SET
from recsys.candidates.indexes import build_all, build_online
from recsys.candidates.nearest.static import AnnIndex
from recsys.core import BadInput, CorruptData, NotFound, RunDirectory, RunWriter, VersionMismatch
from recsys.core.hardware import commit, versions
from recsys.core.items import ItemTable
from recsys.data import Dataset
from recsys.models.text.build import versions_of
from recsys.models.tower import Tower
from recsys.training.ranks import Ranks
from recsys.training.settings import Settings
from recsys.training.tower_data import Actions
from recsys.training.tower_trainer import train_tower


def known_events(dataset: Dataset, until_us: int) -> pl.DataFrame:
    """Events that had happened, and were known, strictly before `until_us`.

    Raises: BadInput when there are none.
    """
    events = dataset.events(known_before_us=until_us)
    if events.is_empty():
        raise BadInput(
            f"dataset {dataset.root}",
            came=f"no event before {iso(until_us)}",
            expected="events to learn from",
            fix="Pass a later --until.",
        )
    return events


def manifest_fields(dataset: Dataset, until_us: int, seed: int, settings: Settings, run_id: str) -> dict[str, Any]:
    """Every manifest key but format_version and files; measures are the caller's."""
    return {
        "run_id": run_id,
        "parent": None,
        "dataset_hash": dataset.hash,
        "until": until_us,
        "seed": seed,
        "config": settings.as_dict(),
        "versions": versions() | versions_of(settings.tower),
        "commit": commit(),
        "feature_views": VIEW_SET,
        "measures": {},
    }


def write_base(
    run: RunWriter,
    dataset: Dataset,
    until_us: int,
    *,
    seed: int,
    settings: Settings,
    work: Path,
    ranks: Ranks | None = None,
    online: bool = False,
) -> Tower:
    """Write items.parquet, models/tower.* and index/* of everything before `until_us` into `run`.

    ranks: who trains the towers, this one leading; the others call `join_base`. None = this process alone.
    online: with what online training goes on from; nobody serves the run of a window.
    """
    events = known_events(dataset, until_us)
    items = dataset.item_table(before_us=until_us)
    items.write(run.path("items.parquet"))
    for build in (build_all, build_online) if online else (build_all,):
        for name, table in build(events, items, until_us, covisit_config=settings.covisit).items():
            pq.write_table(table, run.path(f"index/{name}.parquet"))
    tower = train_tower(
        events, items, config=settings.training, model=settings.tower, seed=seed, work=work, ranks=ranks
    )
    tower.save(run.path("models/tower.json").parent)
    item_key, vectors = tower.item_vectors()
    large = len(item_key) > settings.index.exact_items_max
    queries = user_vectors(tower, events, settings.index.tuning_queries) if large else None
    index = AnnIndex.build(item_key, vectors, settings.index, queries=queries)
    index.save(run.path("index/ann.json").parent, str(run.fields["run_id"]))
    return tower


def join_base(dataset: Dataset, until_us: int, ranks: Ranks, *, seed: int, settings: Settings, work: Path) -> None:
    """The part of `write_base` that every rank has: training the towers."""
    events, items = known_events(dataset, until_us), dataset.item_table(before_us=until_us)
    train_tower(events, items, config=settings.training, model=settings.tower, seed=seed, work=work, ranks=ranks)


def user_vectors(tower: Tower, events: pl.DataFrame, num: int) -> npt.NDArray[np.float32] | None:
    """What users asked with just before up to `num` of their actions [num, D]: an index is tuned on it.

    None where nobody has a past.
    """
    actions = Actions.from_events(events)
    with_past = np.flatnonzero(actions.history_stop > actions.history_start)
    drawn = np.sort(np.random.default_rng(0).permutation(with_past)[:num])
    if not len(drawn):
        return None
    return tower.encode_users(actions.histories(drawn, tower.config.history_items_max))


def window_run(
    dataset: Dataset, until_us: int, *, seed: int, settings: Settings, work: Path
) -> tuple[RunDirectory, ItemTable]:
    """The base run of one window start; one that is there, whole and made alike is used again."""
    root, fields = _window(dataset, until_us, seed, settings, work)
    run = _reusable(root, fields)
    if run is None:
        for lists in work.glob(f"lists-{fields['run_id']}-*"):  # made from the run that is replaced
            lists.unlink()
        with RunWriter(root, fields, replace=True) as writer:
            write_base(writer, dataset, until_us, seed=seed, settings=settings, work=work)
        run = RunDirectory.open(root, verify=False)
    return run, ItemTable.read(run.path("items.parquet"))


def found_window_run(
    dataset: Dataset, until_us: int, *, seed: int, settings: Settings, work: Path
) -> RunDirectory | None:
    """The one that `window_run` would use again, if there is one."""
    return _reusable(*_window(dataset, until_us, seed, settings, work))


def iso(time_us: int) -> str:
    """Microseconds UTC as ISO 8601."""
    return datetime.fromtimestamp(time_us / 1e6, UTC).isoformat()


def _window(dataset: Dataset, until_us: int, seed: int, settings: Settings, work: Path) -> tuple[Path, dict[str, Any]]:
    """Folder and manifest of a window's base run."""
    name = f"window-{until_us}"
    return work / name, manifest_fields(dataset, until_us, seed, settings, name)


def _reusable(root: Path, fields: dict[str, Any]) -> RunDirectory | None:
    try:
        run = RunDirectory.open(root)
    except (NotFound, CorruptData, VersionMismatch):
        return None
    return run if all(run.manifest[k] == v for k, v in fields.items()) else None
