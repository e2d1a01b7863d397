"""Ranking: hundreds of candidates to a slate. hydrate (add fields), filter (remove), score (add numbers), select.

Light names only: the torch ranker is imported by `recsys.pipeline.build` or a worker's main, never here.
"""

from recsys.ranking.base import FeatureMatrix, Filter, Hydrator, Scorer, Selection, Selector

__all__ = ["FeatureMatrix", "Filter", "Hydrator", "Scorer", "Selection", "Selector"]
