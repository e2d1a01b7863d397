"""One simulated world, computed one stretch at a time (a day; an hour of the sale day).

Memory is bounded by the busiest hour. Times in microseconds UTC.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import polars as pl

from recsys.core.events import EventType
from recsys.data import schema
from recsys.data.simulate import catalogue, shoppers
from recsys.data.simulate.presets import (
    DAY_US,
    END_US,
    HOUR_US,
    PEAK_TO_MEAN,
    SALE_US,
    START_US,
    WARMUP_DAYS,
    Preset,
)
from recsys.data.simulate.shoppers import Ints, Rows

_EVENTS_PER_SESSION = 9.9  # measured; sets how many sessions a preset needs
_PROMPT_EVENTS_PER_SESSION = 8.5  # of those, inside the same few minutes: what a session adds to the peak
_SALE_DAY_LEVEL = 2.5  # sessions of the sale day, beside the burst, over those of another day
_BURST_RAMP_S, _BURST_PLATEAU_S, _BURST_DECAY_S = 26, 180, 1_200  # the peak comes 26 s after midnight (Tmall 2020)
_BURST_WEIGHT_S = _BURST_RAMP_S / 2 + (_BURST_PLATEAU_S - _BURST_RAMP_S) + _BURST_DECAY_S
_WAITING_BOUGHT, _RETURNED = 0.35, 0.04
_LABELS = pl.Series([t.label for t in EventType])


class World:
    """The state of one simulation: catalogue, shoppers, waiting carts, and what is bound to happen later."""

    def __init__(self, preset: Preset, seed: int, *, mark: str) -> None:
        """mark: what the ids of events and requests begin with, as events of several worlds may meet in one log."""
        self.preset, self.mark, self.rng = preset, mark, np.random.default_rng(seed)
        self.catalogue = catalogue.make(preset, self.rng)
        self._initial_stock = self.catalogue.stock.copy()
        self.shoppers = shoppers.Shoppers.make(preset, self.rng)
        self._later = shoppers.empty()  # decided, not yet due
        self._carts: list[Ints] = []  # [n, 2] (user, item) carted before the sale
        self._num_sessions = self._num_events = 0
        self._user_ids = pl.Series([f"u{n:07d}" for n in range(preset.num_users)])
        day_equivalents = WARMUP_DAYS + _SALE_DAY_LEVEL + PEAK_TO_MEAN * _BURST_WEIGHT_S / 86_400
        self._sessions_a_day = preset.num_events / day_equivalents / _EVENTS_PER_SESSION

    def run(self) -> Iterator[pl.DataFrame]:
        """The events, one stretch after the other, in time order."""
        for day in range(WARMUP_DAYS):
            start = START_US + day * DAY_US
            count = self.rng.poisson(self._sessions_a_day)
            yield self._stretch(start, start + DAY_US, self._diurnal(count, start, DAY_US))
        burst = self._midnight()
        for start in range(SALE_US, END_US, HOUR_US):
            level = _SALE_DAY_LEVEL * self._sessions_a_day / 24 * _of_day((start - SALE_US) / HOUR_US + 0.5)
            usual = start + self.rng.integers(0, HOUR_US, self.rng.poisson(level))
            due = burst[(burst >= start) & (burst < start + HOUR_US)]
            yield self._stretch(start, start + HOUR_US, np.sort(np.concatenate([usual, due])))

    def changes(self) -> pl.DataFrame:
        """What happened to the catalogue, to be asked for after `run`."""
        return self.catalogue.changes(self._initial_stock, self.mark)

    def _stretch(self, start: int, end: int, session_times: Ints) -> pl.DataFrame:
        """Everything due in [start, end), in order; stock, memories and what happens later are brought up to date."""
        shop = shoppers.Shop(self.catalogue, start)
        fresh = shoppers.sessions(self.rng, shop, self.shoppers, session_times, self._num_sessions)
        self._num_sessions += len(session_times)
        rows = shoppers.concat([self._later, fresh])
        self._later = shoppers.take(rows, rows["time"] >= end)
        rows = shoppers.take(rows, rows["time"] < end)
        rows = shoppers.take(rows, np.argsort(rows["time"], kind="stable"))
        rows = shoppers.take(rows, self._possible(rows))
        self._look_ahead(rows)
        return self._frame(rows)

    def _possible(self, rows: Rows) -> npt.NDArray[np.bool_]:
        """False for actions on delisted items and for purchases beyond the stock, which is taken down here."""
        kept: npt.NDArray[np.bool_] = (rows["time"] < self.catalogue.gone_us[rows["item"]]) | (
            rows["type"] == EventType.RETURN
        )
        bought = np.flatnonzero(kept & (rows["type"] == EventType.PURCHASE))
        item = rows["item"][bought]
        by_item = np.argsort(item, kind="stable")  # time order within an item
        unique, first, count = np.unique(item[by_item], return_index=True, return_counts=True)
        nth = np.empty(len(item), np.int64)
        nth[by_item] = np.arange(len(item)) - np.repeat(first, count) + 1
        stock = self.catalogue.stock
        kept[bought[nth > stock[item]]] = False
        last_unit = nth == stock[item]
        self.catalogue.gone_us[item[last_unit]] = rows["time"][bought[last_unit]] + 1
        stock[unique] -= np.minimum(count, stock[unique])
        return kept

    def _look_ahead(self, rows: Rows) -> None:
        """Remember views and waiting carts; decide returns."""
        viewed = shoppers.take(rows, rows["type"] == EventType.VIEW)
        self.shoppers.remember(viewed["user"], viewed["item"])
        carted = shoppers.take(rows, rows["type"] == EventType.CART)
        self._carts.append(np.stack([carted["user"], carted["item"]], axis=1))
        bought = shoppers.take(rows, rows["type"] == EventType.PURCHASE)
        back = shoppers.take(bought, self.rng.random(len(bought["time"])) < _RETURNED)
        time = back["time"] + self.rng.integers(2 * DAY_US, 8 * DAY_US, len(back["time"]))
        returns = shoppers.plain(time, back["user"], back["item"], EventType.RETURN, back["session"])
        self._later = shoppers.concat([self._later, returns])

    def _midnight(self) -> Ints:
        """Waiting carts are bought; the times of as many sessions as bring the rate to 58 times the mean."""
        waiting = np.unique(np.concatenate(self._carts), axis=0)
        self._carts.clear()
        waiting = waiting[self.rng.random(len(waiting)) < _WAITING_BOUGHT]
        time, no_session = SALE_US + self._burst(len(waiting)), np.full(len(waiting), -1, np.int64)
        bought = shoppers.plain(time, waiting[:, 0], waiting[:, 1], EventType.PURCHASE, no_session)
        self._later = shoppers.concat([self._later, bought])
        mean_per_s = self._num_events / WARMUP_DAYS / 86_400
        missing_per_s = (PEAK_TO_MEAN - _SALE_DAY_LEVEL * _of_day(0.5)) * mean_per_s - len(waiting) / _BURST_WEIGHT_S
        count = self.rng.poisson(max(0.0, float(missing_per_s)) * _BURST_WEIGHT_S / _PROMPT_EVENTS_PER_SESSION)
        return SALE_US + self._burst(count)

    def _burst(self, count: int) -> Ints:
        """Delays after midnight: a ramp of 26 s, a plateau to 3 minutes, then a decay over 20 minutes."""
        edges_s = np.concatenate([np.arange(0, _BURST_PLATEAU_S, 1.0), np.arange(_BURST_PLATEAU_S, 4 * 3_600, 10.0)])
        middle = (edges_s[:-1] + edges_s[1:]) / 2
        level = np.minimum(1, middle / _BURST_RAMP_S)
        level *= np.exp(-np.maximum(0, middle - _BURST_PLATEAU_S) / _BURST_DECAY_S)
        cumulative = np.concatenate([[0.0], np.cumsum(level * np.diff(edges_s))])
        seconds = np.interp(self.rng.random(count) * cumulative[-1], cumulative, edges_s)
        return np.asarray(seconds * 1e6, np.int64)

    def _diurnal(self, count: int, start: int, length: int) -> Ints:
        """Sorted times of `count` sessions of a day, most of them in the evening."""
        edges = np.linspace(0, 24, 145)
        cumulative = np.concatenate([[0.0], np.cumsum(_of_day((edges[:-1] + edges[1:]) / 2))])
        hours = np.interp(self.rng.random(count) * cumulative[-1], cumulative, edges)
        return np.asarray(np.sort(start + (hours / 24 * length).astype(np.int64)), np.int64)

    def _frame(self, rows: Rows) -> pl.DataFrame:
        """Rows in time order as events; ids count up from the start of the world."""
        first, n = self._num_events, len(rows["time"])
        self._num_events += n
        is_priced = rows["type"] >= EventType.CART
        return pl.DataFrame(
            {
                "user_id": self._user_ids.gather(rows["user"]),
                "item_id": self.catalogue.item_id.gather(rows["item"]),
                "event_type": _LABELS.gather(rows["type"].astype(np.int64)),
                "event_time": pl.Series(rows["time"]).cast(schema.TIME),
                "session": rows["session"],
                "request": rows["request"],
                "position": rows["position"],
                "propensity": pl.Series(rows["propensity"], nan_to_null=True),
                "price": self.catalogue.price_at(rows["item"], rows["time"]),
                "is_priced": is_priced,
            }
        ).select(
            pl.format("{}-e{}", pl.lit(self.mark), pl.int_range(first, first + n)).alias("event_id"),
            "user_id",
            "item_id",
            "event_type",
            "event_time",
            session_id=pl.when(pl.col("session") >= 0).then(pl.format("s{}", "session")),
            request_id=pl.when(pl.col("request") > 0).then(pl.format("{}-r{}", pl.lit(self.mark), "request")),
            position=pl.when(pl.col("position") > 0).then(pl.col("position")),
            propensity=pl.col("propensity"),
            price=pl.col("price"),
            quantity=pl.when("is_priced").then(pl.lit(1, pl.Int32)),
        )


def _of_day(hour: npt.NDArray[np.float64] | float) -> npt.NDArray[np.float64]:
    """Sessions at an hour over the mean of the day: most at 21:00, few before dawn."""
    return np.asarray(1 + 0.7 * np.cos((np.asarray(hour) - 21) * np.pi / 12))
