"""Online stores: where the streaming job writes feature state and serving reads it."""

from __future__ import annotations

from feature_store.commit import Commit, DurableReader, DurableStore, OffsetStep, OnlineStore, Rebuildable, Update
from feature_store.config import EmbeddedStoreConfig, FeatureStoreConfig, RedisStoreConfig
from feature_store.online.embedded import EmbeddedReader, EmbeddedStore
from feature_store.online.memory import MemoryStore
from feature_store.read import warm_up
from recsys.core import BadInput, Clock, DataClock, NotFound, WallClock
from recsys.core.config import Config
from recsys.core.urls import embedded_path, scheme

__all__ = [
    "Commit",
    "DurableReader",
    "DurableStore",
    "MemoryStore",
    "OffsetStep",
    "OnlineStore",
    "Rebuildable",
    "Update",
    "check_exists",
    "feature_clock",
    "open_reader",
    "open_rebuildable",
    "open_store",
]


def open_store(url: str, config: Config | None = None) -> DurableStore:
    """The writer of the store at a URL; there can be one.

    Raises: BadInput for a URL without a driver; Conflict when another process writes it (Redis tells at its first
    step); VersionMismatch, Unavailable.
    """
    config = config or Config()
    if _is_redis(url):
        from feature_store.online.redis import RedisStore

        return RedisStore(url, config.get(RedisStoreConfig))
    return EmbeddedStore(embedded_path(url, "store URL"), config.get(EmbeddedStoreConfig))


def open_reader(url: str, config: Config | None = None) -> DurableReader:
    """A reader of the store at a URL, in any process, ready to answer at full speed.

    Raises: BadInput for a URL without a driver; CorruptData, VersionMismatch, Unavailable.
    """
    config = config or Config()
    warm_up()
    if _is_redis(url):
        from feature_store.online.redis import RedisReader

        return RedisReader(url, config.get(RedisStoreConfig))
    return EmbeddedReader(embedded_path(url, "store URL"), config.get(EmbeddedStoreConfig))


def check_exists(url: str) -> None:
    """A reader makes the store it is opened on; whoever only looks should not.

    Raises: NotFound for an embedded store that has never been opened.
    """
    if not _is_redis(url) and not (embedded_path(url, "store URL") / "store" / "data.mdb").exists():
        raise NotFound(
            f"store {url}",
            came="no such folder, or none with a store in it",
            expected="a store",
            fix=f"Correct the path, or fill it: double11 ingest --source LOG --store {url}",
        )


def open_rebuildable(url: str, config: Config | None = None) -> Rebuildable:
    """The store at a URL for a rebuild, in any process: a writer may be at work on it.

    Raises: BadInput for a URL without a driver; VersionMismatch, Unavailable.
    """
    config = config or Config()
    if _is_redis(url):
        return open_store(url, config)
    return EmbeddedReader(embedded_path(url, "store URL"), config.get(EmbeddedStoreConfig))


def feature_clock(reader: DurableReader, config: Config) -> Clock:
    """What "now" is for reads without a time, by `[feature_store] clock`."""
    if config.get(FeatureStoreConfig).clock == "data":
        return DataClock(reader.max_event_time_us)
    return WallClock()


def _is_redis(url: str) -> bool:
    """Whether the Redis driver is needed; it is imported only then."""
    if scheme(url) not in ("embedded", "redis", "rediss"):
        raise BadInput(
            "store URL",
            came=url,
            expected="embedded:PATH or redis[s]://HOST:PORT",
            fix="Name a store; kafka:// is a log.",
        )
    return scheme(url) != "embedded"
