"""The topics, and how they are named and cut into partitions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from recsys.core.config import in_range, section
from recsys.core.errors import BadInput


@section("streaming.topics")
@dataclass(frozen=True, kw_only=True, slots=True)
class Topics:
    """Names of the topics, each another; a section so that they can be renamed.

    events: actions and forgets, key user. impressions: one record per slate, key user, co-partitioned with events.
    catalog: price, stock and item changes, key item and kind, partition by item; compacted.
    item_updates: user stage to item stage, key item.
    samples, deltas, dead_letter: what joins, trainers and the job put aside.
    """

    events: str = "events"
    impressions: str = "impressions"
    item_updates: str = "item-updates"
    catalog: str = "catalog"
    samples: str = "samples"
    deltas: str = "deltas"
    dead_letter: str = "dead-letter"

    def __post_init__(self) -> None:
        names = self.all()
        if "" in names or len(set(names)) < len(names):
            raise BadInput(
                "[streaming.topics], and the topic of the log URL",
                came=", ".join(f"{f.name} = {name!r}" for f, name in zip(fields(self), names, strict=True)),
                expected="a name for each topic, and no two alike: what is read from one is not what another has",
                fix="Name each topic once.",
            )

    def all(self) -> tuple[str, ...]:
        """Every name."""
        return tuple(getattr(self, f.name) for f in fields(self))


@section("streaming")
@dataclass(frozen=True, kw_only=True, slots=True)
class StreamingConfig:
    """partitions: P of events, impressions, item-updates, catalog and samples; it never changes in place."""

    partitions: int = 8

    def __post_init__(self) -> None:
        in_range("streaming.partitions", self.partitions, 1, 4096)

    def check_peak(self, peak_per_s: float, consumer_per_s: float) -> None:
        """Raises: BadInput when so many partitions are too few for twice the peak at that rate of one consumer."""
        needed = 2 * peak_per_s / consumer_per_s
        enough = 1 << max(math.ceil(math.log2(needed)), 0)
        if self.partitions < needed:
            raise BadInput(
                "[streaming] partitions",
                came=f"{self.partitions}, which serve {self.partitions * consumer_per_s / 2:,.0f} events/s",
                expected=f"at least 2 x {peak_per_s:,.0f} / {consumer_per_s:,.0f} = {needed:.1f}",
                fix=f"Set it to {enough}, and [feature_store.redis] buckets with it, before the topics are created.",
            )

    def partitions_by_topic(self, topics: Topics) -> Mapping[str, int]:
        """Partitions of every topic: deltas are one ordered sequence, dead letters are few."""
        single = {topics.deltas, topics.dead_letter}
        return {t: 1 if t in single else self.partitions for t in topics.all()}
