"""The archive on disk: journal, merging, erasing; whole after a crash at any of their points."""

import copy
import os
import shutil
import time
from collections import Counter
from pathlib import Path

import polars as pl
import pytest
from double11.v1.event_pb2 import Action, Event, ForgetUser, Impression, ImpressionItem
from traffic_world import USERS, T, send, traffic

from feature_store.materialize import materialize
from feature_store.offline.samples import by_day, read_samples
from feature_store.online import MemoryStore, open_rebuildable, open_store
from recsys.core import EventKind
from recsys.data import Dataset
from recsys.data.importers import import_dataset
from streaming.archive import Archive, archived, files, goes_on, read_items
from streaming.archive.coverage import covered
from streaming.archive.tidy import Tidy
from streaming.archive.tombstones import tombstones
from streaming.config import ArchiveConfig, JobConfig, StreamingConfig, Topics
from streaming.dead_letter import requeue
from streaming.job import Job
from streaming.log import open_log

SENT = traffic(2, 900, forgets=True)
EVENT = ["kind", "item_id", "event_time", "listed"]


@pytest.fixture
def log(tmp_path):
    with open_log(f"embedded:{tmp_path / 'log'}") as opened:
        opened.create_topics(StreamingConfig(partitions=3).partitions_by_topic(Topics()))
        yield opened


def ingest(log, store, root, offline=None, **config) -> Archive:
    archive = Archive(root, "test", ArchiveConfig(tidy_s=3_600, **config), offline=offline)
    job = Job(log, store, JobConfig(batch_records_max=90), archive=archive)
    job.run(until_caught_up=True)
    job.close()
    archive.flush()
    return archive


def rows(root) -> Counter:
    """Every row that a reader of the archive gets."""
    return Counter((r["event_id"], r["late"]) for a in archived(root, rows_max=64) for r in a.batch.table.to_pylist())


def on_disk(root, user: str) -> int:
    frames = [pl.read_parquet(p, hive_partitioning=False) for p in root.glob("events/day=*/*.parquet")]
    return sum(f.filter(pl.col("user_id") == user).height for f in frames)


def test_merging_keeps_every_row_and_the_coverage(log, tmp_path):
    send(log, SENT)
    root = tmp_path / "archive"
    ingest(log, MemoryStore(), root, flush_rows_max=60)
    before, reach, num_files = rows(root), goes_on(root), len(files.found(root, "events"))
    dataset = Dataset.open(root).events()
    tidy = Tidy(root, ArchiveConfig(merge_files_min=2, merged_keep_s=3_600))
    mine = covered(root)
    while tidy.merge(mine):
        assert rows(root) == before  # after each merge, beside the files that it was made of
    assert Dataset.open(root).events().sort("event_id").equals(dataset.sort("event_id"))
    assert len(files.found(root, "events")) > num_files
    for path in files.found(root, "events"):
        os.utime(path, (time.time() - 7_200, time.time() - 7_200))
    assert not tidy.merge(mine)
    assert len(files.found(root, "events")) < num_files / 2
    assert rows(root) == before
    assert goes_on(root) == reach


def test_items_are_whole_after_every_flush_whoever_writes(log, tmp_path):
    """Without a scan of day files, and also while parts are merged."""
    root, store = tmp_path / "archive", MemoryStore()
    for part in (SENT[:300], SENT[300:600], SENT[600:]):
        send(log, part)
        ingest(log, store, root, flush_rows_max=100)
        check_items(root)
    found = read_items(root)
    tidy, num_files = Tidy(root, ArchiveConfig(merge_files_min=2, merged_keep_s=0)), len(files.found(root, "items"))
    while tidy.merge(covered(root)):
        assert read_items(root).equals(found)
    assert len(files.found(root, "items")) < num_files
    check_items(root)
    import_dataset("canonical", root, tmp_path / "copy")
    assert Dataset.open(tmp_path / "copy").items().equals(Dataset.open(root).items())


