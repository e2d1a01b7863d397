"""What only the Redis store has: its URL, server settings, buckets, rebuild."""

import asyncio
import contextlib
import subprocess
import sys

import numpy as np
import pytest
from redis.cluster import RedisCluster

from feature_store import FeatureStatus
from feature_store.config import RedisStoreConfig
from feature_store.materialize import materialize
from feature_store.online import Commit, MemoryStore, OffsetStep, Update, open_reader, open_store
from feature_store.online.redis.server import Address
from feature_store.views import ITEM_FEATURE_NAMES, VIEW_SET
from recsys.core import BadInput, Conflict, CorruptData, Deadline, EventBatch, NotFound, Unavailable, VersionMismatch
from recsys.core.config import Config
from recsys.core.murmur2 import partition_of, partitions_of

NEVER = Deadline.never()
T, HOUR = 1_600_000_000_000_000, 3_600_000_000
both = pytest.mark.parametrize("redis_url", ["standalone", "cluster"], indirect=True)
standalone = pytest.mark.parametrize("redis_url", ["standalone"], indirect=True)


def world(n: int) -> EventBatch:
    rng = np.random.default_rng(3)
    return EventBatch.from_columns(
        {
            "event_id": [f"e{i}" for i in range(n)],
            "kind": [1] * n,
            "event_type": rng.integers(1, 7, n),
            "event_time": T + rng.integers(0, 2_000, n) * HOUR,
            "user_id": [f"u{i}" for i in rng.integers(0, 40, n)],
            "item_id": [f"商品{i}" for i in rng.integers(0, 300, n)],
            "price": rng.integers(1, 900, n).tolist(),
        }
    )


@both
async def test_readers_see_what_a_memory_store_computes(redis_url):
    memory, store, now = MemoryStore(), open_store(redis_url), T + 2_001 * HOUR
    memory.apply(world(4_000))
    materialize([world(4_000).slice(0, 1_500), world(4_000).slice(1_500, 2_500)], store)
    reader, items = open_reader(redis_url), [f"商品{i}" for i in (5, 299, 5, 1_000, *range(200))]
    ours, theirs = await reader.items(items, now, NEVER), await memory.items(items, now, NEVER)
    np.testing.assert_array_equal(ours.values, theirs.values)
    np.testing.assert_array_equal(ours.status, theirs.status)
    assert (await reader.items([], now, NEVER)).values.shape == (0, len(ITEM_FEATURE_NAMES))
    for u in range(40):
        assert reader.load("user", [f"u{u}"]) == memory.load("user", [f"u{u}"])
        ours, theirs = await reader.user(f"u{u}", now, NEVER), await memory.user(f"u{u}", now, NEVER)
        assert ours.recent_time_us.tolist() == theirs.recent_time_us.tolist()
        np.testing.assert_equal(dict(ours.values), dict(theirs.values))
    assert reader.max_event_time_us() == store.max_event_time_us() == memory.max_event_time_us()
    assert (reader.view_set, reader.store_id) == (VIEW_SET, store.store_id)
    await reader.aclose()
    store.close()


async def test_reads_at_once_share_a_connection_and_survive_its_end(redis_server):
    reader = open_reader(redis_server.url)
    await asyncio.gather(*(reader.items([f"i{i}"], 0, NEVER) for i in range(100)))
    normal = redis_server.client.client_list(_type="normal")
    assert sum(c["cmd"] == "mget" for c in normal) == 1
    for connection in normal:
        if connection["cmd"] == "mget":
            redis_server.client.client_kill_filter(_id=connection["id"])
    found = await asyncio.gather(*(reader.items([f"i{i}"], 0, NEVER) for i in range(100)))
    assert all((f.status == FeatureStatus.NOT_FOUND).all() for f in found)
    await reader.aclose()


