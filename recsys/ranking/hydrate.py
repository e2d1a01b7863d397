"""Hydrate: reads the candidates' features and assembles the ranker's inputs."""

from __future__ import annotations

from feature_store import FeatureReader, UserFeatures
from recsys.core import Candidates, Deadline, Query
from recsys.ranking.base import FeatureMatrix
from recsys.ranking.catalogue import Catalogue
from recsys.ranking.features import assemble


class FeatureHydrator:
    """Implements Hydrator over a feature store and the run's items."""

    def __init__(self, features: FeatureReader, catalogue: Catalogue) -> None:
        self._features, self._catalogue = features, catalogue

    async def hydrate(self, query: Query, user: UserFeatures, found: Candidates, deadline: Deadline) -> FeatureMatrix:
        """FEATURE_NAMES of every candidate [N, F]. Raises: Unavailable, DeadlineExceeded."""
        ids = [i or "" for i in self._catalogue.ids(found.item_key)]
        items = await self._features.items(ids, query.as_of_us, deadline)
        return assemble(query, user, found, items, self._catalogue)
