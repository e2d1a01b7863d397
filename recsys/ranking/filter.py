"""Filters: what must not be shown. Each says which rows may stay; without item features, stock filters keep all."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from feature_store import UserFeatures
from recsys.core import Candidates, EventType, Query, keys
from recsys.ranking.base import FeatureMatrix
from recsys.ranking.catalogue import Catalogue
from recsys.ranking.live import LiveCatalogue

Mask = npt.NDArray[np.bool_]


class Unlisted:
    """Removes items that neither the run knows nor the catalogue stream has listed: they have no id to answer with."""

    name = "unlisted"

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue

    def keep(self, query: Query, user: UserFeatures, found: Candidates, features: FeatureMatrix | None) -> Mask:
        """True [N] for items of the run, and for those listed since."""
        return self._catalogue.known(found.item_key)


class Excluded:
    """Removes what the request excludes, what is in the cart and what is on screen."""

    name = "excluded"

    def keep(self, query: Query, user: UserFeatures, found: Candidates, features: FeatureMatrix | None) -> Mask:
        """True [N] for items the request does not name."""
        named = {*query.exclude, *query.cart, query.current_item} - {""}
        return ~np.isin(found.item_key, keys(named))


class NotAskedFor:
    """Removes what the request's `where` does not admit, by what is known of the items at this moment."""

    name = "not_asked_for"

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue

    def keep(self, query: Query, user: UserFeatures, found: Candidates, features: FeatureMatrix | None) -> Mask:
        """True [N] for items that the request admits, or for all when it does not restrict them."""
        return self._catalogue.admits(query.where, found.item_key)


class Touched:
    """With `new_only`, removes what the user has acted on (any event but an impression)."""

    name = "touched"

    def keep(self, query: Query, user: UserFeatures, found: Candidates, features: FeatureMatrix | None) -> Mask:
        """True [N] for items that are new to the user, or for all when the query allows repeats."""
        if not query.new_only:
            return np.ones(len(found), np.bool_)
        acted = user.pair_count[:, EventType.VIEW :].sum(axis=1) > 0
        return ~np.isin(found.item_key, user.pair_item_key[acted])


class Available:
    """Removes what the catalogue stream says is sold out or delisted: on every tier, whatever the store says."""

    name = "available"

    def __init__(self, live: LiveCatalogue) -> None:
        self._live = live

    def keep(self, query: Query, user: UserFeatures, found: Candidates, features: FeatureMatrix | None) -> Mask:
        """True [N] for what may be sold now."""
        return self._live.available(found.item_key)


class SoldOut:
    """Removes items whose known stock is 0; where a trusted catalogue stream names the stock, that is `Available`'s."""

    name = "sold_out"

    def __init__(self, live: LiveCatalogue | None = None) -> None:
        self._live = live

    def keep(self, query: Query, user: UserFeatures, found: Candidates, features: FeatureMatrix | None) -> Mask:
        """True [N] for items in stock or of unknown stock."""
        keep = np.ones(len(found), np.bool_) if features is None else ~(features.column("item_stock") <= 0)
        if self._live is not None and self._live.trusted:
            keep |= self._live.says_stock(found.item_key)
        return keep


class Delisted:
    """Removes items taken out of the catalogue; a trusted catalogue stream has the say, as for `SoldOut`."""

    name = "delisted"

    def __init__(self, live: LiveCatalogue | None = None) -> None:
        self._live = live

    def keep(self, query: Query, user: UserFeatures, found: Candidates, features: FeatureMatrix | None) -> Mask:
        """True [N] for items listed or never said to be delisted."""
        keep = np.ones(len(found), np.bool_) if features is None else features.column("item_listed") != 0
        if self._live is not None and self._live.trusted:
            keep |= self._live.says_listed(found.item_key)
        return keep
