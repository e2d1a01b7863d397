"""Online stores: where the streaming job writes feature state and serving reads it."""

from __future__ import annotations

from feature_store.commit import Commit, OffsetStep, OnlineStore, Update
from feature_store.config import EmbeddedStoreConfig, FeatureStoreConfig
from feature_store.online.embedded import EmbeddedReader, EmbeddedStore
from feature_store.online.memory import MemoryStore
from recsys.core import BadInput, Clock, DataClock, WallClock
from recsys.core.config import Config
from recsys.core.urls import embedded_path, scheme

__all__ = ["Commit", "MemoryStore", "OffsetStep", "OnlineStore", "Update", "feature_clock", "open_reader", "open_store"]


def open_store(url: str, config: Config | None = None) -> EmbeddedStore:
    """The writer of the store at a URL; there can be one.

    Raises: BadInput for a scheme without a driver in this release; Conflict when another process writes it.
    """
    _check(url)
    return EmbeddedStore(embedded_path(url, "store URL"), (config or Config()).get(EmbeddedStoreConfig))


def open_reader(url: str, config: Config | None = None) -> EmbeddedReader:
    """A reader of the store at a URL, in any process.

    Raises: BadInput for a scheme without a driver in this release; CorruptData, VersionMismatch.
    """
    _check(url)
    return EmbeddedReader(embedded_path(url, "store URL"), (config or Config()).get(EmbeddedStoreConfig))


def feature_clock(reader: EmbeddedReader, config: Config) -> Clock:
    """What "now" is for reads without a time, by `[feature_store] clock`."""
    if config.get(FeatureStoreConfig).clock == "data":
        return DataClock(reader.max_event_time_us)
    return WallClock()


def _check(url: str) -> None:
    if scheme(url) != "embedded":
        raise BadInput(
            "store URL",
            came=url,
            expected="embedded:PATH, the one driver of this release",
            fix="Use embedded:PATH; the Redis driver comes with a later release.",
        )
