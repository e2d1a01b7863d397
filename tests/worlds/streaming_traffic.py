"""What producers send to the streaming job's log: events in disorder, repeats, late ones, noise, and how they send it.

`oracle` says what readers must find of it.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass, field

from confluent_kafka import Producer
from double11.v1.event_pb2 import (
    Action,
    Event,
    ForgetUser,
    Impression,
    ImpressionItem,
    ItemChange,
    PriceChange,
    StockChange,
)
from oracle import DAY, MINUTE, SECOND, Oracle, oracle

from recsys.core.config import Config
from streaming.log import Log, open_log, topics_at

T = 1_600_000_000 * SECOND
YEAR_2090 = 3_786_912_000 * SECOND
USERS, ITEMS, FORGOTTEN = 60, 41, 4
VERSION = {"schema": b"1"}
MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class Sent:
    """One record. topic: the field of [streaming.topics]. event: what the oracle takes; cause: a dead letter's."""

    topic: str
    key: bytes
    value: bytes
    event: dict | None = None
    cause: str = ""
    headers: dict[str, bytes] = field(default_factory=lambda: VERSION)


def record(event: dict) -> Sent:
    """An event as a producer would send it."""
    kind, base = event["kind"], {"event_id": event["id"], "event_time_us": event["time"]}
    base["stress"] = bool(event.get("stress"))
    if kind == "slate":
        shown = [ImpressionItem(item_id=i, position=p, propensity=0.5) for p, i in enumerate(event["items"], 1)]
        slate = Impression(request_id=base.pop("event_id"), user_id=event["user"], items=shown, **base)
        return Sent("impressions", event["user"].encode(), slate.SerializeToString(), event)
    item = event.get("item", "")
    body = {
        "action": lambda: Action(
            type=event["type"],
            user_id=event["user"],
            item_id=item,
            price_minor=event["price"],
            quantity=event.get("quantity"),
        ),
        "price": lambda: PriceChange(item_id=item, price_minor=event["price"]),
        "stock": lambda: StockChange(item_id=item, stock_units=event["stock"]),
        "item": lambda: ItemChange(item_id=item, listed=event["listed"], price_minor=event["price"]),
        "forget": lambda: ForgetUser(user_id=event["user"]),
    }[kind]()
    of_user = kind in ("action", "forget")
    key = event["user"] if of_user else item
    value = Event(**base, **{kind: body}).SerializeToString()
    return Sent("events" if of_user else "catalog", key.encode(), value, event)


def traffic(seed: int, num_events: int) -> list[Sent]:
    """What producers send, in order: disorder, repeats, late ones, clocks days off, slates, changes, forgets, noise.

    How many events of users who ask to be forgotten (f0, f1 ...; ids alike) count as `forgotten` depends on batches.
    """
    rng, sent = random.Random(seed), []
    for i in range(num_events):
        now = T + i * MINUTE
        if rng.random() < 0.02:
            sent.append(noise(rng, i))
            continue
        event = some_event(rng, i, now)
        sent.append(record(event))
        if rng.random() < 0.08:
            again = rng.choice(sent[-50:])
            if again.event is None or again.event["kind"] != "forget":
                sent.append(again)
    return sent


def some_event(rng: random.Random, i: int, now: int) -> dict:
    draw, event = rng.random(), {"id": f"e{i}", "time": now - rng.randint(0, 60 * 60) * SECOND}
    user, item = f"u{min(int(rng.paretovariate(0.7)), USERS)}", f"i{rng.randint(0, ITEMS - 1)}"
    if draw < 0.06:
        price = rng.choice([None, rng.randint(0, 900)])
        said = rng.choice(
            [{"kind": "price", "price": rng.randint(0, 900)}, {"kind": "stock", "stock": rng.randint(0, 9)}]
        )
        said = rng.choice([said, {"kind": "item", "listed": rng.random() < 0.8, "price": price}])
        return event | said | {"item": item}
    if draw < 0.11:
        shown = [f"i{rng.randint(0, ITEMS - 1)}" for _ in range(rng.randint(1, 8))]
        return event | {"kind": "slate", "user": user, "items": shown, "stress": rng.random() < 0.05}
    event |= {"kind": "action", "type": rng.randint(1, 6), "user": user, "item": item, "stress": rng.random() < 0.05}
    event["price"] = rng.choice([None, 0, 100, 250, rng.randint(1, 99_999)])
    event["quantity"] = (None, 1, 6, 12, 2**31 - 1)[i % 5]
    if draw < 0.13:  # whether an item keeps what came just before a user was forgotten is left open
        event |= {"id": f"f{i}", "user": f"f{rng.randint(0, FORGOTTEN - 1)}", "item": "g"}
        if rng.random() < 0.15:
            return {"id": event["id"], "time": event["time"], "kind": "forget", "user": event["user"]}
    elif draw < 0.15:
        event["time"] -= rng.randint(1, 9) * DAY  # late, unless it is the user's first
    elif draw < 0.17:
        event |= {"user": f"s{rng.randint(0, 3)}", "time": now + rng.randint(-5, 5) * DAY}  # a phone with a wrong date
    return event