@both
async def test_of_reads_at_once_one_looks_whether_the_store_was_rebuilt(redis_url):
    reader = open_reader(redis_url, Config({"feature_store.redis": {"meta_refresh_s": 0.3}}))

    def looks():
        with contextlib.closing(Address.parse(redis_url).client(RedisStoreConfig())) as client:
            nodes = client.get_primaries() if isinstance(client, RedisCluster) else [None]
            said = [client.info("commandstats", **({"target_nodes": node} if node else {})) for node in nodes]
        return sum(stats.get("cmdstat_hgetall", {}).get("calls", 0) for stats in said)

    before, rounds = looks(), 3
    for _ in range(rounds):
        await asyncio.sleep(0.3)
        await asyncio.gather(*(reader.items([f"i{i}"], 0, NEVER) for i in range(200)))
    assert rounds <= looks() - before <= 3 * rounds
    await reader.aclose()


@both
async def test_a_rebuild_is_seen_whole_and_drops_what_was_there(redis_url):
    config = Config({"feature_store": {"redis": {"meta_refresh_s": 0.02}}})
    store, reader = open_store(redis_url, config), open_reader(redis_url, config)
    store.commit(Commit(updates=[Update("seen", ["old"], [b"x"])], offsets=[OffsetStep("events", 0, 0, 5)]))
    died = store.rebuild()
    died.commit(Commit(updates=[Update("seen", ["left"], [b"x"])]))
    assert (await reader.user("u1", T + 2_001 * HOUR, NEVER)).status is FeatureStatus.NOT_FOUND
    assert materialize([world(500)], store) == 500
    assert (await reader.user("u1", T + 2_001 * HOUR, NEVER)).status is FeatureStatus.PRESENT
    assert store.offsets("events") == {}
    assert store.load("seen", ["old", "left"]) == [b"", b""]
    assert store.meta().live == f"{VIEW_SET}.2"
    client = store._client
    assert all(k == b"{d11}:meta" or k.startswith(f"{{d11:{VIEW_SET}.2:".encode()) for k in client.scan_iter("*"))
    store.commit(Commit(updates=[], offsets=[OffsetStep("events", 0, 0, 5)]))
    await reader.aclose()
    store.close()


@standalone
def test_a_rebuild_that_another_one_overtook_is_refused(redis_url):
    store = open_store(redis_url, Config({"feature_store": {"redis": {"meta_refresh_s": 0.01}}}))
    first = store.rebuild()
    first.commit(Commit(updates=[Update("item", ["i"], [b"1"])]))
    second = store.rebuild()
    with pytest.raises(Conflict, match="a later rebuild"):
        first.switch()
    second.switch()
    assert store.load("item", ["i"]) == [b""]
    store.close()


@standalone
def test_buckets_are_fixed_when_a_store_is_created(redis_url):
    open_store(redis_url, Config({"feature_store": {"redis": {"buckets": 3}}})).close()
    store = open_store(redis_url, Config({"feature_store": {"redis": {"buckets": 16}}}))
    assert store.meta().buckets == 3
    store.commit(Commit(updates=[Update("item", ["商"], [b"x"])]))
    at = partition_of("商".encode(), 3)
    assert store._client.get(f"{{d11:{VIEW_SET}.0:{at}}}:i:商") == b"x"
    store.close()


@standalone
def test_a_store_of_another_view_set_or_with_a_broken_record_is_refused(redis_url):
    store = open_store(redis_url)
    store._client.hset("{d11}:meta", "live", "older.4")
    with pytest.raises(VersionMismatch, match="features materialize"):
        open_reader(redis_url)
    assert materialize([world(10)], store) == 10
    open_reader(redis_url).close()
    store._client.hdel("{d11}:meta", "buckets")
    with pytest.raises(CorruptData, match="buckets"):
        open_reader(redis_url)
    store.close()


def test_a_server_that_evicts_state_is_refused(redis_server):
    redis_server.client.config_set("maxmemory-policy", "allkeys-lru")
    with pytest.raises(VersionMismatch, match="maxmemory-policy noeviction"):
        open_store(redis_server.url)
    open_reader(redis_server.url).close()  # reading does no harm
    redis_server.client.config_set("maxmemory-policy", "volatile-ttl")
    open_store(redis_server.url).close()


