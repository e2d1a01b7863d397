"""Sizes of simulated worlds, and the constants of the world they share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

DAY_US = 86_400_000_000
HOUR_US = 3_600_000_000
START_US = 1_760_400_000_000_000  # 2025-10-14T00:00:00Z: four weeks of warm-up
SALE_US = START_US + 28 * DAY_US  # 2025-11-11T00:00:00Z, the stroke of midnight
END_US = SALE_US + DAY_US
WARMUP_DAYS = (SALE_US - START_US) // DAY_US

PEAK_TO_MEAN = 58  # events a second at the peak, over the mean of the warm-up days
SLATE_ITEMS = 6
EXPLORATION = 0.2  # share of the logging policy's draws that are uniform over the catalogue
EXAMINATION = tuple(round(rank**-0.7, 4) for rank in range(1, SLATE_ITEMS + 1))  # P(position is looked at)
FAVOURITE_WEIGHTS = (0.6, 0.3, 0.1)  # of a user's three categories
LATENT_DIM = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """One size. num_events is aimed at, not met exactly: what shoppers do is drawn.

    zipf: an item's popularity within its category is its rank to the power of -zipf.
    """

    num_events: int
    num_users: int
    num_items: int
    num_categories: int
    zipf: float = 0.8


PRESETS: Mapping[str, Preset] = {
    "tiny": Preset(num_events=20_000, num_users=400, num_items=300, num_categories=8),
    "small": Preset(num_events=300_000, num_users=5_000, num_items=3_000, num_categories=24),
    "double11": Preset(num_events=10_000_000, num_users=200_000, num_items=100_000, num_categories=96),
    "crowd": Preset(num_events=10_000_000, num_users=1_000_000, num_items=200_000, num_categories=96, zipf=1.1),
}
