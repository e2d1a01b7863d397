"""What the Kafka log can be asked without a broker: its URL, its configuration, its fair buffer."""

import pytest

from recsys.core import BadInput
from recsys.core.config import Config
from recsys.core.urls import kafka_address
from streaming.config import KafkaConfig
from streaming.log import open_log, topics_at
from streaming.log.kafka.buffer import FairBuffer, Records


def records(first: int, number: int, value: bytes = b"x") -> Records:
    at = list(range(first, first + number))
    return Records(at, [1_000 * o for o in at], [b"k"] * number, [value] * number, [{}] * number)


def test_a_short_partition_does_not_wait_for_a_long_one():
    buffer = FairBuffer("t", {0: 0, 1: 0, 2: 5})
    buffer.fill(0, records(0, 1_000))
    buffer.fill(2, records(5, 3))
    taken = buffer.take(10, 1 << 20)
    assert [(b.partition, len(b)) for b in taken] == [(0, 5), (2, 3)]
    assert taken[1].offset.tolist() == [5, 6, 7]
    assert taken[1].append_us.tolist() == [5_000, 6_000, 7_000]


def test_whose_turn_it_is_moves_on():
    buffer = FairBuffer("t", {0: 0, 1: 0, 2: 0})
    for p in range(3):
        buffer.fill(p, records(0, 10))
    assert [b.partition for _ in range(6) for b in buffer.take(1, 1)] == [0, 1, 2, 0, 1, 2]


def test_bytes_are_bounded_but_one_record_always_comes():
    buffer = FairBuffer("t", {0: 0})
    buffer.fill(0, records(0, 10, b"x" * 100))
    assert [len(b) for b in buffer.take(10, 250)] == [3]
    assert [len(b) for b in buffer.take(10, 1)] == [1]


def test_the_end_moves_over_what_is_no_record():
    buffer = FairBuffer("t", {0: 0, 1: 0})
    buffer.fill(0, records(0, 2))
    buffer.reached(0, 7)
    (one,) = buffer.take(1, 1)
    assert one.next_offset == 1
    (two,) = buffer.take(1, 1)
    assert (len(two), two.next_offset) == (1, 7)
    assert buffer.take(1, 1) == []
    buffer.reached(0, 9)
    (only_end,) = buffer.take(1, 1)
    assert (len(only_end), only_end.next_offset) == (0, 9)
    buffer.reached(0, 9)
    assert buffer.take(1, 1) == []


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("kafka://localhost:9092", ("localhost:9092", None)),
        ("kafka://a.b:1,c-d:2/shop.events", ("a.b:1,c-d:2", "shop.events")),
        ("kafka://[::1]:9092/", ("[::1]:9092", None)),
    ],
)
def test_urls(url, found):
    assert kafka_address(url, "log URL") == found


@pytest.mark.parametrize(
    "url", ["kafka://", "kafka://host", "kafka:host:1", "kafka://h:1/a/b", "kafka://u:p@h:1", "kafka://h:1,/t"]
)
def test_urls_that_are_none(url):
    with pytest.raises(BadInput, match="kafka://HOST:PORT"):
        open_log(url)


def test_the_urls_topic_is_the_events_topic():
    config = Config(environ={"DOUBLE11__STREAMING__TOPICS__CATALOG": "shop-catalog"})
    topics = topics_at("kafka://h:1/shop-events", config)
    assert (topics.events, topics.catalog, topics.impressions) == ("shop-events", "shop-catalog", "impressions")
    assert topics_at("embedded:x", config).events == "events"


@pytest.mark.parametrize(
    ("url", "topics"),
    [("kafka://h:1/catalog", {}), ("kafka://h:1", {"samples": "deltas"}), ("embedded:x", {"dead_letter": ""})],
)
def test_topics_without_a_name_of_their_own_are_refused(url, topics):
    with pytest.raises(BadInput, match=r"\[streaming.topics\].*no two alike"):
        topics_at(url, Config({"streaming": {"topics": topics}}))


@pytest.mark.parametrize(
    ("key", "value"),
    [("driver", "pulsar"), ("min_insync_replicas", 4), ("prefetch_bytes_max", 1), ("delivery_timeout_ms", 10)],
)
def test_settings_out_of_range_are_refused(key, value):
    with pytest.raises(BadInput, match=f"streaming.kafka.{key}"):
        Config(flags={f"streaming.kafka.{key}": value}).get(KafkaConfig)


def test_the_password_is_in_a_file_and_nowhere_else(tmp_path):
    with pytest.raises(BadInput, match="sasl_password_file"):
        KafkaConfig(security_protocol="SASL_SSL", sasl_username="u")
    file = tmp_path / "password"
    config = KafkaConfig(security_protocol="SASL_SSL", sasl_username="u", sasl_password_file=file)
    with pytest.raises(BadInput, match="FileNotFoundError"):
        config.password()
    file.write_text("hunter 2\n")
    assert config.password() == "hunter 2"
    assert "hunter" not in repr(config)


@pytest.mark.parametrize("driver", ["confluent", "kafka-python"])
def test_clients_are_told_how_to_identify_themselves(tmp_path, driver):
    (tmp_path / "password").write_text("secret\n")
    flags = {
        "driver": driver,
        "security_protocol": "SASL_PLAINTEXT",
        "sasl_username": "double11",
        "sasl_password_file": tmp_path / "password",
        "sasl_mechanism": "SCRAM-SHA-256",
    }
    with open_log("kafka://127.0.0.1:1", Config(flags={f"streaming.kafka.{k}": v for k, v in flags.items()})) as log:
        told = {str(v) for v in log.settings().values()}
    assert {"SASL_PLAINTEXT", "SCRAM-SHA-256", "double11", "secret"} <= told