def test_a_server_without_aof_is_warned_about(redis_server, capsys):
    open_store(redis_server.url).close()
    assert "redis_aof_off" not in "".join(capsys.readouterr())
    redis_server.client.config_set("appendonly", "no")
    open_store(redis_server.url).close()
    assert "redis_aof_off" in "".join(capsys.readouterr())


def test_a_full_server_says_so_and_keeps_the_step_out(redis_server):
    from recsys.core import Overloaded

    store = open_store(redis_server.url)
    redis_server.client.config_set("maxmemory", "100kb")
    with pytest.raises(Overloaded, match="maxmemory"):
        store.commit(Commit(updates=[Update("user", ["a"], [b"1"])], offsets=[OffsetStep("events", 0, 0, 1)]))
    redis_server.client.config_set("maxmemory", "0")
    assert store.offsets("events") == {}
    assert store.load("user", ["a"]) == [b""]
    store.close()


def test_a_login_and_a_password_file(redis_server, tmp_path):
    redis_server.client.config_set("requirepass", "s3:cret/@")
    with pytest.raises(BadInput, match="login"):
        open_store(redis_server.url)
    open_store(redis_server.url.replace("//", "//:s3%3Acret%2F%40@")).close()
    (tmp_path / "password").write_text("s3:cret/@\n")
    config = {"feature_store": {"redis": {"password_file": str(tmp_path / "password")}}}
    open_store(redis_server.url, Config(config)).close()
    with pytest.raises(NotFound, match="password_file"):
        open_store(redis_server.url, Config({"feature_store": {"redis": {"password_file": str(tmp_path / "no")}}}))


def test_urls():
    one = Address.parse("rediss://ann:p%40ss@cache:7000/2")
    assert (one.hosts, one.db, one.is_tls, one.is_cluster) == ((("cache", 7000),), 2, True, False)
    assert (one.username, one.password) == ("ann", "p@ss")
    assert "p@ss" not in repr(one) + str(one)
    assert Address.parse("redis://[::1]").hosts == (("::1", 6379),)
    assert Address.parse("redis://a,b:7001").is_cluster
    assert Address.parse("redis://a?cluster=true").is_cluster


WRONG = (
    "redis:// redis://a:port redis://a/x redis://a,b/1 redis://a,b?cluster=false redis://a?pool=3 "
    "redis://a?cluster=no redis://a#x"
)


@pytest.mark.parametrize("url", WRONG.split())
def test_bad_urls(url):
    with pytest.raises(BadInput, match="store URL"):
        Address.parse(url)


def test_a_bad_url_does_not_print_its_password():
    with pytest.raises(BadInput) as caught:
        Address.parse("redis://ann:secret@a:port")
    assert "secret" not in str(caught.value)


def test_nobody_at_the_address():
    with pytest.raises(Unavailable):
        open_store("redis://127.0.0.1:1", Config({"feature_store": {"redis": {"timeout_s": 0.2}}}))
    with pytest.raises(Unavailable):
        open_store("redis://127.0.0.1:1?cluster=true", Config({"feature_store": {"redis": {"timeout_s": 0.2}}}))


def test_settings_out_of_range():
    with pytest.raises(BadInput, match="buckets"):
        RedisStoreConfig(buckets=0)


def test_an_embedded_store_needs_no_redis(tmp_path):
    code = f"import sys; from feature_store.online import open_store; open_store('embedded:{tmp_path}').close(); "
    subprocess.run([sys.executable, "-c", code + "sys.exit('redis' in sys.modules)"], check=True)


def test_partitions_of_many_keys_are_those_of_each():
    ids = [b"", b"a", *(f"买{i}".encode() for i in range(999)), b"x" * 10_000]
    assert partitions_of(ids, 7).tolist() == [partition_of(i, 7) for i in ids]
    assert partitions_of([], 7).tolist() == []


