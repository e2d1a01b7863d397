"""Rebuild: a store filled from the archive beside the live one goes on from the offsets that the archive covers."""

import shutil
import threading

import pytest
from traffic_world import ITEMS, USERS, oracle, send, traffic

from feature_store.materialize import materialize
from feature_store.online import MemoryStore, open_reader, open_rebuildable, open_store
from recsys.core import Conflict, Deadline, EventType, VersionMismatch
from streaming.archive import Archive, archived, check_reaches, goes_on, is_archive, starts_at
from streaming.config import ArchiveConfig, JobConfig, StreamingConfig, Topics
from streaming.job import Job
from streaming.log import open_log

NEVER = Deadline.never()
SENT = traffic(1, 2_600)[:2_700]
TOPICS = ("events", "impressions", "catalog")


@pytest.fixture
def log(tmp_path):
    with open_log(f"embedded:{tmp_path / 'log'}") as opened:
        opened.create_topics(StreamingConfig(partitions=4).partitions_by_topic(Topics()))
        yield opened


def ingest(log, store, archive=None, *, steps=None, **config) -> None:
    kept = Archive(archive, "embedded:log", ArchiveConfig(**config)) if archive else None
    job = Job(log, store, JobConfig(batch_records_max=200), archive=kept)
    if steps is None:
        job.run(until_caught_up=True)
    for _ in range(steps or 0):
        job.step()
    job.close()
    if kept and steps is None:
        kept.flush()


def rebuild(archive, url: str) -> None:
    target = open_rebuildable(url)
    materialize(archived(archive, rows_max=500), target, goes_on(archive))
    target.close()


def contents(store, *kinds) -> dict:
    ids = {"user": USERS, "seen": USERS, "shown": USERS, "item": ITEMS}
    return {kind: store.load(kind, ids[kind]) for kind in kinds or ids}


def offsets(store) -> dict:
    return {t: {p: o for p, o in store.offsets(t).items() if o} for t in TOPICS}


async def same_as_oracle(url: str, sent) -> None:
    reader, expected = open_reader(url), oracle(sent)
    for user in USERS:
        values = (await reader.user(user, 1_700_000_000_000_000, NEVER)).values
        assert {t: values[f"{EventType(t).label}_count_all"] for t in range(1, 7)} == {
            t: expected[user][t] for t in range(1, 7)
        }
    reader.close()


async def test_streaming_goes_on_after_a_rebuild_as_if_nothing_had_been(log, tmp_path):
    url, archive = f"embedded:{tmp_path / 'shop'}", tmp_path / "archive"
    undisturbed, store = MemoryStore(), open_store(url)
    for part in range(3):
        send(log, SENT[part * 900 : part * 900 + 900])
        ingest(log, store, archive, flush_rows_max=300)
        store.close()
        before, at = contents(store := open_store(url)), offsets(store)
        store.close()
        rebuild(archive, url)
        store = open_store(url)
        assert contents(store) == before  # seen ids and slates too, bit for bit
        assert offsets(store) == at
    ingest(log, undisturbed)
    assert contents(store) == contents(undisturbed)
    assert store.max_event_time_us() == undisturbed.max_event_time_us()
    store.close()
    await same_as_oracle(url, SENT)


async def test_an_older_copy_of_the_archive_reads_the_rest_from_the_log(log, tmp_path):
    url, archive, copy = f"embedded:{tmp_path / 'shop'}", tmp_path / "archive", tmp_path / "copy"
    store = open_store(url)
    send(log, SENT[:1_300])
    ingest(log, store, archive)
    shutil.copytree(archive, copy)
    send(log, SENT[1_300:])
    ingest(log, store, archive)
    expected, kept = contents(store), sorted(p.name for p in archive.glob("*/day=*/*.parquet"))
    store.close()
    rebuild(copy, url)
    store = open_store(url)
    ingest(log, store, archive)  # the newer archive has these offsets already: nothing is written twice
    assert contents(store) == expected
    assert sorted(p.name for p in archive.glob("*/day=*/*.parquet")) == kept
    store.close()


def test_records_that_left_no_row_are_covered(log, tmp_path):
    archive, store = tmp_path / "archive", open_store(f"embedded:{tmp_path / 'shop'}")
    send(log, SENT[:500])
    ingest(log, store, archive)
    send(log, [*SENT[:500], ("events", b"u1", b"\xff"), ("impressions", b"u1", b"\xff")])
    ingest(log, store, archive)
    covered = {(o.topic, o.partition): o.next for o in goes_on(archive).offsets}
    assert covered == {(t, p): o for t in TOPICS for p, o in store.offsets(t).items()}
    store.close()


