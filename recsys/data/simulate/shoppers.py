"""Shoppers and what they do in one stretch of time, as columns.

A session is one slate of the logging policy and some views of the shopper's own choice; views become favourites,
carts and purchases. The policy draws each position from a known distribution over the catalogue without putting an
item twice, so the propensity of every impression (given the positions above it) is exact.

Shapes: U users, N sessions or rows, S positions, D latent dimensions. Times in microseconds UTC.
Source: examination hypothesis (Craswell et al., WSDM 2008): P(click) = P(position looked at) * P(item liked).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from recsys.core.events import EventType
from recsys.data.simulate.catalogue import Catalogue
from recsys.data.simulate.presets import (
    DAY_US,
    EXAMINATION,
    EXPLORATION,
    FAVOURITE_WEIGHTS,
    LATENT_DIM,
    SALE_US,
    SLATE_ITEMS,
    START_US,
    WARMUP_DAYS,
    Preset,
)

_RECENT_ITEMS = 8  # what a shopper comes back to
_REVISIT, _OWN_VIEWS, _CANDIDATES = 0.3, 2.0, 4
_SECOND_US = 1_000_000
_REDRAWS_MAX = 1_000

Ints = npt.NDArray[np.int64]
Rows = dict[str, npt.NDArray[Any]]  # time, user, item, type, session, request, position, propensity: one length
COLUMNS = {
    "time": np.int64, "user": np.int64, "item": np.int64, "type": np.int8, "session": np.int64, "request": np.int64,
    "position": np.int32, "propensity": np.float32,
}  # fmt: skip


@dataclass(slots=True)
class Shoppers:
    """U users with lasting tastes and a short memory."""

    latent_UD: npt.NDArray[np.float32]
    favourites: Ints  # [U, 3] categories
    activity: npt.NDArray[np.float64]  # [U], cumulative shares of sessions
    recent: Ints  # [U, 8] rows of items, -1 = none
    seen: Ints  # [U], views so far

    @classmethod
    def make(cls, preset: Preset, rng: np.random.Generator) -> Shoppers:
        """Draw the users: categories by popularity, tastes from a normal, activity with a long tail."""
        num = preset.num_users
        gumbel = rng.gumbel(size=(num, preset.num_categories)).astype(np.float32)
        favourites = np.argpartition(-gumbel - rng.normal(0, 0.7, preset.num_categories), 3)[:, :3]
        share = rng.lognormal(0, 1.2, num)
        return cls(
            rng.normal(0, 0.9, (num, LATENT_DIM)).astype(np.float32),
            favourites.astype(np.int64),
            np.cumsum(share) / share.sum(),
            np.full((num, _RECENT_ITEMS), -1, np.int64),
            np.zeros(num, np.int64),
        )

    def draw(self, rng: np.random.Generator, count: int) -> Ints:
        """Users of `count` sessions. Shape [N]."""
        drawn = np.searchsorted(self.activity, rng.random(count))
        return np.minimum(drawn, len(self.activity) - 1)

    def remember(self, user: Ints, item: Ints) -> None:
        """Put views, in time order, into the memories (a ring of the last 8)."""
        order = np.argsort(user, kind="stable")
        user, item = user[order], item[order]
        unique, first, count = np.unique(user, return_index=True, return_counts=True)
        rank = np.arange(len(user)) - np.repeat(first, count)
        last = rank >= np.repeat(count, count) - _RECENT_ITEMS  # a slot is written once
        slot = (self.seen[user] + rank) % _RECENT_ITEMS
        self.recent[user[last], slot[last]] = item[last]
        self.seen[unique] += count


class Shop:
    """The catalogue as it is during one stretch: draws items by category and popularity among those available."""

    def __init__(self, catalogue: Catalogue, time_us: int) -> None:
        self.catalogue = catalogue
        self.is_available = catalogue.available(time_us)
        self.rows = np.flatnonzero(self.is_available)
        weight = np.where(self.is_available, catalogue.popularity, 0.0)
        self._cumulative = np.concatenate([[0.0], np.cumsum(weight)])
        self._edges = self._cumulative[catalogue.first_of_category]  # [C + 1]
        self.share = weight / np.diff(self._edges)[catalogue.category]  # P(item | category), [M]

    def in_category(self, rng: np.random.Generator, category: Ints) -> Ints:
        """One item of each category, by popularity. Any shape."""
        low, high = self._edges[category], self._edges[category + 1]
        mark = low + rng.random(category.shape) * (high - low)
        found = np.searchsorted(self._cumulative, mark, side="right") - 1
        first, last = self.catalogue.first_of_category[category], self.catalogue.first_of_category[category + 1] - 1
        found = np.clip(found, first, last)
        return np.where(self.is_available[found], found, first)  # rounding at an edge; the first is always there

    def policy(self, rng: np.random.Generator, favourites: Ints) -> Ints:
        """One draw of the logging policy for each user (favourites [N, 3]). Shape [N]."""
        place = np.searchsorted(np.cumsum(FAVOURITE_WEIGHTS)[:-1], rng.random(len(favourites)))
        item = self.in_category(rng, np.take_along_axis(favourites, place[:, None], 1)[:, 0])
        uniform = self.rows[rng.integers(len(self.rows), size=len(item))]
        return np.where(rng.random(len(item)) < EXPLORATION, uniform, item)

    def policy_probability(self, favourites: Ints, item: Ints) -> npt.NDArray[np.float64]:
        """P(item) of one draw of the policy. favourites [N, 3], item [N] -> [N]."""
        liked = favourites == self.catalogue.category[item][:, None]
        taste = (liked * np.asarray(FAVOURITE_WEIGHTS)).sum(1) * self.share[item]
        return np.asarray(EXPLORATION / len(self.rows) + (1 - EXPLORATION) * taste, np.float64)


def sessions(rng: np.random.Generator, shop: Shop, shoppers: Shoppers, time: Ints, number: int) -> Rows:
    """Everything that N sessions starting at `time` lead to, rows in no order; number is the first session's."""
    user = shoppers.draw(rng, len(time))
    session = number + np.arange(len(time))
    shown = _slates(rng, shop, shoppers, user, time, session)
    clicked = _clicks(rng, shop, shoppers, shown)
    own = _own_views(rng, shop, shoppers, user, time, session)
    views = concat([clicked, own])
    return concat([shown, views, *_follow_ups(rng, shop, shoppers, views)])


