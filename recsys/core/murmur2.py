"""murmur2 as Apache Kafka's default partitioner uses it, so that every driver puts a key into the same partition.

Source: org.apache.kafka.common.utils.Utils.murmur2 (Apache Kafka); librdkafka calls it `murmur2_random`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

_M, _SEED, _MASK = 0x5BD1E995, 0x9747B28C, 0xFFFFFFFF


def murmur2(data: bytes) -> int:
    """The unsigned 32-bit hash of some bytes."""
    length = len(data)
    h = _SEED ^ length
    whole = length - length % 4
    for i in range(0, whole, 4):
        k = int.from_bytes(data[i : i + 4], "little") * _M & _MASK
        k = (k ^ k >> 24) * _M & _MASK
        h = (h * _M & _MASK) ^ k
    if rest := data[whole:]:
        h = (h ^ int.from_bytes(rest, "little")) * _M & _MASK
    h = (h ^ h >> 13) * _M & _MASK
    return h ^ h >> 15


@lru_cache(maxsize=1 << 17)
def partition_of(key: bytes, num_partitions: int) -> int:
    """Partition of a key: the hash with its sign bit cleared, modulo the number of partitions."""
    return (murmur2(key) & 0x7FFFFFFF) % num_partitions


def partitions_of(keys: Sequence[bytes], num_partitions: int) -> npt.NDArray[np.int64]:
    """`partition_of` of N keys at once [N]: keys of one length are hashed together."""
    out = np.empty(len(keys), np.int64)
    lengths = np.fromiter(map(len, keys), np.int64, len(keys))
    for length in np.unique(lengths).tolist():
        at = np.flatnonzero(lengths == length)
        data = np.frombuffer(b"".join([keys[i] for i in at.tolist()]), np.uint8).reshape(len(at), length)
        out[at] = (_murmur2_rows(data) & np.uint32(0x7FFFFFFF)) % num_partitions
    return out


def _murmur2_rows(data: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint32]:
    """murmur2 of each row of bytes [N, L], in wrapping 32-bit arithmetic."""
    num_keys, length = data.shape
    m = np.uint32(_M)
    h = np.full(num_keys, _SEED ^ length, np.uint32)
    whole = length - length % 4
    for k in np.ascontiguousarray(data[:, :whole]).view("<u4").T:
        k = k * m
        h = (h * m) ^ ((k ^ (k >> np.uint32(24))) * m)
    if whole < length:
        for i in range(whole, length):
            h = h ^ (data[:, i].astype(np.uint32) << np.uint32(8 * (i - whole)))
        h = h * m
    h = (h ^ (h >> np.uint32(13))) * m
    return h ^ (h >> np.uint32(15))
