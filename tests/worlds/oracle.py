"""What every feature must be, from the events sent: one pass in plain Python that shares no code with the fold.

Written from the declarations (docs/adr/0006, the names in `feature_store.views`) and the delivery rules of the design,
an event at a time, with dictionaries and lists. It is slow, and that is its merit: there is little to get wrong.
Values are read at a time after every event.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from recsys.core import key

SECOND, MINUTE, HOUR, DAY = 1_000_000, 60_000_000, 3_600_000_000, 86_400_000_000
BEHAVIOURS = ("impression", "view", "favorite", "cart", "purchase", "return")  # action types 1 to 6
IMPRESSION, VIEW, FAVORITE, CART, PURCHASE, RETURN = range(1, 7)
HORIZON, SEEN_MAX = DAY, 1_024
WINDOWS = {"1h": (10 * MINUTE, HOUR), "1d": (HOUR, DAY), "7d": (DAY, 7 * DAY), "30d": (DAY, 30 * DAY)}
DECAYS = {"6h": ("1d", 6 * HOUR), "7d": ("30d", 7 * DAY)}  # the window that is weighed, half-life
WEIGHT = 1 << 24  # what weights are whole multiples of one of
RECENT_MAX = {VIEW: 200, FAVORITE: 64, CART: 100, PURCHASE: 200, RETURN: 32}
PAIRS_MAX = 1_024
NULL = None


@dataclass
class Acted:
    """Actions of one user, or on one item: (time, key of the event id, type, item, price, quantity)."""

    actions: list[tuple[int, int, int, str, int, int]] = field(default_factory=list)
    catalog: list[tuple[int, int, str, int]] = field(default_factory=list)  # time, key, field, value

    @property
    def known(self) -> bool:
        return bool(self.actions or self.catalog)


class Seen:
    """Ids of one user's events (or slates) within the horizon behind the latest, at most SEEN_MAX."""

    def __init__(self) -> None:
        self.ids: dict[int, int] = {}  # time by key
        self.latest = -1

    def outcome(self, at: int, event_key: int) -> str:
        self.latest = max(self.latest, at)
        full = len(self.ids) == SEEN_MAX
        if at < self.latest - HORIZON or (full and (at, event_key) < self._oldest()):
            return "late"
        if event_key in self.ids:
            return "duplicate"
        self.ids[event_key] = at
        if len(self.ids) > SEEN_MAX:
            del self.ids[self._oldest()[1]]
        self.ids = {k: t for k, t in self.ids.items() if t >= self.latest - HORIZON}
        return "applied"

    def _oldest(self) -> tuple[int, int]:
        return min((t, k) for k, t in self.ids.items())


