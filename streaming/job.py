"""The streaming job: events from the log become features in the store, each exactly once.

A step is: poll a bounded micro-batch; put aside what cannot be read (dead letters are durable before the step);
classify repeats and late events; fold; archive; move state and offsets together (`streaming.stages`). The store's
offsets are the only start position, so SIGKILL at any point loses nothing and doubles nothing: either a bucket's
commit happened or its step runs again.

Between steps the job follows its consumer group, and when store or log is away it waits and asks again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from threading import Event as StopEvent
from typing import TypeVar

from feature_store.commit import OnlineStore, has_buckets
from recsys.core import (
    Clock,
    Conflict,
    Double11Error,
    Overloaded,
    Unavailable,
    VersionMismatch,
    WallClock,
    logging,
    metrics,
)
from streaming.archive import Archive
from streaming.config import JobConfig
from streaming.intake import JobReport, Means, Outbox
from streaming.log.base import Log, Membership
from streaming.stages import ItemStage, SingleStage, Stage, UserStage
from streaming.topics import Topics

T = TypeVar("T")
__all__ = ["Job", "JobReport", "begun"]
_log = logging.get_logger(__name__)
_LAG_S = 2.0
_GROUP_COMMIT_S = 1.0
_CAUGHT_UP_S = 0.1
_RELAPSE_S = 10.0  # refused so soon after it was back, it had not been
_Ends = Mapping[str, Mapping[int, int]]


class Job:
    """One worker: reads the partitions that are its own of events, impressions and catalog into one store."""

    def __init__(
        self,
        log: Log,
        store: OnlineStore,
        config: JobConfig | None = None,
        *,
        topics: Topics | None = None,
        clock: Clock | None = None,
        archive: Archive | None = None,
        on_step: Callable[[int], object] | None = None,
    ) -> None:
        """on_step is told the number of records after each step.

        Raises: VersionMismatch for offsets that the log no longer has, or topics with other partitions than the store
        has buckets; Unavailable.
        """
        self._log, self._store = log, store
        self._config, self._topics = config or JobConfig(), topics or Topics()
        self._archive, self._on_step = archive, on_step
        self.report = JobReport()
        store.bind(log.log_id())
        self._outbox = Outbox(log)
        means = Means(
            log=log,
            config=self._config,
            topics=self._topics,
            clock=clock or WallClock(),
            archive=archive,
            outbox=self._outbox,
            report=self.report,
        )
        t = self._topics
        self._sources = (t.events, t.impressions, t.catalog)
        self._stages: dict[str, Stage] = {}
        if has_buckets(store):
            self._check_partitions(store.num_buckets)
            self._stages = {t.events: UserStage(means, store), t.item_updates: ItemStage(means, store)}
        else:
            self._stages = {t.events: SingleStage(means, store)}
        group, alone = f"double11-{store.store_id}", not has_buckets(store)
        self._membership: Membership = log.membership(group, t.events, alone=alone)
        self._assigned: dict[str, frozenset[int]] = {}
        self._next_s = dict.fromkeys(("lag", "group", "caught up"), 0.0)
        self._emitted: _Ends | None = None
        self._away: _Away | None = None
        self._was_away: _Away | None = None  # until a record is taken
        self._back_s = 0.0
        try:
            self._follow()
        except Double11Error:  # whoever tries again makes another job, and this one should not stay in the group
            self.close()
            raise

    def run(self, *, until_caught_up: bool = False, stop: StopEvent | None = None) -> JobReport:
        """Step until stopped, or until what was in the log at the start is applied, whoever applies it.

        The step under way is finished. When store or log is away this waits, up to `away_s_max`.
        Raises: Conflict when another writer moved what is this one's alone; Unavailable, Overloaded from log and store.
        """
        stop = stop or StopEvent()
        started = time.perf_counter()
        target: _Ends | None = None
        while not stop.is_set():
            try:
                self._start_again()
                if until_caught_up:
                    target = target or {t: self._log.end_offsets(t) for t in self._sources}
                    if self._reached(target):
                        break
                taken = self.step()
                self._housekeeping(idle=not taken)
            except (Conflict, Unavailable, Overloaded) as error:
                stop.wait(self._refused(error))
                continue
            self._back(taken)
            if not taken:
                stop.wait(self._config.idle_ms / 1e3)
        self.report.seconds += time.perf_counter() - started
        return self.report

    def step(self) -> int:
        """One micro-batch of each stage; returns the number of records taken.

        Raises: Conflict, Unavailable, Overloaded; `run` knows what to do then.
        """
        self._follow()
        taken = 0
        for stage in self._stages.values():
            records = self.report.records
            taken += stage.step()
            if self._on_step is not None and self.report.records > records:
                self._on_step(self.report.records - records)
        return taken

    def lag(self) -> dict[str, int]:
        """Records not applied yet, by topic, of the partitions that are ours; also set as a metric per partition."""
        found = {}
        for topic, offsets in self._offsets().items():
            ends = self._log.end_offsets(topic)
            behind = {p: ends[p] - offset for p, offset in offsets.items()}
            for partition, records in behind.items():
                metrics.LAG_RECORDS.labels(topic, str(partition)).set(records)
            found[topic] = sum(behind.values())
        return found

    def close(self) -> None:
        """Leave the group, let go of producer and consumers; log and store stay open."""
        self._membership.commit(self._offsets())
        self._membership.close()
        for stage in self._stages.values():
            stage.close()
        self._outbox.close()

    def _offsets(self) -> dict[str, Mapping[int, int]]:
        return {topic: at for stage in self._stages.values() for topic, at in stage.offsets.items()}

    def _follow(self) -> None:
        """Take on and let go of partitions as the group says: the same of every stage, so that each is shared out."""
        now = self._membership.poll()
        for topic, stage in self._stages.items():
            if self._assigned.get(topic) != now:
                if topic in self._assigned:
                    metrics.REBALANCES.inc(topic == self._topics.events)  # once, not once a stage
                    _log.info("partitions_assigned", topic=topic, partitions=sorted(now))
                for p in self._assigned.get(topic, frozenset()) - now:
                    metrics.LAG_RECORDS.labels(topic, str(p)).set(0)
                stage.assign(now)
                self._assigned[topic] = now
                self._next_s["lag"] = 0.0  # of what is new it is measured at once
                metrics.PARTITIONS.labels(topic).set(len(now))

    def _refused(self, error: Conflict | Unavailable | Overloaded) -> float:
        """Count a step that was not taken; returns after how many seconds to start again from what is stored.

        Raises: the error, when it cannot be helped.
        """
        metrics.STEPS_REFUSED.labels(type(error).__name__.lower()).inc()
        _log.warning("step_refused", cause=str(error))
        if isinstance(error, Conflict) and (not has_buckets(self._store) or self._is_overtaken()):
            raise error
        now_s = time.monotonic()
        before = self._away or (self._was_away if now_s - self._back_s < _RELAPSE_S else None)
        if before is None:
            of_store = has_buckets(self._store) and error.what.startswith(self._store.what)
            away = _Away("store" if of_store else "log", now_s, self._config.retry_ms / 1e3)
        else:
            away = replace(before, wait_s=min(2 * before.wait_s, self._config.retry_ms_max / 1e3))
        if now_s - away.since_s > self._config.away_s_max:
            raise error
        self._away = away
        return away.wait_s

    def _is_overtaken(self) -> bool:
        """Whether a worker that shares with nobody finds offsets that it cannot have written. Raises: Unavailable."""
        if self._membership.is_group or not has_buckets(self._store):
            return False
        stored = {t: self._store.offsets(t) for t in self._sources}
        furthest = {t: at for stage in self._stages.values() for t, at in stage.furthest.items()}
        return any(o > furthest[t].get(p, 0) for t, at in stored.items() for p, o in at.items())

    def _start_again(self) -> None:
        """After a refused step: whatever is held may be wrong. Raises: Unavailable."""
        if self._away is not None:
            self._outbox.renew()
            self._assigned.clear()

    def _back(self, taken: int) -> None:
        """A step went through. One that took nothing says little: the next may be refused as the last one was."""
        if self._away is not None:
            now_s = time.monotonic()
            metrics.AWAY_S.labels(self._away.of).inc(now_s - max(self._away.since_s, self._back_s))
            _log.info("steps_go_on", after_s=round(now_s - self._away.since_s, 3))
            self._was_away, self._away, self._back_s = self._away, None, now_s
        if taken:
            self._was_away = None

    def _reached(self, target: _Ends) -> bool:
        """Whether the store has everything up to these ends, and every item update that came of it."""
        for topic, offsets in self._offsets().items():
            if any(offset < target.get(topic, {}).get(p, 0) for p, offset in offsets.items()):
                return False
        if not has_buckets(self._store):
            return True
        if not self._is_due("caught up", _CAUGHT_UP_S) or not self._stored_reach(target):
            return False
        if self._emitted is None:  # all is accepted: nothing of it will be sent any more
            topic = self._topics.item_updates
            self._emitted = {topic: self._log.end_offsets(topic)}
        return self._stored_reach(self._emitted)

    def _stored_reach(self, ends: _Ends) -> bool:
        """Of what the log still has: a store that was rebuilt reads item updates from where they begin now."""
        for topic, at in ends.items():
            stored, begin = self._store.offsets(topic), self._log.begin_offsets(topic)
            if any(max(stored.get(p, 0), begin.get(p, 0)) < end for p, end in at.items()):
                return False
        return True

    def _housekeeping(self, *, idle: bool) -> None:
        """Measure the lag, tell the group, and do what of the archive can wait."""
        if self._is_due("group", _GROUP_COMMIT_S):
            self._membership.commit(self._offsets())
        if self._is_due("lag", _LAG_S):
            self.lag()
        if idle and self._archive is not None:
            self._archive.idle()

    def _is_due(self, what: str, every_s: float) -> bool:
        now_s = time.monotonic()
        if now_s < self._next_s[what]:
            return False
        self._next_s[what] = now_s + every_s
        return True

    def _check_partitions(self, num_buckets: int) -> None:
        t = self._topics
        for topic in (*self._sources, t.item_updates):
            if (found := self._log.num_partitions(topic)) != num_buckets:
                raise VersionMismatch(
                    f"topic {topic}",
                    came=f"{found} partitions",
                    expected=f"{num_buckets}, the buckets of the store, which never change",
                    fix="Write to a store made with [feature_store.redis] buckets = the partitions of the topics, "
                    "or name topics with that many in [streaming.topics].",
                )


def begun(make: Callable[[], T], config: JobConfig, stop: StopEvent) -> T:
    """What `make` gives, once log and store answer: at start they may still be loading, failing over or starting.

    Raises: Unavailable, Overloaded after `start_s_max`, or when stopped.
    """
    until_s, wait_s = time.monotonic() + config.start_s_max, config.retry_ms / 1e3
    while True:
        try:
            return make()
        except (Unavailable, Overloaded) as error:
            metrics.STEPS_REFUSED.labels(type(error).__name__.lower()).inc()
            left_s = until_s - time.monotonic()
            if left_s <= 0 or stop.is_set():
                raise
            _log.warning("start_refused", cause=str(error), tries_for_s=round(left_s))
        stop.wait(min(wait_s, left_s))
        wait_s = min(2 * wait_s, config.retry_ms_max / 1e3)


@dataclass(frozen=True, slots=True)
class _Away:
    """Store or log is away: which, since when, how long to wait before asking again."""

    of: str
    since_s: float
    wait_s: float
