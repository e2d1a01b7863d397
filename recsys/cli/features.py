"""`double11 features`: read what serving would read, rebuild a store from a dataset."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from recsys.cli.common import config_option, emit, json_option, parse_time_us
from recsys.core.config import Config
from recsys.core.errors import BadInput

if TYPE_CHECKING:
    from feature_store.commit import OffsetStep

_store_option = click.option("--store", help="Feature store URL (default embedded:$DOUBLE11_HOME, else ./.double11).")


@click.group()
def features() -> None:
    """Read and rebuild feature state."""


@features.command()
@_store_option
@click.option("--user", "user_id", help="A user id.")
@click.option("--item", "item_ids", multiple=True, help="An item id; may be repeated.")
@click.option("--as-of", help="ISO time to read at (default: now, by [feature_store] clock).")
@config_option
@json_option
def get(
    store: str | None,
    user_id: str | None,
    item_ids: tuple[str, ...],
    as_of: str | None,
    config_path: Path | None,
    as_json: bool,
) -> None:
    """Print the features that serving would read, with status, event time and age."""
    from feature_store.describe import describe, iso
    from feature_store.online import check_exists, feature_clock, open_reader
    from recsys.core.urls import default_url

    if user_id is None and not item_ids:
        raise BadInput("features get", came="neither --user nor --item", expected="one of them", fix="Name an entity.")
    config, url = Config.load(config_path), store or default_url()
    check_exists(url)
    reader = open_reader(url, config)
    at_us = parse_time_us(as_of, "--as-of")
    at_us = feature_clock(reader, config).now_us() if at_us is None else at_us
    users = [user_id] if user_id is not None else []
    entities = [describe("user", i, b, at_us) for i, b in zip(users, reader.load("user", users), strict=True)]
    entities += [describe("item", i, b, at_us) for i, b in zip(item_ids, reader.load("item", item_ids), strict=True)]
    reader.close()
    document = {"as_of": iso(at_us), "views": reader.view_set, "entities": entities}
    emit(document, as_json=as_json, text=lambda: _text(document))


@features.command()
@click.argument("directory", type=click.Path(path_type=Path))
@_store_option
@click.option(
    "--log", help="Log URL: check that an archive reaches to it, or start a plain dataset at its first record."
)
@click.option("--until", help="Only events known before this ISO time; covers no offsets of a log.")
@config_option
@json_option
def materialize(
    directory: Path, store: str | None, log: str | None, until: str | None, config_path: Path | None, as_json: bool
) -> None:
    """Rebuild the store from an archive or a dataset; readers switch to the result in one step at the end.

    After an archive, `ingest` goes on where it ends. A dataset that was imported covers nothing of a log: `ingest`
    starts at the log's first record, and recognises by their ids the events that it has already.
    """
    from feature_store.materialize import Covered
    from feature_store.materialize import materialize as fold_all
    from feature_store.online import open_rebuildable
    from feature_store.views import VIEW_SET
    from recsys.core import progress
    from recsys.core.urls import default_url
    from recsys.data import Dataset
    from streaming.archive import archived, check_reaches, goes_on, is_archive, starts_at
    from streaming.config import JobConfig
    from streaming.log import open_log, topics_at

    config, url = Config.load(config_path), store or default_url()
    of_log = is_archive(directory) and until is None
    covered = goes_on(directory) if of_log else Covered()
    if log is not None:
        with open_log(log, config) as opened:
            if of_log:
                check_reaches(covered, opened, topics_at(log, config))
            else:
                covered = starts_at(opened, topics_at(log, config))
    dataset = None if of_log else Dataset.open(directory)
    before_us = parse_time_us(until, "--until")
    batches = archived(directory) if dataset is None else dataset.event_batches(known_before_us=before_us)
    total = None if dataset is None else dataset.num_events
    horizon_us = config.get(JobConfig).dedup_horizon_s * 1_000_000
    target = open_rebuildable(url, config)
    try:
        with progress.bar(total=total, what="fold", unit="events") as bar:
            events = fold_all(batches, target, covered, horizon_us=horizon_us, on_batch=bar.update)
    finally:
        target.close()
    document = {"store": url, "views": VIEW_SET, "events": events, "covered": _offsets(covered.offsets)}
    goes = "ingest goes on where the archive ends" if of_log else "ingest starts at the log's first record"
    emit(document, as_json=as_json, text=lambda: f"folded {events:,} events into {url} (views {VIEW_SET}); {goes}")


def _offsets(steps: Sequence[OffsetStep]) -> dict[str, dict[str, int]]:
    """Next offsets by topic and partition, for --json."""
    found: dict[str, dict[str, int]] = {}
    for step in steps:
        found.setdefault(step.topic, {})[str(step.partition)] = step.next
    return found


def _text(document: dict[str, Any]) -> str:
    lines = [f"as of {document['as_of']}, views {document['views']}"]
    for entity in document["entities"]:
        lines.append(f"{entity['kind']} {entity['id']}")
        for name, f in entity["features"].items():
            age = "" if f["age_s"] is None else f"  ({f['age_s'] / 86_400:.2f} days old)"
            value = f["status"] if f["value"] is None else f["value"]
            lines.append(f"  {name:24} {value}{age}")
    return "\n".join(lines)