class Oracle:
    """Takes events in the order of their partition. `counts` are the outcomes, `causes` those of dead letters."""

    def __init__(self) -> None:
        self.users: dict[str, Acted] = defaultdict(Acted)
        self.items: dict[str, Acted] = defaultdict(Acted)
        self.counts: Counter[str] = Counter()
        self.causes: Counter[str] = Counter()
        self.accepted: list[str] = []  # ids of unmarked actions and catalogue changes that were applied
        self.late: list[str] = []
        self.latest = 0
        self._seen: dict[tuple[bool, str, str], Seen] = defaultdict(Seen)
        self._forgotten: dict[tuple[bool, str], int] = defaultdict(lambda: -1)

    def take(self, event: dict) -> None:
        """One event: kind action | slate | price | stock | item | forget."""
        getattr(self, f"_{event['kind']}")(event, bool(event.get("stress")))

    def _forget(self, e: dict, marked: bool) -> None:
        self.counts["applied"] += 1
        if not marked:
            self.latest = max(self.latest, e["time"])
        if e["time"] > self._forgotten[marked, e["user"]]:
            self._forgotten[marked, e["user"]] = e["time"]
            for kind in ("action", "slate"):
                self._seen.pop((marked, kind, e["user"]), None)
            if not marked:
                self.users.pop(e["user"], None)

    def _action(self, e: dict, marked: bool) -> None:
        found = self._judge(e, marked, key(e["id"]), [e["id"]])
        if found == "applied" and not marked:
            self._apply(
                e["user"], e["item"], e["time"], key(e["id"]), e["type"], e.get("price") or 0, e.get("quantity") or 1
            )

    def _slate(self, e: dict, marked: bool) -> None:
        ids = [f"{e['id']}#{position}" for position in range(1, len(e["items"]) + 1)]
        if self._judge(e, marked, key(ids[0]), ids) == "applied" and not marked:
            for event_id, item in zip(ids, e["items"], strict=True):
                self._apply(e["user"], item, e["time"], key(event_id), IMPRESSION, 0, 1)

    def _judge(self, e: dict, marked: bool, event_key: int, ids: list[str]) -> str:
        if e["time"] <= self._forgotten[marked, e["user"]]:
            found = "forgotten"
        else:
            found = self._seen[marked, e["kind"], e["user"]].outcome(e["time"], event_key)
        self.counts[found] += len(ids)
        if not marked and found in ("applied", "late"):
            (self.accepted if found == "applied" else self.late).extend(ids)
        if not marked and found == "applied":
            self.latest = max(self.latest, e["time"])
        return found

    def _apply(self, user: str, item: str, at: int, event_key: int, kind: int, price: int, quantity: int) -> None:
        self.users[user].actions.append((at, event_key, kind, item, price, quantity))
        self.items[item].actions.append((at, event_key, kind, item, price, quantity))

    def _change(self, e: dict, marked: bool, **said: int | None) -> None:
        self.counts["applied"] += 1  # a change that comes twice changes nothing, and is not looked up
        if marked:
            return
        self.latest = max(self.latest, e["time"])
        rows = self.items[e["item"]].catalog
        for name, value in {"known": 1, **said}.items():
            if value is not None:
                rows.append((e["time"], key(e["id"]), name, value))

    def _price(self, e: dict, marked: bool) -> None:
        self._change(e, marked, price=e["price"])

    def _stock(self, e: dict, marked: bool) -> None:
        self._change(e, marked, stock=e["stock"])

    def _item(self, e: dict, marked: bool) -> None:
        self._change(e, marked, price=e.get("price"), listed=int(e["listed"]))

    # What a reader must answer.

    def user(self, user_id: str, now: int) -> dict[str, float | None]:
        """Every scalar feature of a user at `now`; NULL where there is none."""
        actions = self.users[user_id].actions
        acted = [a for a in actions if a[2] != IMPRESSION]
        found = _counted(actions, now)
        for kind, name in enumerate(BEHAVIOURS[1:], VIEW):
            found[f"days_since_{name}"] = _days_since([a for a in acted if a[2] == kind], now)
        prices = [a[4] for a in actions if a[4] > 0]
        bought = [a[4] for a in acted if a[2] == PURCHASE and a[4] > 0]
        hours = [a[0] // HOUR % 24 for a in acted]
        near = {(now // HOUR + d) % 24 for d in (-1, 0, 1)}
        pairs = self.pairs(user_id)
        return found | {
            "days_since_any": _days_since(acted, now),
            "age_days": (now - min(a[0] for a in actions)) / DAY,
            "price_level": _mean([round(math.log2(p) * 1_024) / 1_024 * math.log(2) for p in prices]),
            "purchase_price_mean": _mean(bought),
            "hour_share": _mean([float(h in near) for h in hours]),
            "num_categories": NULL,  # an action names no category
            "category_top_share": NULL,
            "num_brands": NULL,
            "brand_top_share": NULL,
            "quantity_level": _quantity_level(actions),
            "num_items_touched": float(len(pairs)),
            "num_purchase_days": float(len({at // DAY for at, _, kind, *_ in acted if kind == PURCHASE})),
        }

    def recent(self, user_id: str) -> list[tuple[int, int, int]]:
        """(time, type, item key) of the newest actions, oldest first."""
        actions = self.users[user_id].actions
        kept = []
        for kind, most in RECENT_MAX.items():
            kept += sorted((at, k, kind, key(item)) for at, k, t, item, *_ in actions if t == kind)[-most:]
        return [(at, kind, item) for at, _, kind, item in sorted(kept)]

    def pairs(self, user_id: str) -> dict[int, tuple[list[int], int, int, int, int]]:
        """By item key: counts by type [7], first and last time, last purchase, days with a purchase."""
        days: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
        for at, _, kind, item, *_ in self.users[user_id].actions:
            if kind != IMPRESSION:
                days[at // DAY, key(item)].append((at, kind))
        found: dict[int, tuple[list[int], int, int, int, int]] = {}
        for (_, item), acts in sorted(days.items())[-PAIRS_MAX:]:
            counts, first, last, bought, num_days = found.get(item, ([0] * 7, 1 << 62, 0, 0, 0))
            for at, kind in acts:
                counts[kind] += 1
                first, last = min(first, at), max(last, at)
                bought = max(bought, at if kind == PURCHASE else 0)
            num_days += any(kind == PURCHASE for _, kind in acts)
            found[item] = (counts, first, last, bought, num_days)
        return found

    def quantity_levels(self, user_id: str) -> dict[int, tuple[float, float]]:
        """By item key: mean logarithm of the quantities bought, ever and on the last day with a purchase; 0 = none."""
        actions = self.users[user_id].actions
        days = sorted({(a[0] // DAY, key(a[3])) for a in actions if a[2] != IMPRESSION})[-PAIRS_MAX:]
        found: dict[int, tuple[float, float]] = {}
        for _, item in days:
            kept = {day for day, other in days if other == item}
            bought = [a for a in actions if a[2] == PURCHASE and key(a[3]) == item and a[0] // DAY in kept]
            last = max((a[0] // DAY for a in bought), default=0)
            on_last = [a for a in bought if a[0] // DAY == last]
            found[item] = (_quantity_level(bought) or 0.0, _quantity_level(on_last) or 0.0)
        return found

    def item(self, item_id: str, now: int) -> dict[str, float | None]:
        """Every scalar feature of an item at `now`."""
        state = self.items[item_id]
        found = _counted(state.actions, now)
        for name, (window, half_life) in DECAYS.items():
            width, length = WINDOWS[window]
            inside = [a for a in state.actions if a[0] // width >= (now - length) // width]
            for kind in (VIEW, CART, PURCHASE):
                middles = [a[0] // width * width + width // 2 for a in inside if a[2] == kind]
                weights = [round(2.0 ** -(max(now - m, 0) / half_life) * WEIGHT) for m in middles]
                found[f"{BEHAVIOURS[kind - 1]}_trend_{name}"] = sum(weights) / WEIGHT
        for kind in (VIEW, CART, PURCHASE):
            at = [a for a in state.actions if a[2] == kind]
            found[f"days_since_{BEHAVIOURS[kind - 1]}"] = _days_since(at, now)
        found["view_rate_30d"] = _ratio(found["view_count_30d"], found["impression_count_30d"])
        found["purchase_rate_30d"] = _ratio(found["purchase_count_30d"], found["view_count_30d"])
        said = {n: sorted((c[0], c[1], c[3]) for c in state.catalog if c[2] == n) for n in ("price", "stock", "listed")}
        seen = sorted((a[0], a[1], a[4]) for a in state.actions if a[4] > 0)
        price = float(said["price"][-1][2]) if said["price"] else float(seen[-1][2]) if seen else NULL
        usual = _mean([p for *_, p in seen])
        first = NULL
        if said["price"]:
            earliest = said["price"][0][0]
            first = float(max((k, v) for at, k, v in said["price"] if at == earliest)[1])
        times = [a[0] for a in state.actions] + [c[0] for c in state.catalog]
        return found | {
            "price": price,
            "price_usual": usual,
            "discount_first": _below(price, first),
            "discount_usual": _below(price, usual),
            "stock": float(said["stock"][-1][2]) if said["stock"] else NULL,
            "listed": float(said["listed"][-1][2]) if said["listed"] else NULL,
            "age_days": max(now - min(times), 0) / DAY,
            "quantity_level": _quantity_level(state.actions),
        }


def oracle(events: Iterable[dict]) -> Oracle:
    """An oracle that has taken the events."""
    found = Oracle()
    for event in events:
        found.take(event)
    return found


def _counted(actions: list[tuple[int, int, int, str, int, int]], now: int) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for window, (width, length) in WINDOWS.items():
        # Whole buckets: the one that holds now - length counts from its begin.
        inside = Counter(a[2] for a in actions if a[0] // width >= (now - length) // width)
        for kind, name in enumerate(BEHAVIOURS, 1):
            found[f"{name}_count_{window}"] = float(inside[kind])
    ever = Counter(a[2] for a in actions)
    for kind, name in enumerate(BEHAVIOURS, 1):
        found[f"{name}_count_all"] = float(ever[kind])
    return found


def _days_since(actions: list[tuple[int, int, int, str, int, int]], now: int) -> float | None:
    return (now - max(a[0] for a in actions)) / DAY if actions else NULL


def _quantity_level(actions: list[tuple[int, int, int, str, int, int]]) -> float | None:
    return _mean([round(math.log2(a[5]) * 8) / 8 * math.log(2) for a in actions if a[2] == PURCHASE])


def _mean(values: list) -> float | None:
    return math.fsum(values) / len(values) if values else NULL


def _ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole is not None and whole > 0 else NULL


def _below(price: float | None, reference: float | None) -> float | None:
    part = _ratio(price, reference)
    return NULL if part is None else 1.0 - part
