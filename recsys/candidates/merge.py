"""Union of what the sources found: one row per item, who gave it, what each source says about it.

Shape legend: N merged items, S score columns, Q sources.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from recsys.core import Candidates
from recsys.core.ids import find_rows


def merge(found: Sequence[Candidates], quotas: Mapping[str, int]) -> Candidates:
    """The first `quotas[name]` items of every source, each once, ordered by key.

    found: one Candidates per source, best first. A source's scores are filled in for every item it returned, also
    where another source's quota let the item in, so that the ranker sees all opinions on a candidate.
    """
    names = tuple(c.source_names[0] for c in found)
    columns = tuple(column for c in found for column in c.score_names)
    if not found:
        return Candidates.empty()
    within = [c.item_key[: quotas[name]] for c, name in zip(found, names, strict=True)]
    item_key = np.unique(np.concatenate(within))
    bits = np.zeros(len(item_key), np.uint32)
    scores = np.full((len(item_key), len(columns)), np.nan, np.float32)
    first = 0
    for bit, (source, given) in enumerate(zip(found, within, strict=True)):
        bits[np.searchsorted(item_key, given)] |= np.uint32(1 << bit)
        last = first + len(source.score_names)
        row = find_rows(item_key, source.item_key)
        scores[row[row >= 0], first:last] = source.scores[row >= 0]
        first = last
    return Candidates(item_key=item_key, source_bits=bits, scores=scores, source_names=names, score_names=columns)


def append(found: Candidates, more: Candidates) -> Candidates:
    """The rows of `found`, then those of `more`; scores that only one side has are NaN beside."""
    sources = (*found.source_names, *(n for n in more.source_names if n not in found.source_names))
    columns = (*found.score_names, *(n for n in more.score_names if n not in found.score_names))
    scores = np.full((len(found) + len(more), len(columns)), np.nan, np.float32)
    scores[: len(found), : len(found.score_names)] = found.scores
    scores[len(found) :, [columns.index(n) for n in more.score_names]] = more.scores
    bits = np.zeros(len(more), np.uint32)
    for bit, source in enumerate(more.source_names):
        bits |= (more.source_bits >> np.uint32(bit) & 1) << np.uint32(sources.index(source))
    return Candidates(
        item_key=np.concatenate([found.item_key, more.item_key]),
        source_bits=np.concatenate([found.source_bits, bits]),
        scores=scores,
        source_names=sources,
        score_names=columns,
    )
