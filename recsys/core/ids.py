"""Ids: strings at every boundary, one int64 key inside.

Source: xxHash XXH3 64 (https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md); the sign bit is
cleared so that a key is a valid non-negative index for jagged tensors, FAISS and delta rows alike.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import xxhash

_SIGN_CLEARED = (1 << 63) - 1
ID_BYTES_MAX = 256


def key(id_: str) -> int:
    """The int64 key of an id: xxh3_64 of its UTF-8 bytes with the sign bit cleared."""
    return int(xxhash.xxh3_64_intdigest(id_.encode("utf-8")) & _SIGN_CLEARED)


def keys(ids: Iterable[str]) -> npt.NDArray[np.int64]:
    """Keys of many ids, in order. Shape [N], int64."""
    digest = xxhash.xxh3_64_intdigest
    return np.fromiter((digest(i.encode("utf-8")) & _SIGN_CLEARED for i in ids), dtype=np.int64)


def unique_by_key(ids: Iterable[str]) -> tuple[list[str], npt.NDArray[np.int64], list[str]]:
    """Drop ids whose key is taken by a different, earlier id.

    Returns (kept ids in order of first appearance, their keys [N], rejected ids). A rejected id shares its key
    with an earlier one; the caller counts and reports it.
    """
    owner: dict[int, str] = {}
    rejected: list[str] = []
    for id_ in ids:
        k = key(id_)
        if owner.setdefault(k, id_) != id_:
            rejected.append(id_)
    return list(owner.values()), np.fromiter(owner.keys(), dtype=np.int64, count=len(owner)), rejected
