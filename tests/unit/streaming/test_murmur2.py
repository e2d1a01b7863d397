"""The values that Kafka's own tests give."""

import pytest

from recsys.core.murmur2 import murmur2, partition_of


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"21", -973932308),
        (b"foobar", -790332482),
        (b"a-little-bit-long-string", -985981536),
        (b"a-little-bit-longer-string", -1486304829),
        (b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58897971),
        (b"abc", 479470107),
    ],
)
def test_equals_kafka(data, expected):
    assert murmur2(data) == expected & 0xFFFFFFFF


def test_a_partition_is_the_positive_hash_modulo_p():
    assert partition_of(b"21", 100) == (-973932308 & 0x7FFFFFFF) % 100
    assert {partition_of(b"u%d" % i, 8) for i in range(200)} == set(range(8))