def empty() -> Rows:
    """No rows."""
    return {name: np.empty(0, kind) for name, kind in COLUMNS.items()}


def concat(parts: list[Rows]) -> Rows:
    """All rows of all parts."""
    return {name: np.concatenate([p[name] for p in parts]).astype(kind, copy=False) for name, kind in COLUMNS.items()}


def take(rows: Rows, which: npt.NDArray[Any]) -> Rows:
    """The rows at the places, or where the mask is true."""
    return {name: column[which] for name, column in rows.items()}


def plain(time: Ints, user: Ints, item: Ints, kind: EventType, session: Ints) -> Rows:
    """Rows that no slate led to: request and position 0, propensity NaN."""
    n = len(time)
    return {
        "time": time, "user": user, "item": item, "type": np.full(n, int(kind), np.int8), "session": session,
        "request": np.zeros(n, np.int64), "position": np.zeros(n, np.int32),
        "propensity": np.full(n, np.nan, np.float32),
    }  # fmt: skip


def _slates(rng: np.random.Generator, shop: Shop, shoppers: Shoppers, user: Ints, time: Ints, session: Ints) -> Rows:
    """S impressions a session, drawn from the policy without repetition, with their propensities."""
    favourites = shoppers.favourites[user]
    items_NS = np.full((len(user), SLATE_ITEMS), -1, np.int64)
    propensity_NS = np.empty((len(user), SLATE_ITEMS))
    left = np.ones(len(user))  # probability mass of the items not yet in the slate
    for position in range(SLATE_ITEMS):
        redo = np.arange(len(user))
        for _ in range(_REDRAWS_MAX):
            items_NS[redo, position] = shop.policy(rng, favourites[redo])
            above = items_NS[redo, :position]
            redo = redo[(above == items_NS[redo, position][:, None]).any(1)]
            if not len(redo):
                break
        else:
            raise AssertionError("a shop has more available items than positions")
        probability = shop.policy_probability(favourites, items_NS[:, position])
        propensity_NS[:, position] = probability / left
        left -= probability
    each = [np.repeat(a, SLATE_ITEMS) for a in (user, time, session)]
    rows = plain(each[1], each[0], items_NS.ravel(), EventType.IMPRESSION, each[2])
    rows["request"] = rows["session"] + 1  # 0 means none
    rows["position"] = np.tile(np.arange(1, SLATE_ITEMS + 1, dtype=np.int32), len(user))
    rows["propensity"] = np.minimum(propensity_NS.ravel(), 1.0).astype(np.float32)
    return rows


