"""A shop's traffic in arrival order, and what became of it, computed with nothing but dictionaries."""

import random
from collections import Counter, defaultdict

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

T, MINUTE, DAY = 1_600_000_000_000_000, 60_000_000, 86_400_000_000
HORIZON = DAY
USERS, ITEMS = [f"u{i}" for i in range(40)], [f"i{i}" for i in range(30)]
Sent = tuple[str, bytes, bytes]  # topic, key, value


def traffic(seed: int, steps: int, *, forgets: bool = False) -> list[Sent]:
    """Actions, slates, catalogue changes; disorder, repeats, late ones, marked ones, poison."""
    rng, sent = random.Random(seed), []
    for i in range(steps):
        at = T + i * 2 * MINUTE - rng.randint(0, 90) * MINUTE
        if rng.random() < 0.02:
            at -= 2 * DAY
        user, item, draw = rng.choice(USERS), rng.choice(ITEMS), rng.random()
        if draw < 0.70:
            action = Action(type=rng.randint(1, 6), user_id=user, item_id=item, price_minor=rng.randint(1, 900))
            event = Event(event_id=f"e{i}", event_time_us=at, action=action, stress=rng.random() < 0.05)
            sent.append(("events", user.encode(), event.SerializeToString()))
        elif draw < 0.85:
            shown = [ImpressionItem(item_id=rng.choice(ITEMS), position=p, propensity=0.5) for p in range(1, 4)]
            slate = Impression(request_id=f"r{i}", user_id=user, event_time_us=at, items=shown)
            sent.append(("impressions", user.encode(), slate.SerializeToString()))
        elif draw < 0.97:
            body = rng.choice(
                [
                    {"price": PriceChange(item_id=item, price_minor=rng.randint(1, 900))},
                    {"stock": StockChange(item_id=item, stock_units=rng.randint(0, 9))},
                    {"item": ItemChange(item_id=item, listed=rng.random() < 0.8, title=f"t{i}", category=f"c{i % 3}")},
                ]
            )
            sent.append(
                ("catalog", item.encode(), Event(event_id=f"e{i}", event_time_us=at, **body).SerializeToString())
            )
        elif forgets and draw < 0.98:
            forget = Event(event_id=f"e{i}", event_time_us=at, forget=ForgetUser(user_id=user))
            sent.append(("events", user.encode(), forget.SerializeToString()))
        else:
            sent.append(("events", user.encode(), b"\xff poison"))
        if rng.random() < 0.1:
            sent.append(rng.choice(sent[-20:]))
    return sent


def send(log, sent: list[Sent]) -> None:
    producer = log.producer()
    for topic, key, value in sent:
        producer.send(topic, key, value)
    producer.close()


def oracle(sent: list[Sent]) -> dict[str, Counter]:
    """Counts of actions and impressions by user, by type; each id once, nothing late, marked or forgotten."""
    seen, latest = defaultdict(dict), defaultdict(int)
    for topic, _, value in sent:
        if topic == "catalog" or value.startswith(b"\xff"):
            continue
        if topic == "impressions":
            m = Impression.FromString(value)
            user, at, unit, kinds = m.user_id, m.event_time_us, m.request_id, Counter({1: len(m.items)})
        else:
            e = Event.FromString(value)
            if e.stress or e.WhichOneof("body") != "action":
                continue
            user, at, unit, kinds = e.action.user_id, e.event_time_us, e.event_id, Counter({e.action.type: 1})
        of = user, topic
        latest[of] = max(latest[of], at)
        if at >= latest[of] - HORIZON and unit not in seen[of]:
            seen[of][unit] = kinds
    found = defaultdict(Counter)
    for (user, _), units in seen.items():
        for kinds in units.values():
            found[user] += kinds
    return found
