"""Seeded item vectors for the tests of indexes, near a few directions as learned ones are; a brute-force oracle."""

import numpy as np

DIM = 16


def vectors(n, seed=0, dim=DIM):
    """[n, dim] of length 1, float32."""
    centres = np.random.default_rng(99).normal(size=(8, dim))
    rng = np.random.default_rng(seed)
    x = centres[rng.integers(0, 8, n)] + 0.6 * rng.normal(size=(n, dim))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def keys(n, start=0):
    """[n] distinct keys in no particular order of rows."""
    return (np.arange(start, start + n, dtype=np.int64) * 7_919 + 5) % (1 << 40)


class Oracle:
    """What a live index should hold: a dictionary, searched by looking at everything."""

    def __init__(self):
        self.items = {}  # key -> (vector, category, price, stock)

    def admitted(self, where):
        return [k for k, item in self.items.items() if _passes(k, item, where)]

    def search(self, query, k, where):
        """(keys, scores), best first."""
        admitted = self.admitted(where)
        if not admitted:
            return [], np.empty(0, np.float32)
        scores = np.stack([self.items[key][0] for key in admitted]) @ query
        order = np.argsort(-scores, kind="stable")[:k]
        return [admitted[i] for i in order], scores[order]


def _passes(item_key, item, where):
    _, category, price, stock = item
    return (
        (where.sold_out or stock != 0)
        and (where.categories is None or category in where.categories)
        and (where.price_min_minor is None or price >= max(where.price_min_minor, 0))
        and (where.price_max_minor is None or 0 <= price <= where.price_max_minor)
        and (where.allow is None or item_key in set(where.allow.tolist()))
    )
