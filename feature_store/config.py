"""Configuration of the feature store: [feature_store], [feature_store.embedded], [feature_store.redis]."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from recsys.core.config import in_range, section


@section("feature_store")
@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureStoreConfig:
    """clock: what "now" is for reads without a time: the machine's, or the store's largest event time."""

    clock: Literal["wall", "data"] = "wall"


@section("feature_store.embedded")
@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddedStoreConfig:
    """map_bytes_max: most bytes of the store; address space, not disk, until used."""

    map_bytes_max: int = 1 << 37

    def __post_init__(self) -> None:
        in_range("feature_store.embedded.map_bytes_max", self.map_bytes_max, 1 << 20, 1 << 44)


@section("feature_store.redis")
@dataclass(frozen=True, kw_only=True, slots=True)
class RedisStoreConfig:
    """buckets: P of a store when it is created, best the partitions of `events`; an existing store keeps its own.
    connections_max: of one reader's pool (per node on a cluster), and reads in flight at once. timeout_s: of connecting
    and of each answer. meta_refresh_s: how soon a reader sees that a rebuilt store was switched to. password_file: read
    at open; wins over a password in the URL. ca_file: of a rediss:// server with its own authority.
    """

    buckets: int = 8
    connections_max: int = 32
    timeout_s: float = 5.0
    meta_refresh_s: float = 1.0
    password_file: Path | None = None
    ca_file: Path | None = None

    def __post_init__(self) -> None:
        in_range("feature_store.redis.buckets", self.buckets, 1, 4096)
        in_range("feature_store.redis.connections_max", self.connections_max, 1, 10_000)
        in_range("feature_store.redis.timeout_s", self.timeout_s, 0.01, 600)
        in_range("feature_store.redis.meta_refresh_s", self.meta_refresh_s, 0.01, 60)
