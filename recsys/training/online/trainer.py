"""`double11 train-online`: samples in, better towers and newer indexes out, nothing lost or doubled by a kill.

    poll samples -> join each user's history as of the sample -> steps -> commit (rows, optimizer, offsets: one file)
                 -> who did what -> rows of indexes               -> publish the commit's delta

The commit is the only start position: samples after it are read again. Its delta is published after it and before the
next one; whoever restarts looks at what of it is on the log and publishes the rest, the same bytes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import compress
from pathlib import Path

import numpy as np
import numpy.typing as npt
from double11.v1 import delta_pb2
from google.protobuf.message import DecodeError

from feature_store import FeatureReader, UserFeatures
from recsys.candidates.behaviour import WEIGHT
from recsys.core import Clock, Conflict, Deadline, DeadlineExceeded, Overloaded, RunDirectory, Unavailable, keys
from recsys.core.index_rows import IndexRows
from recsys.core.logging import get_logger
from recsys.core.metrics import DELTAS, LAG_RECORDS, TRAINING_SAMPLES
from recsys.models.delta import ModelDelta, encode
from recsys.models.history import Histories
from recsys.training.config import OnlineConfig
from recsys.training.online.journal import Arrays, Commit, Journal
from recsys.training.online.popular import OnlinePopular
from recsys.training.online.samples import Positive, Seen, positives
from recsys.training.online.swing import OnlineSwing
from recsys.training.online.tower import OnlineTower
from recsys.training.online.trending import OnlineTrending
from recsys.training.tower_step import Examples
from streaming.log import SCHEMA_HEADER, SCHEMA_VERSION, Consumer, Log
from streaming.topics import Topics

_POLL_BYTES_MAX = 16 << 20
_READ_RECORDS = 1_024
_RETRY_S = 1.0
Keys = npt.NDArray[np.int64]
_NONE = np.empty(0, np.int64)
_INDEXES: tuple[type[OnlineSwing | OnlineTrending | OnlinePopular], ...] = (OnlineSwing, OnlineTrending, OnlinePopular)
_RECENT = ("recent_item_key", "recent_event_type", "recent_time_us")
_log = get_logger(__name__)


class OnlineTrainer:
    """One run's trainer. `open`, then `run`, then `close`."""

    def __init__(
        self,
        run: RunDirectory,
        log: Log,
        topics: Topics,
        features: FeatureReader,
        state: Path,
        config: OnlineConfig,
        clock: Clock,
    ) -> None:
        """state: the folder of the commits.

        Raises: Conflict when another trainer has it, or has published further; VersionMismatch for a state of another
        run; CorruptData; what the log raises.
        """
        self._run, self._log, self._topics, self._features = run, log, topics, features
        self._config, self._clock = config, clock
        self._journal = Journal(state, run.run_id)
        self._tower = OnlineTower(run, config, state)
        kept = _INDEXES if config.index_rows_max else ()
        self._indexes = [c(run, config.index_rows_max, config.index_users_max) for c in kept if run.has(c.FILE)]
        self._seen = Seen(config.seen_samples_max)
        self._runner = asyncio.Runner()  # one event loop for good: a store's connections belong to theirs
        self._producer = log.producer()
        self._last = self._resume()
        self._consumer = self._open_consumer()

    @property
    def sequence(self) -> int:
        """Of the last delta; 0 = none yet."""
        return self._last.sequence

    def run(self, stopping: Callable[[], bool], *, until_caught_up: bool = False) -> int:
        """Train until `stopping()`, or until what was there at the start is trained; how many deltas were published."""
        there = dict(self._log.end_offsets(self._topics.samples))
        if not any(there.values()):
            _log.warning(
                "no_samples_yet", topic=self._topics.samples, fix="double11 ingest with --archive and --offline"
            )
        end = there if until_caught_up else None
        started = self.sequence
        while not stopping():
            values, offsets = self._collect(stopping, end)
            if offsets != self._last.offsets:
                self._train(values, offsets, stopping)
            if end is not None and all(int(self._last.offsets.get(str(p), 0)) >= o for p, o in end.items()):
                break
        return self.sequence - started

    def close(self) -> None:
        """Let go of the log, the state and the model. Close the store before: its connections need the event loop."""
        self._runner.close()
        self._consumer.close()
        self._producer.close()
        self._tower.close()
        self._journal.close()

    def _collect(self, stopping: Callable[[], bool], end: dict[int, int] | None) -> tuple[list[bytes], dict[str, int]]:
        """Samples of one interval, counted from the first that came, by partition, and the offsets after them."""
        config, offsets = self._config, dict(self._last.offsets)
        values: dict[int, list[bytes]] = {}
        count = 0
        first_s = None
        while not stopping() and count < config.samples_max:
            if first_s is not None and time.monotonic() - first_s >= config.interval_s:
                break
            batches = self._consumer.poll(records_max=config.samples_max - count, bytes_max=_POLL_BYTES_MAX)
            for batch in batches:
                values.setdefault(batch.partition, []).extend(batch.values)
                count += len(batch)
                offsets[str(batch.partition)] = batch.next_offset
            if batches:
                first_s = first_s or time.monotonic()
            elif end is not None and all(offsets.get(str(p), 0) >= o for p, o in end.items()):
                break
            else:
                time.sleep(config.idle_ms / 1e3)
        return [v for partition in sorted(values) for v in values[partition]], offsets

    def _train(self, values: list[bytes], offsets: dict[str, int], stopping: Callable[[], bool]) -> None:
        """One step, or none when told to stop before it could begin."""
        found, sample_keys, newest_us = positives(values, self._seen)
        known = self._tower.knows(np.array([p.item_key for p in found], np.int64))
        TRAINING_SAMPLES.labels(outcome="unknown-item").inc(len(found) - int(known.sum()))
        starts = range(0, len(found), self._config.batch)
        steps = list[tuple[list[Positive], list[UserFeatures]]]()
        for some in (found[start : start + self._config.batch] for start in starts):
            if (users := self._users(some, stopping)) is None:
                return
            steps.append((some, users))
        touched, loss = np.empty(0, np.int64), 0.0
        for start, (some, users) in zip(starts, steps, strict=True):
            of_known = known[start : start + self._config.batch]
            if of_known.any():
                loss, rows = self._tower.learn(self._examples(compress(some, of_known), compress(users, of_known)))
                touched = np.union1d(touched, rows)
        number = self._last.number + 1
        whole = number % self._config.whole_commits == 0
        arrays = self._tower.arrays(np.flatnonzero(self._tower.changed) if whole else touched)
        arrays |= {
            "touched": touched,
            "seen": self._seen.keys() if whole else np.array(sample_keys, np.int64),
        }
        actions = _actions(steps)
        for index in self._indexes:
            index.tell(*actions)
            index.make()
            arrays |= index.arrays(whole=whole)
        commit = Commit(
            run_id=self._run.run_id,
            number=number,
            sequence=self.sequence + _has_delta(arrays),
            offsets=offsets,
            deltas_from=self._log.end_offsets(self._topics.deltas)[0],
            samples_until_us=max(newest_us, self._last.samples_until_us),
            whole=whole,
            rng=self._tower.rng.bit_generator.state,
        )
        self._journal.write(commit, arrays)
        self._last = commit
        if _has_delta(arrays):
            self._publish(arrays, {})
            made = {name: len(rows) for name, rows in _index_rows(arrays).items()}
            _log.info("delta_published", sequence=commit.sequence, rows=len(touched), loss=round(loss, 4), **made)
        end = self._log.end_offsets(self._topics.samples)
        for partition, offset in end.items():
            lag = offset - offsets.get(str(partition), 0)
            LAG_RECORDS.labels(topic=self._topics.samples, partition=str(partition)).set(lag)

    def _examples(self, found: Iterable[Positive], users: Iterable[UserFeatures]) -> Examples:
        """Each user's actions strictly before the sample's time, and what came of them."""
        found, users = list(found), list(users)
        before = [u.recent_time_us < p.time_us for u, p in zip(users, found, strict=True)]
        item_key, event_type, time_us = (
            [getattr(u, column)[kept] for u, kept in zip(users, before, strict=True)] for column in _RECENT
        )
        histories = Histories.from_lists(item_key, event_type, time_us, [p.time_us for p in found])
        histories = histories.last(self._tower.tower_config.history_items_max)
        return Examples(
            item_key=np.array([p.item_key for p in found], np.int64),
            weight=np.array([p.weight for p in found], np.float32),
            lengths=histories.lengths,
            histories=histories,
        )

    def _users(self, found: Sequence[Positive], stopping: Callable[[], bool]) -> list[UserFeatures] | None:
        """Who acted, asked again while the store is away; None when told to stop meanwhile."""
        while True:
            try:
                return self._runner.run(self._read(found))
            except (Unavailable, DeadlineExceeded, Overloaded) as error:
                _log.warning("store_away", error=str(error), again_in_s=_RETRY_S)
                time.sleep(_RETRY_S)
                if stopping():  # or the next try would take as long as the store is given
                    return None

    async def _read(self, found: Sequence[Positive]) -> list[UserFeatures]:
        deadline = Deadline.after_ms(self._config.store_timeout_ms)
        return await asyncio.gather(*(self._features.user(p.user_id, p.time_us, deadline) for p in found))

    def _resume(self) -> Commit:
        """Put the state together again and publish what of its last delta is not on the log."""
        begin = {str(p): o for p, o in self._log.begin_offsets(self._topics.samples).items()}
        last = Commit(
            run_id=self._run.run_id, number=0, sequence=0, offsets=begin, deltas_from=0, samples_until_us=0,
            whole=True, rng=self._tower.rng.bit_generator.state,
        )  # fmt: skip
        arrays: Arrays | None = None
        for last, arrays in self._journal.read():
            self._tower.restore(arrays, last.rng)
            for index in self._indexes:
                index.restore(arrays)
            for sample_key in arrays["seen"].tolist():
                self._seen.add(sample_key)
        self._last = last
        there = self._published_since(last.deltas_from)
        ahead = max((sequence for sequence, _ in there), default=0)
        if ahead > last.sequence:
            raise Conflict(
                f"run {self._run.run_id}, topic {self._topics.deltas}",
                came=f"delta {ahead} of another trainer", expected=f"none after {last.sequence}, this state's last",
                fix="Use that trainer's --state, or train a new run and start from it.",
            )  # fmt: skip
        if arrays is not None and _has_delta(arrays):
            self._publish(arrays, there)
        return last

    def _published_since(self, offset: int) -> dict[tuple[int, int], bool]:
        """(sequence, part) of this run's records on the deltas topic from an offset on."""
        there: dict[tuple[int, int], bool] = {}
        end = self._log.end_offsets(self._topics.deltas)[0]
        offset = max(offset, self._log.begin_offsets(self._topics.deltas)[0])
        consumer = self._log.consumer(self._topics.deltas, {0: offset})
        try:
            while offset < end:
                for batch in consumer.poll(records_max=_READ_RECORDS, bytes_max=_POLL_BYTES_MAX):
                    offset = batch.next_offset
                    for key, value in zip(batch.keys, batch.values, strict=True):
                        if key == self._run.run_id.encode():
                            with suppress(DecodeError):  # no trainer wrote it, and whoever follows passes over it
                                part = delta_pb2.Delta.FromString(value)
                                there[part.sequence, part.part] = True
        finally:
            consumer.close()
        return there

    def _publish(self, arrays: Arrays, there: dict[tuple[int, int], bool]) -> None:
        tables, dense = self._tower.delta_of(arrays)
        delta = ModelDelta(
            run_id=self._run.run_id,
            sequence=self._last.sequence,
            tables=tables,
            dense=dense,
            samples_until_us=self._last.samples_until_us,
            index_rows=_index_rows(arrays),
        )
        for part, value in enumerate(encode(delta)):
            if (delta.sequence, part) not in there:
                header = {SCHEMA_HEADER: SCHEMA_VERSION}
                self._producer.send(self._topics.deltas, delta.run_id.encode(), value, header)
        self._producer.flush()
        DELTAS.labels(outcome="published").inc()

    def _open_consumer(self) -> Consumer:
        offsets = {
            p: int(self._last.offsets.get(str(p), o)) for p, o in self._log.begin_offsets(self._topics.samples).items()
        }
        return self._log.consumer(self._topics.samples, offsets)


