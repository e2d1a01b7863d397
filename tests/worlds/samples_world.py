"""Slates and actions, and the labels that nested loops find for them."""

import random
from collections import defaultdict

from double11.v1.event_pb2 import Action, Event, Impression, ImpressionItem

T, SECOND = 1_600_000_000_000_000, 1_000_000
WINDOW = 60


def at_us(at_s: float) -> int:
    return T + int(at_s * SECOND)


def action(user: str, item: str, at_s: float, kind: int = 2, request: str = "", **kw) -> Event:
    body = Action(type=kind, user_id=user, item_id=item, request_id=request)
    return Event(event_id=f"{user}/{item}/{at_s}/{kind}", event_time_us=at_us(at_s), action=body, **kw)


def slate(request: str, user: str, at_s: float, items: str = "abc", **kw) -> Impression:
    shown = [ImpressionItem(item_id=i, position=p, propensity=1 / p) for p, i in enumerate(items, 1)]
    return Impression(request_id=request, user_id=user, event_time_us=at_us(at_s), items=shown, **kw)


def traffic(seed: int, num: int) -> list[tuple]:
    rng, sent = random.Random(seed), []
    for i in range(num):
        at, user = i * 0.5 - (rng.random() * 40 if rng.random() < 0.05 else 0), f"u{rng.randint(0, 12)}"
        if rng.random() < 0.3:
            items = rng.sample("abcdefgh", 3)
            sent.append(("impressions", user, slate(f"r{i}", user, at, "".join(items))))
        else:
            sent.append(("events", user, action(user, rng.choice("abcdefgh"), at, rng.randint(2, 6))))
        if rng.random() < 0.05:
            sent.append(rng.choice(sent[-10:]))
    return sent


def joined(sent: list[tuple], until_s: float) -> dict[tuple[str, str], list[int]]:
    """Slots shown before a time, with their labels: nested loops over what was sent."""
    slates = {m.request_id: m for t, _, m in sent if t == "impressions"}
    found = defaultdict(list)
    for m in slates.values():
        for item in m.items:
            if m.event_time_us < at_us(until_s):
                found[m.request_id, item.item_id] = []
    for e in {m.event_id: m for t, _, m in sent if t == "events"}.values():
        a, at = e.action, e.event_time_us
        shown = [
            (m.event_time_us, m.request_id)
            for m in slates.values()
            if m.user_id == a.user_id
            and any(i.item_id == a.item_id for i in m.items)
            and 0 <= at - m.event_time_us <= WINDOW * SECOND
        ]
        if shown and (max(shown)[1], a.item_id) in found:
            found[max(shown)[1], a.item_id].append(a.type)
    return {slot: sorted(set(types)) for slot, types in found.items()}
