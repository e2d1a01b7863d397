"""Filters: what must not be shown. Each says which rows may stay; without item features, stock filters keep all."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from feature_store import UserFeatures
from recsys.core import Candidates, EventType, Query, keys
from recsys.ranking.base import FeatureMatrix, Filter
from recsys.ranking.catalogue import Catalogue

Mask = npt.NDArray[np.bool_]


class Unlisted:
    """Removes items the run does not know: they have no id to answer with."""

    name = "unlisted"

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue

    def keep(self, query: Query, user: UserFeatures, found: Candidates, features: FeatureMatrix | None) -> Mask:
        """True [N] for items of the run."""
        return self._catalogue.known(found.item_key)


class Excluded:
    """Removes what the request excludes, what is in the cart and what is on screen."""

    name = "excluded"

    def keep(self, query: Query, user: UserFeatures, found: Candidates, features: FeatureMatrix | None) -> Mask:
        """True [N] for items the request does not name."""
        named = {*query.exclude, *query.cart, query.current_item} - {""}
        return ~np.isin(found.item_key, keys(named))


class Touched:
    """With `new_only`, removes what the user has acted on (any event but an impression)."""

    name = "touched"

    def keep(self, query: Query, user: UserFeatures, found: Candidates, features: FeatureMatrix | None) -> Mask:
        """True [N] for items that are new to the user, or for all when the query allows repeats."""
        if not query.new_only:
            return np.ones(len(found), np.bool_)
        acted = user.pair_count[:, EventType.VIEW :].sum(axis=1) > 0
        return ~np.isin(found.item_key, user.pair_item_key[acted])


class SoldOut:
    """Removes items whose known stock is 0."""

    name = "sold_out"

    def keep(self, query: Query, user: UserFeatures, found: Candidates, features: FeatureMatrix | None) -> Mask:
        """True [N] for items in stock or of unknown stock."""
        return np.ones(len(found), np.bool_) if features is None else ~(features.column("item_stock") <= 0)


class Delisted:
    """Removes items taken out of the catalogue."""

    name = "delisted"

    def keep(self, query: Query, user: UserFeatures, found: Candidates, features: FeatureMatrix | None) -> Mask:
        """True [N] for items listed or never said to be delisted."""
        return np.ones(len(found), np.bool_) if features is None else features.column("item_listed") != 0


def standard(catalogue: Catalogue) -> tuple[Filter, ...]:
    """Every filter, cheapest and most telling first."""
    return (Unlisted(catalogue), Excluded(), Touched(), SoldOut(), Delisted())