def check_items(root) -> None:
    """Each item of the archive once, from its earliest listing on, else its earliest action."""
    events = [e for a in archived(root) for e in a.batch.table.select(EVENT).to_pylist()]
    acted = [e for e in events if e["kind"] == EventKind.ACTION]
    first: dict[str, int] = {}
    for some in ([e for e in events if e["listed"]], acted):
        firsts: dict[str, int] = {}
        for e in some:
            firsts[e["item_id"]] = min(e["event_time"], firsts.get(e["item_id"], e["event_time"]))
        first = firsts | first
    items = Dataset.open(root).items()
    times = items["available_from"].dt.timestamp("us").to_list()
    assert first
    assert dict(zip(items["item_id"].to_list(), times, strict=True)) == first
    assert items["item_id"].is_unique().all()


def test_a_flush_that_died_before_its_coverage_doubles_nothing(log, tmp_path):
    """Its files reach behind the store's offset: a step was in the journal, and not yet in the store."""
    send(log, SENT)
    whole, died = tmp_path / "whole", tmp_path / "died"
    ingest(log, MemoryStore(), whole)
    store, archive = MemoryStore(), Archive(died, "test")
    job = Job(log, store, JobConfig(batch_records_max=90), archive=archive)
    job.step()
    job.step()
    behind = copy.deepcopy(store)
    job.step()
    shutil.copytree(died / "journal", tmp_path / "journal")
    archive.flush()
    shutil.rmtree(died / "journal")
    shutil.move(tmp_path / "journal", died / "journal")
    shutil.rmtree(died / "coverage")
    assert not rows(died)
    ingest(log, behind, died)
    assert rows(died) == rows(whole)
    assert Dataset.open(died).items().equals(Dataset.open(whole).items())


def test_a_worker_that_takes_partitions_during_a_flush_does_not_disturb_it(log, tmp_path, monkeypatch):
    """Once the coverage is there, whoever takes partitions deletes what it has passed: of a writer at work, too."""
    root, unlink = tmp_path / "archive", Path.unlink
    send(log, SENT)
    archive = Archive(root, "test")
    job = Job(log, MemoryStore(), JobConfig(batch_records_max=90), archive=archive)
    job.step()
    assert list(root.glob("journal/*.arrow"))

    def unlink_late(path: Path, missing_ok: bool = False) -> None:
        monkeypatch.undo()
        Archive(root, "test").take(log.log_id(), {("", Topics().events): {0: 0}})
        assert not list(root.glob("journal/*.arrow"))
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink_late)
    archive.flush()
    job.run(until_caught_up=True)
    archive.flush()
    ingest(log, MemoryStore(), tmp_path / "whole")
    assert rows(root) == rows(tmp_path / "whole")


def test_small_files_are_merged_up_to_a_size(log, tmp_path):
    send(log, SENT)
    root = tmp_path / "archive"
    ingest(log, MemoryStore(), root, flush_rows_max=60)
    before = rows(root)
    tidy = Tidy(
        root, ArchiveConfig(small_bytes_max=8 << 10, merged_bytes_max=16 << 10, merge_files_min=2, merged_keep_s=0)
    )
    while tidy.merge(covered(root)):
        pass
    assert max(p.stat().st_size for p in files.found(root, "events")) < 32 << 10
    assert rows(root) == before


