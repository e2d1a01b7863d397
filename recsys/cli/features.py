"""`double11 features`: read what serving would read, rebuild a store from a dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from recsys.cli.common import config_option, emit, json_option, parse_time_us
from recsys.core.config import Config
from recsys.core.errors import BadInput

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
@click.option("--until", help="Only events before this ISO time.")
@config_option
@json_option
def materialize(directory: Path, store: str | None, until: str | None, config_path: Path | None, as_json: bool) -> None:
    """Rebuild the store from a dataset directory; readers switch to the result in one step at the end."""
    from feature_store.materialize import materialize as fold_all
    from feature_store.online import open_store
    from feature_store.views import VIEW_SET
    from recsys.core import progress
    from recsys.core.urls import default_url
    from recsys.data import Dataset

    dataset = Dataset.open(directory)
    url = store or default_url()
    writer = open_store(url, Config.load(config_path))
    try:
        with progress.bar(total=dataset.num_events, what="fold", unit="events") as bar:
            batches = dataset.event_batches(before_us=parse_time_us(until, "--until"))
            events = fold_all(batches, writer, on_batch=bar.update)
    finally:
        writer.close()
    document = {"store": url, "views": VIEW_SET, "events": events}
    emit(document, as_json=as_json, text=lambda: f"folded {events:,} events into {url} (views {VIEW_SET})")


def _text(document: dict[str, Any]) -> str:
    lines = [f"as of {document['as_of']}, views {document['views']}"]
    for entity in document["entities"]:
        lines.append(f"{entity['kind']} {entity['id']}")
        for name, f in entity["features"].items():
            age = "" if f["age_s"] is None else f"  ({f['age_s'] / 86_400:.2f} days old)"
            value = f["status"] if f["value"] is None else f["value"]
            lines.append(f"  {name:24} {value}{age}")
    return "\n".join(lines)