def _affinity(shop: Shop, shoppers: Shoppers, user: Ints, item: Ints) -> npt.NDArray[np.float32]:
    product: npt.NDArray[np.float32] = np.einsum("nd,nd->n", shoppers.latent_UD[user], shop.catalogue.latent_MD[item])
    return product


def _clicks(rng: np.random.Generator, shop: Shop, shoppers: Shoppers, shown: Rows) -> Rows:
    liked = (shoppers.favourites[shown["user"]] == shop.catalogue.category[shown["item"]][:, None]).any(1)
    relevance = _sigmoid(_affinity(shop, shoppers, shown["user"], shown["item"]) + 0.8 * liked - 1.6)
    looked_at = np.asarray(EXAMINATION)[shown["position"] - 1]
    views = take(shown, rng.random(len(liked)) < looked_at * relevance)
    views["type"] = np.full(len(views["time"]), int(EventType.VIEW), np.int8)
    views["time"] = views["time"] + _after(rng, len(views["time"]), 2, 40)
    return views


def _own_views(rng: np.random.Generator, shop: Shop, shoppers: Shoppers, user: Ints, time: Ints, session: Ints) -> Rows:
    """Views by the shopper's own choice: an item come back to, or the best liked of a few of a favourite category."""
    count = rng.poisson(_OWN_VIEWS, len(user))
    user, time, session = (np.repeat(a, count) for a in (user, time, session))
    place = np.searchsorted(np.cumsum(FAVOURITE_WEIGHTS)[:-1], rng.random(len(user)))
    category = shoppers.favourites[user, place]
    candidates = shop.in_category(rng, np.repeat(category[:, None], _CANDIDATES, axis=1))
    liking = _affinity(shop, shoppers, np.repeat(user, _CANDIDATES), candidates.ravel()).reshape(candidates.shape)
    choice = (2 * liking + rng.gumbel(size=liking.shape)).argmax(1)
    item = candidates[np.arange(len(user)), choice]
    known = shoppers.recent[user, rng.integers(_RECENT_ITEMS, size=len(user))]
    again = (rng.random(len(user)) < _REVISIT) & (known >= 0) & shop.is_available[known]
    item = np.where(again, known, item)
    return plain(time + _after(rng, len(user), 5, 400), user, item, EventType.VIEW, session)


def _follow_ups(rng: np.random.Generator, shop: Shop, shoppers: Shoppers, views: Rows) -> list[Rows]:
    """Favourites, carts and purchases that views lead to. Before the sale shoppers fill carts and wait."""
    liking = 2 * _sigmoid(_affinity(shop, shoppers, views["user"], views["item"]))
    is_sale = views["time"] >= SALE_US
    warmth = np.clip((views["time"] - START_US) / (WARMUP_DAYS * DAY_US), 0, 1)
    favourite = take(views, rng.random(len(liking)) < 0.04 * liking)
    cart = take(views, rng.random(len(liking)) < liking * np.where(is_sale, 0.25, 0.06 + 0.10 * warmth))
    buys_now = np.where(cart["time"] >= SALE_US, 0.5, 0.25)
    purchase = take(cart, rng.random(len(buys_now)) < buys_now)
    result = []
    for rows, kind, seconds in (
        (favourite, EventType.FAVORITE, (3, 60)),
        (cart, EventType.CART, (5, 90)),
        (purchase, EventType.PURCHASE, (120, 900)),
    ):
        later = rows["time"] + _after(rng, len(rows["time"]), *seconds)
        result.append({**rows, "type": np.full(len(later), int(kind), np.int8), "time": later})
    return result


def _after(rng: np.random.Generator, count: int, low_s: int, high_s: int) -> Ints:
    return rng.integers(low_s * _SECOND_US, high_s * _SECOND_US, count)


def _sigmoid(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return np.asarray(1 / (1 + np.exp(-x)), np.float32)