def test_a_forgotten_user_leaves_the_archive_and_stays_out(log, tmp_path):
    root, offline, url = tmp_path / "archive", tmp_path / "offline", f"embedded:{tmp_path / 'shop'}"
    sent = traffic(3, 800)
    send(log, sent)
    store = open_store(url)
    ingest(log, store, root, flush_rows_max=50)
    # A record that could not be read at first comes from the dead letters after the user has been forgotten.
    for day in (0, 1):
        labelled = pl.DataFrame(
            {
                "sample_id": [f"s{day}", f"t{day}"], "request_id": ["r", "r"], "user_id": ["u1", "u2"],
                "item_id": ["a", "a"], "event_time_us": [T + day * 86_400_000_000] * 2, "position": [1, 1],
                "propensity": [0.5, 0.5], "action_types": [[2], []], "action_time_us": [0, 0],
                "stress": [False, False], "source": ["i1", "i1"], "offset": [1, 2],
            }
        )  # fmt: skip
        for path, frame in by_day(labelled, offline, "1-0-1").items():
            path.parent.mkdir(parents=True, exist_ok=True)
            frame.write_parquet(path)
    (offline / "user").mkdir()
    pl.DataFrame({"user_id": ["u1", "u2"], "x": [1, 2]}).write_parquet(offline / "user" / "day=2020-09-13.parquet")
    others = on_disk(root, "u2")
    assert on_disk(root, "u1")
    at = T + 40 * 86_400_000_000
    forget = Event(event_id="forget", event_time_us=at, forget=ForgetUser(user_id="u1"))
    body = Action(type=5, user_id="u1", item_id="i1")
    older = Event(event_id="older", event_time_us=at - 5, action=body)
    newer = Event(event_id="newer", event_time_us=at + 5, action=body)
    slate = Impression(
        request_id="r-old", user_id="u1", event_time_us=at - 1, items=[ImpressionItem(item_id="i1", position=1)]
    )
    send(log, [("events", b"u1", m.SerializeToString()) for m in (forget, older, newer)])
    send(log, [("impressions", b"u1", slate.SerializeToString())])
    archive = ingest(log, store, root, offline)
    assert on_disk(root, "u1") > 1  # not yet rewritten
    assert {r for r in rows(root) if r[0] in ("older", "newer", "r-old#1")} == {("newer", False)}
    archive.purge()
    assert on_disk(root, "u1") == 1
    assert on_disk(root, "u2") == others
    samples = read_samples(offline).collect()
    assert samples["user_id"].unique().to_list() == ["u2"]
    assert pl.read_parquet(offline / "user" / "day=2020-09-13.parquet")["user_id"].to_list() == ["u2"]
    store.close()
    target = open_rebuildable(url)
    materialize(archived(root), target, goes_on(root))
    target.close()
    store = open_store(url)
    send(log, [("events", b"u1", older.SerializeToString())])
    requeue(log, "dead-letter", None)
    job = Job(log, store)
    assert job.run(until_caught_up=True).events["forgotten"] == 1
    job.close()
    purchases = [a for a in archived(root) for u in a.batch.strings("user_id") if u == "u1"]
    assert len(purchases) == 1
    store.close()


def test_erasing_goes_bit_by_bit_and_begins_again_after_a_crash(log, tmp_path):
    root, store = tmp_path / "archive", MemoryStore()
    send(log, SENT)
    ingest(log, store, root, flush_rows_max=60)
    users = set(tombstones(root)["user_id"])
    assert users
    for _ in range(3):  # the process dies after some files
        Tidy(root, ArchiveConfig()).purge(covered(root), files_max=3)
    tidy, applied, calls = Tidy(root, ArchiveConfig()), {}, 0
    while not applied:
        applied, calls = tidy.purge(covered(root), files_max=3), calls + 1
    assert calls > 3
    expected = Counter(
        r["event_id"] for a in archived(root) for r in a.batch.table.to_pylist() if r["user_id"] in users
    )
    assert sum(on_disk(root, u) for u in users) == sum(expected.values())
    archive = ingest(log, store, root)
    archive.purge()
    assert all(c.purged for s, c in covered(root).items() if not s.startswith("c"))
    assert not Tidy(root, ArchiveConfig()).purge(covered(root), files_max=3)


def test_a_rebuild_keeps_what_came_after_the_forgetting(log, tmp_path):
    url, root, store = f"embedded:{tmp_path / 'shop'}", tmp_path / "archive", MemoryStore()
    send(log, SENT)
    ingest(log, store, root, flush_rows_max=60)
    target = open_rebuildable(url)
    materialize(archived(root), target, goes_on(root))
    target.close()
    rebuilt = open_store(url)
    for kind in ("user", "seen", "shown"):
        assert rebuilt.load(kind, USERS) == store.load(kind, USERS), kind
    rebuilt.close()
