"""Configuration of the feature store: [feature_store], [feature_store.embedded]."""

from __future__ import annotations

from dataclasses import dataclass
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