def _has_delta(arrays: Arrays) -> bool:
    """Whether a commit has something to publish."""
    return bool(len(arrays["touched"]) or _index_rows(arrays))


def _index_rows(arrays: Arrays) -> dict[str, IndexRows]:
    """The rows of indexes that a commit made, by index."""
    return {c.NAME: rows for c in _INDEXES if (rows := c.made_in(arrays)) is not None}


def _actions(
    steps: Iterable[tuple[Sequence[Positive], Sequence[UserFeatures]]],
) -> tuple[Keys, Keys, npt.NDArray[np.float32], Keys]:
    """User, item, interest and time of what the users of some samples did: those samples, and their past."""
    user, item_key, interest, time_us = [_NONE], [_NONE], [np.empty(0, np.float32)], [_NONE]
    for found, users in steps:
        of_user = keys(p.user_id for p in found)
        user.append(np.concatenate([of_user, np.repeat(of_user, [len(u.recent_item_key) for u in users])]))
        item_key.append(np.concatenate([[p.item_key for p in found], *(u.recent_item_key for u in users)]))
        interest.append(np.concatenate([[p.interest for p in found], *(WEIGHT[u.recent_event_type] for u in users)]))
        time_us.append(np.concatenate([[p.time_us for p in found], *(u.recent_time_us for u in users)]))
    return (
        np.concatenate(user),
        np.concatenate(item_key).astype(np.int64),
        np.concatenate(interest).astype(np.float32),
        np.concatenate(time_us).astype(np.int64),
    )
