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


def find_rows(
    sorted_key: npt.NDArray[np.int64], wanted: npt.NDArray[np.int64], row: npt.NDArray[np.int64] | None = None
) -> npt.NDArray[np.int64]:
    """Where each wanted key stands in ascending, distinct keys; -1 for one that is not there. Same shape as `wanted`.

    row [M]: what stands for each place instead of the place itself, e.g. the argsort that put the keys in order.
    """
    if not len(sorted_key):
        return np.full(wanted.shape, -1, np.int64)
    place = np.minimum(np.searchsorted(sorted_key, wanted), len(sorted_key) - 1)
    return np.where(sorted_key[place] == wanted, place if row is None else row[place], -1)


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
