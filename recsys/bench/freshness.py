"""Produced to readable: events at a constant rate, and how long until a reader of the store finds them.

Two hundred events a second are of users of their own, and are asked for until they are there. The time is counted from
the instant an event was due to be sent, so a producer that falls behind is not forgiven.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np

from feature_store.online import open_reader
from recsys.bench.harness import Row, figure
from recsys.core import EventBatch, EventKind, EventType, Unavailable
from recsys.core.config import Config
from streaming.codec import encode_events
from streaming.log import open_log, topics_at
from streaming.log.base import SCHEMA_HEADER, SCHEMA_VERSION

_RATE, _MARKED = 5_000, 25  # events a second; every 25th is of a user of its own
_SLICE_S, _ASK_S, _LAST_S = 0.01, 0.01, 30.0


def rows(log: str, store: str, *, seconds: float) -> list[Row]:
    """Milliseconds from produced to readable, by `double11 ingest` in a process of its own. Raises: Unavailable."""
    main = "from recsys.cli.main import main; main()"
    command = [sys.executable, "-c", main, "ingest", "--source", log, "--store", store]
    worker = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _measured(log, store, 1.0, "w")  # the worker starts, the group settles
        delays_ms = _measured(log, store, seconds, "m")
    finally:
        worker.send_signal(signal.SIGTERM)
        worker.wait(60)
    what = f"produced to readable at {_RATE:,} events/s, Kafka to Redis"
    return [figure(f"{what}, p{p}", "ms", float(np.percentile(delays_ms, p))) for p in (50, 99)]


def _measured(log: str, store: str, seconds: float, mark: str) -> list[float]:
    due_s: dict[str, float] = {}
    sending = threading.Thread(target=_send, args=(log, seconds, mark, due_s), daemon=True)
    sending.start()
    reader, found = open_reader(store), []
    quiet_s = time.monotonic() + 2 * seconds + _LAST_S
    try:
        while sending.is_alive() or due_s:
            waiting = list(due_s)
            for user_id, blob in zip(waiting, reader.load("user", waiting), strict=True):
                if blob:
                    found.append((time.monotonic() - due_s.pop(user_id)) * 1e3)
            if time.monotonic() > quiet_s:
                raise Unavailable(
                    "double11 ingest",
                    came=f"{len(due_s)} events that nobody can read {_LAST_S:.0f} s later",
                    expected="all of them",
                    fix=f"Run it by hand: double11 ingest --source {log} --store {store}.",
                )
            time.sleep(_ASK_S)
    finally:
        reader.close()
    return found


def _send(url: str, seconds: float, mark: str, due_s: dict[str, float]) -> None:
    """Send at the rate; due_s gets each marked user when it is due."""
    config, events = Config(environ=os.environ), _events(int(seconds * _RATE), mark)
    with open_log(url, config) as log:
        producer, topic, began_s = log.producer(), topics_at(url, config).events, time.monotonic()
        for sent, (user_id, key, value) in enumerate(events):
            at_s = began_s + sent / _RATE
            if sent % int(_RATE * _SLICE_S) == 0:
                time.sleep(max(0.0, at_s - time.monotonic()))  # librdkafka sends by itself, linger_ms after the first
            producer.send(topic, key, value, {SCHEMA_HEADER: SCHEMA_VERSION})
            if sent % _MARKED == 0:
                due_s[user_id] = at_s
        producer.close()


def _events(number: int, mark: str) -> list[tuple[str, bytes, bytes]]:
    """Views of now, encoded beforehand: user, key, value."""
    rng = np.random.default_rng(0)
    users = [f"{mark}-{i}" if i % _MARKED == 0 else f"u{i % 50_000:07d}" for i in range(number)]
    batch = EventBatch.from_columns(
        {
            "event_id": [f"{mark}-{time.time_ns()}-{i}" for i in range(number)],
            "kind": np.full(number, EventKind.ACTION, np.int8),
            "event_type": np.full(number, EventType.VIEW, np.int8),
            "event_time": np.full(number, time.time_ns() // 1_000),
            "user_id": users,
            "item_id": [f"i{i:06d}" for i in (rng.pareto(1.1, number) * 100).astype(int) % 200_000],
        }
    )
    return [(user_id, key, value) for user_id, (_, key, value) in zip(users, encode_events(batch), strict=True)]