def noise(rng: random.Random, i: int) -> Sent:
    """A record that is no event of ours."""
    key, at = b"noise-%d" % rng.randint(0, 9), YEAR_2090 + rng.randint(0, DAY)
    good = {"kind": "action", "id": f"n{i}", "time": T, "type": 2, "user": "u1", "item": "i1", "price": None}
    value = record(good).value
    return rng.choice(
        [
            Sent("events", key, b"\x0a\x7f" + rng.randbytes(rng.randint(0, 99)), cause="undecodable"),  # of 127 bytes
            Sent("events", key, value[: -rng.randint(1, 3)], cause="undecodable"),  # truncated inside the action
            Sent("catalog", key, b"\xff\xff", cause="undecodable"),
            Sent("impressions", key, b"\xff\xff", cause="undecodable"),
            Sent("events", key, value, cause="unknown-version", headers={"schema": b"9"}),
            Sent("events", key, record(good | {"type": 0}).value, cause="invalid"),
            Sent("events", key, record(good | {"item": ""}).value, cause="invalid"),
            Sent("events", key, record(good | {"id": "x" * 257}).value, cause="invalid"),
            Sent("events", key, record(good | {"time": at}).value, cause="future"),
            Sent(
                "impressions", key, record(good | {"kind": "slate", "items": ["i1"], "time": at}).value, cause="future"
            ),
        ]
    )


def padded(sent: Sent, num_bytes: int) -> Sent:
    """The same event with a field of a newer schema, so that the value has exactly so many bytes."""
    head = len(sent.value) + 2 + 3  # tag of field 100, length in three bytes
    size = num_bytes - head
    length = bytes([size & 127 | 128, size >> 7 & 127 | 128, size >> 14])
    value = sent.value + b"\xa2\x06" + length + bytes(size)
    assert len(value) == num_bytes
    cause = "" if num_bytes <= MEBIBYTE else "too-large"
    return Sent(sent.topic, sent.key, value, None if cause else sent.event, cause)


def judged(sent: Iterable[Sent]) -> Oracle:
    """The oracle's view of what was sent."""
    sent = list(sent)
    found = oracle(s.event for s in sent if s.event is not None)
    found.causes.update(s.cause for s in sent if s.cause)
    return found


class Sender:
    """Appends records, to Kafka with a client of its own; a context manager."""

    def __init__(self, url: str, config: Config) -> None:
        self._topics = topics_at(url, config)
        self._failed: list[object] = []
        if url.startswith("embedded:"):
            self._log: Log | None = open_log(url, config)
            self._writer = self._log.producer()
            return
        self._log = None
        self._producer = Producer(
            {
                "bootstrap.servers": url.removeprefix("kafka://"),
                "enable.idempotence": True,
                "partitioner": "murmur2_random",
                "message.max.bytes": 2 * MEBIBYTE,
                "on_delivery": lambda error, _: self._failed.append(error) if error else None,
                "log_level": 0,
            }
        )

    def __call__(self, sent: Iterable[Sent]) -> None:
        """Durable on return."""
        for s in sent:
            topic = getattr(self._topics, s.topic)
            if self._log is not None:
                self._writer.send(topic, s.key, s.value, s.headers)
            else:
                self._producer.produce(topic, s.value, s.key, headers=list(s.headers.items()))
                self._producer.poll(0)
        if self._log is not None:
            self._writer.flush()
        else:
            assert self._producer.flush(240) == 0
            assert not self._failed

    def __enter__(self) -> "Sender":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._log is not None:
            self._log.close()