def test_a_crash_leaves_the_journal_to_the_next_writer(log, tmp_path):
    url, archive = f"embedded:{tmp_path / 'shop'}", tmp_path / "archive"
    send(log, SENT)
    store = open_store(url)
    for _ in range(3):
        ingest(log, store, archive, steps=2)  # ends without a flush
        assert len(list(archive.glob("journal/*.arrow"))) == 2
    ingest(log, store, archive)
    expected = contents(store)
    store.close()
    assert not list(archive.glob("journal/*.arrow"))
    rebuild(archive, url)
    store = open_store(url)
    assert contents(store) == expected
    store.close()


def test_a_hole_in_the_archive_is_named(log, tmp_path):
    archive, store = tmp_path / "archive", open_store(f"embedded:{tmp_path / 'shop'}")
    send(log, SENT[:300])
    ingest(log, store, archive)
    before = store.offsets("events")
    send(log, SENT[300:600])
    ingest(log, store)
    first = store.offsets("events")
    send(log, SENT[600:900])
    ingest(log, store, archive)
    with pytest.raises(VersionMismatch, match=rf"no offsets {before[0]} to {first[0] - 1}.*catalog|events"):
        goes_on(archive)
    store.close()


def test_offsets_are_of_one_log(log, tmp_path):
    url, archive = f"embedded:{tmp_path / 'shop'}", tmp_path / "archive"
    send(log, SENT[:300])
    store = open_store(url)
    ingest(log, store, archive)
    store.close()
    rebuild(archive, url)
    store = open_store(url)
    with open_log(f"embedded:{tmp_path / 'other'}") as other:
        other.create_topics(StreamingConfig(partitions=4).partitions_by_topic(Topics()))
        with pytest.raises(VersionMismatch, match="which its offsets are of"):
            ingest(other, store)
        with pytest.raises(VersionMismatch, match="archive"):
            Archive(archive, "other").take(other.log_id(), {})
        with pytest.raises(VersionMismatch, match="archive"):
            check_reaches(goes_on(archive), other, Topics())
    check_reaches(goes_on(archive), log, Topics())
    store.close()


async def test_a_plain_dataset_covers_nothing_and_its_events_are_recognised(log, tmp_path):
    url, archive = f"embedded:{tmp_path / 'shop'}", tmp_path / "archive"
    send(log, SENT)
    store = open_store(url)
    ingest(log, store, archive)
    expected = contents(store)
    store.close()
    target = open_rebuildable(url)
    materialize(archived(archive), target, starts_at(log, Topics()))
    target.close()
    store = open_store(url)
    assert offsets(store) == {t: {} for t in TOPICS}
    job = Job(log, store)
    report = job.run(until_caught_up=True)
    job.close()
    assert set(report.events) == {"duplicate", "late", "applied"}  # applied: catalogue changes, marked events
    assert contents(store, "user", "seen", "shown") == {k: expected[k] for k in ("user", "seen", "shown")}
    assert contents(store, "item") == {"item": expected["item"]}
    store.close()
    assert not is_archive(tmp_path)


async def test_a_rebuild_beside_a_writer_at_work(log, tmp_path):
    url, archive = f"embedded:{tmp_path / 'shop'}", tmp_path / "archive"
    send(log, SENT[:700])
    store = open_store(url)
    ingest(log, store, archive)
    stop, conflicts = threading.Event(), []

    def writer():
        while not stop.is_set():
            job = Job(log, store, JobConfig(batch_records_max=50), archive=Archive(archive, "test"))
            try:
                job.run(stop=stop)
            except Conflict as error:
                conflicts.append(error)
            job.close()

    thread = threading.Thread(target=writer)
    thread.start()
    reader, whole = open_reader(url), []
    for part in range(1, 5):
        send(log, SENT[part * 500 + 200 : part * 500 + 700])
        target = open_rebuildable(url)
        died = target.rebuild()
        with pytest.raises(Conflict, match="rebuild"):
            target.rebuild()  # one at a time
        died.close()
        target.close()
        rebuild(archive, url)
        whole.append(all(reader.load("user", USERS)))
    stop.set()
    thread.join()
    ingest(log, store, archive)
    undisturbed = MemoryStore()
    ingest(log, undisturbed)
    assert contents(store) == contents(undisturbed)
    assert all(whole)
    assert conflicts
    store.close()
    reader.close()
    await same_as_oracle(url, SENT)