@both
def test_each_side_of_each_bucket_moves_by_itself(redis_url):
    store, other = open_store(redis_url), open_store(redis_url)
    user, mark = OffsetStep("events", 3, 0, 7), OffsetStep("events", 3, 0, 7, "item", bucket=5)
    assert store.claim("user", [3])[3].offsets == {}
    store.commit(Commit(updates=[], offsets=[user]))
    store.commit(Commit(updates=[], offsets=[OffsetStep("item-updates", 5, 0, 2, "item"), mark]))
    assert other.claim("user", [3])[3].offsets == {("events", 3): 7}
    assert other.claim("user", [5])[5].offsets == {}
    at = other.claim("item", [5])[5]
    assert (at.offsets, at.marks) == ({("item-updates", 5): 2}, {("events", 3): 7})
    assert other.offsets("events") == {3: 7}
    assert other.offsets("item-updates") == {5: 2}
    store.commit(Commit(updates=[], offsets=[OffsetStep("events", 3, 7, 9)]))
    other.verify("item", [5])
    with pytest.raises(Conflict, match="user side of bucket 3"):
        other.verify("user", [3])
    store.close()
    other.close()


@standalone
def test_a_side_that_was_lost_and_written_again_is_not_taken_for_what_it_was(redis_url):
    store, other = open_store(redis_url), open_store(redis_url)
    at = partition_of(b"a", 8)
    store.commit(Commit(updates=[Update("user", ["a"], [b"1"])], offsets=[OffsetStep("events", at, 0, 5)]))
    store._client.delete(*store._client.keys(f"{{d11:{VIEW_SET}.0:{at}}}*"))  # a replica without them took over
    other.commit(Commit(updates=[Update("user", ["a"], [b"2"])], offsets=[OffsetStep("events", at, 0, 5)]))
    with pytest.raises(Conflict, match="user side of bucket"):
        store.commit(Commit(updates=[Update("user", ["a"], [b"3"])], offsets=[OffsetStep("events", at, 5, 9)]))
    assert store.load("user", ["a"]) == [b"2"]
    store.close()
    other.close()


@standalone
def test_a_call_whose_answer_was_lost_counts_once(redis_url, monkeypatch):
    monkeypatch.setattr("secrets.token_hex", lambda _: "one")
    store = open_store(redis_url)
    step = Commit(updates=[Update("user", ["a"], [b"1"])], offsets=[OffsetStep("events", 0, 0, 5)])
    store.commit(step)
    store.commit(step)  # what redis-py does when the connection broke before the answer came
    assert store.offsets("events") == {0: 5}
    store.close()


@both
def test_a_rebuild_brings_the_offsets_to_go_on_from_and_the_marks_of_its_items(redis_url):
    store = open_store(redis_url, Config({"feature_store": {"redis": {"meta_refresh_s": 0.01}}}))
    store.commit(Commit(updates=[], offsets=[OffsetStep("item-updates", 2, 0, 9, "item")]))
    zombie, before = open_store(redis_url), store.namespace()
    assert zombie.claim("user", [1])[1].offsets == {}
    rebuild = store.rebuild()
    rebuild.commit(Commit(updates=[Update("item", ["i"], [b"1"])], offsets=[OffsetStep("events", 1, 0, 40)]))
    rebuild.commit(
        Commit(updates=[], offsets=[OffsetStep("events", 1, 40, 50), OffsetStep("catalog", 2, 0, 4, "item")])
    )
    rebuild.switch()
    assert store.namespace() != before
    assert store.claim("user", [1])[1].offsets == {("events", 1): 50}
    for q, at in store.claim("item", range(8)).items():
        assert at.marks == {("events", 1): 50}
        assert at.offsets == ({("catalog", 2): 4} if q == 2 else {})
    with pytest.raises(Conflict, match="rebuilt store"):
        zombie.verify("user", [1])
    store.close()
    zombie.close()


@standalone
def test_stress_state_is_in_its_bucket_under_names_of_its_own(redis_url):
    store = open_store(redis_url)
    store.commit(Commit(updates=[Update("user", ["a"], [b"x"], shadow=True)]))
    at = partition_of(b"a", 8)
    assert store._client.get(f"{{d11:{VIEW_SET}.0:{at}}}:shadow-u:a") == b"x"
    assert store.load("user", ["a"]) == [b""]
    store.close()
