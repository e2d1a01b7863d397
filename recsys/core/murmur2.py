"""murmur2 as Apache Kafka's default partitioner uses it, so that every driver puts a key into the same partition.

Source: org.apache.kafka.common.utils.Utils.murmur2 (Apache Kafka); librdkafka calls it `murmur2_random`.
"""

from __future__ import annotations

from functools import lru_cache

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
