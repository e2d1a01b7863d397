"""The question to the LLM reranker: the user's past in words, the ranker's best candidates and their numbers."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from feature_store import UserFeatures
from llm_reranker import HistoryItem, Reranker, RerankRequest
from llm_reranker.prompt import item_text
from recsys.core import Candidates, Query
from recsys.ranking import FeatureMatrix
from recsys.ranking.catalogue import Catalogue


def rerank_request(
    query: Query,
    user: UserFeatures,
    found: Candidates,
    features: FeatureMatrix,
    rows: npt.NDArray[np.int64],
    catalogue: Catalogue,
    reranker: Reranker,
    history_max: int,
) -> RerankRequest:
    """Request for the candidates in `rows`, best by rank first, with the features the reranker was trained on.

    Features it names are columns of the feature matrix or one of retrieval_score, rank_score, rank_position (from 0).
    """
    own = {
        "retrieval_score": found.score("retrieval")[rows],
        "rank_score": found.score("rank")[rows],
        "rank_position": np.arange(len(rows), dtype=np.float32),
    }
    values = np.full((len(rows), len(reranker.feature_names)), np.nan, np.float32)
    for column, name in enumerate(reranker.feature_names):
        if name in own:
            values[:, column] = own[name]
        elif name in features.names:
            values[:, column] = features.column(name)[rows]
    ids = [i or "" for i in catalogue.ids(found.item_key[rows])]
    return RerankRequest(
        request_id=query.request_id,
        as_of_us=query.as_of_us,
        history=_history(user, catalogue, history_max),
        item_ids=ids,
        texts=_texts(catalogue, found.item_key[rows]),
        features=values,
        query_text=query.query_text,
    )


def _texts(catalogue: Catalogue, item_key: npt.NDArray[np.int64]) -> list[str]:
    """Empty for items of the run: the reranker's own item table has the text it was trained with."""
    texts, new = [""] * len(item_key), np.flatnonzero(catalogue.items.rows(item_key) < 0)
    for place, text in zip(new.tolist(), _item_texts(catalogue, item_key[new]), strict=True):
        texts[place] = text
    return texts


def _item_texts(catalogue: Catalogue, item_key: npt.NDArray[np.int64]) -> list[str]:
    parts = (catalogue.values(name, item_key) for name in ("title", "category", "brand"))
    return [item_text(*row) for row in zip(*parts, strict=True)]


def _history(user: UserFeatures, catalogue: Catalogue, history_max: int) -> list[HistoryItem]:
    if not history_max:
        return []
    newest = slice(-history_max, None)
    item_key = user.recent_item_key[newest]
    rows = zip(
        catalogue.ids(item_key),
        _item_texts(catalogue, item_key),
        user.recent_event_type[newest].tolist(),
        user.recent_time_us[newest].tolist(),
        strict=True,
    )
    return [
        HistoryItem(item_id=item_id, text=text, event_type=kind, event_time_us=time_us)
        for item_id, text, kind, time_us in rows
        if item_id is not None
    ]
