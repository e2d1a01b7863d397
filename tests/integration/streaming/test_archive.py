"""The archive on disk: journal, merging, erasing; whole after a crash at any of their points."""

import contextlib
import copy
import fcntl
import json
import os
import shutil
import time
from collections import Counter
from pathlib import Path
from threading import Event as StopEvent

import numpy as np
import polars as pl
import pytest
from double11.v1.event_pb2 import Action, Event, ForgetUser, Impression, ImpressionItem
from full_disk import files_end_at
from traffic_world import USERS, T, send, traffic

from feature_store.materialize import materialize
from feature_store.offline.samples import by_day, read_samples
from feature_store.online import MemoryStore, open_rebuildable, open_store
from recsys.core import EventBatch, EventKind, Overloaded, Unavailable
from recsys.data import Dataset
from recsys.data.importers import import_dataset
from streaming.archive import Archive, Part, archived, coverage, files, goes_on, read_items, tidy
from streaming.archive.coverage import covered
from streaming.archive.tidy import Tidy
from streaming.archive.tombstones import tombstones
from streaming.config import ArchiveConfig, JobConfig, StreamingConfig, Topics
from streaming.dead_letter import requeue
from streaming.job import Job
from streaming.log import open_log

SENT = traffic(2, 900, forgets=True)
FEW_BYTES = 2_000  # less than a file of some hundred events has
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


def purchases(first: int, end: int) -> list[Part]:
    """Offsets [first, end) of partition 0 of `events`."""
    n = end - first
    columns = {
        "event_id": [f"e{i}" for i in range(first, end)], "kind": [1] * n, "event_type": [5] * n,
        "event_time": [T + i for i in range(first, end)], "user_id": [f"u{i % 2}" for i in range(first, end)],
        "item_id": ["x"] * n,
    }  # fmt: skip
    return [Part("", 0, first, end, EventBatch.from_columns(columns), np.arange(first, end), T)]


def taken(root, offset: int, **config) -> Archive:
    """A worker that has taken partition 0 of `events`, of which the store has this offset."""
    archive = Archive(root, "test", ArchiveConfig(**config))
    archive.take("log", {("", "events"): {0: offset}})
    return archive


@pytest.mark.parametrize("lost_at", [10, 15, 20, 25])
def test_a_worker_that_has_lost_its_partition_takes_nothing_back(lost_at, tmp_path):
    """It hangs with a journal up to 20, of which the store has some, and wakes up when another one has gone on."""
    for wakes_first in (False, True):
        root = tmp_path / f"{wakes_first}"
        first = taken(root, 0)
        first.write(purchases(0, 10))
        first.write(purchases(10, 20))
        second = taken(root, min(lost_at, 20))
        if lost_at > 10:
            second.write(purchases(min(lost_at, 20), lost_at + 10))
        if wakes_first:
            first.leave(["0"])
        second.flush()
        if not wakes_first:
            first.leave(["0"])
        ids = [f"e{i}" for i in range(max(20, lost_at + 10))]
        assert json.loads((root / "coverage" / "0.json").read_text("utf-8"))["ranges"] == [[0, len(ids)]]
        assert rows(root) == Counter((i, False) for i in ids)
        third = taken(root, len(ids))
        third.write(purchases(len(ids), 50))
        third.flush()
        assert rows(root) == Counter((f"e{i}", False) for i in range(50))
        goes_on(root)


def test_a_worker_that_hangs_in_a_flush_does_not_hang_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(coverage, "_LOCK_WAIT_S_MAX", 0)
    archive = taken(tmp_path, 0)
    archive.write(purchases(0, 10))
    with (tmp_path / "coverage" / "0.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for write in (archive.flush, lambda: taken(tmp_path, 10)):
            with pytest.raises(Unavailable, match="writes source 0"):
                write()
    assert not rows(tmp_path)
    taken(tmp_path, 10)
    archive.flush()
    assert rows(tmp_path) == Counter((f"e{i}", False) for i in range(10))


def temporary(root) -> list[Path]:
    return list(root.rglob(".*"))


def test_two_that_write_one_file_do_not_take_each_other_s(tmp_path):
    """In containers both have the same process id."""
    both = [files.Writes(), files.Writes()]
    for name, writes in zip("ab", both, strict=True):
        writes.text(tmp_path / "dataset.json", name)
    for name, writes in zip("ab", both, strict=True):
        writes.commit()
        assert (tmp_path / "dataset.json").read_text("utf-8") == name
    assert not temporary(tmp_path)


def test_a_job_waits_for_room_on_the_archive_s_disk(log, tmp_path):
    now_us, root, waited = time.time_ns() // 1_000, tmp_path / "archive", []
    bodies = [(f"u{i % 7}", Action(type=2, user_id=f"u{i % 7}", item_id="i")) for i in range(1_000)]
    sent = [Event(event_id=f"e{i}", event_time_us=now_us, action=body) for i, (_, body) in enumerate(bodies)]
    send(log, [("events", e.action.user_id.encode(), e.SerializeToString()) for e in sent])
    with contextlib.ExitStack() as full:
        full.enter_context(files_end_at(FEW_BYTES))

        class Stop(StopEvent):
            def wait(self, timeout: float | None = None) -> bool:
                waited.append(temporary(root))
                if len(waited) == 3:
                    full.close()
                return False

        archive = Archive(root, "test")
        job = Job(log, MemoryStore(), JobConfig(batch_records_max=500), archive=archive)
        job.run(until_caught_up=True, stop=Stop())
        job.close()
    archive.flush()
    assert len(waited) >= 3
    assert not any(waited)
    assert rows(root) == Counter((e.event_id, False) for e in sent)


def test_a_flush_for_which_there_is_no_room_keeps_the_journal(tmp_path):
    archive = taken(tmp_path, 0)
    archive.write(purchases(0, 1_000))
    for num_bytes in (0, FEW_BYTES):
        with files_end_at(num_bytes), pytest.raises(Overloaded, match=r"archive file .*Free disk"):
            archive.flush()
        assert not temporary(tmp_path)
        assert not rows(tmp_path)
    archive.write(purchases(1_000, 1_010))
    archive.flush()
    assert rows(tmp_path) == Counter((f"e{i}", False) for i in range(1_010))


def test_tidying_for_which_there_is_no_room_waits_and_steps_do_not(tmp_path):
    archive, last = taken(tmp_path, 0), 2_000
    for first in range(0, last, 500):
        archive.write(purchases(first, first + 500))
        archive.flush()
    columns = {"event_id": ["f"], "kind": [int(EventKind.FORGET)], "event_time": [T], "user_id": ["u1"]}
    archive.write([Part("", 0, last, last + 1, EventBatch.from_columns(columns), np.array([last]), T)])
    archive.flush()
    before, mine, tidy = rows(tmp_path), covered(tmp_path), Tidy(tmp_path, ArchiveConfig(merge_files_min=2))
    with files_end_at(FEW_BYTES):
        for work in (lambda: tidy.purge(mine, files_max=2), lambda: tidy.merge(mine)):
            with pytest.raises(Overloaded):
                work()
        archive = taken(tmp_path, last + 1, tidy_s=0.01, merge_files_min=2)
        for _ in range(2):
            time.sleep(0.02)
            archive.idle()
            archive.leave([])
    assert not temporary(tmp_path)
    assert on_disk(tmp_path, "u1") == last // 2
    while not tidy.purge(mine, files_max=2):
        pass
    assert on_disk(tmp_path, "u1") == 0
    assert tidy.merge(mine)
    assert rows(tmp_path) == before


@pytest.mark.parametrize("at", ["reads", "writes"])
def test_two_that_tidy_one_source_lose_nothing_and_bring_nothing_back(at, tmp_path, monkeypatch):
    """Whoever has lost the source does not know yet; the other one merges, deletes and erases meanwhile."""
    archive = taken(tmp_path, 0)
    for first in range(0, 40, 10):
        archive.write(purchases(first, first + 10))
        archive.flush()
    columns = {"event_id": ["f"], "kind": [int(EventKind.FORGET)], "event_time": [T], "user_id": ["u1"]}
    mine, config = covered(tmp_path), ArchiveConfig(tidy_s=0.01, merge_files_min=2, merged_keep_s=0)
    lost, other = (Tidy(tmp_path, config) for _ in range(2))
    where, name = (tidy.pl, "read_parquet") if at == "reads" else (files.Writes, "commit")
    whole = getattr(where, name)

    def meanwhile(*args, **kwargs):
        monkeypatch.undo()
        archive.write([Part("", 0, 40, 41, EventBatch.from_columns(columns), np.array([40]), T)])
        archive.flush()
        done(other)
        return whole(*args, **kwargs)

    def done(tidy: Tidy) -> None:
        for _ in range(10):
            time.sleep(0.02)
            tidy.some(covered(tmp_path))

    time.sleep(0.02)
    monkeypatch.setattr(where, name, meanwhile)
    lost.some(mine)
    done(other)
    assert on_disk(tmp_path, "u1") == 0
    assert on_disk(tmp_path, "u0") == 20
    assert rows(tmp_path) == Counter((f"e{i}", False) for i in range(0, 40, 2))


def test_what_a_process_that_died_left_unfinished_goes(tmp_path):
    archive = taken(tmp_path, 0)
    archive.write(purchases(0, 10))
    archive.flush()
    offline = tmp_path / "offline"
    (offline / "samples" / "day=2020-09-13").mkdir(parents=True)
    folders = [tmp_path / "journal", tmp_path / "coverage", *tmp_path.glob("events/day=*"), *offline.glob("samples/*")]
    for folder in folders:
        for name, age_s in (("dead", 700), ("at-work", 0)):
            path = folder / f".{name}.parquet.7.tmp"
            path.touch()
            os.utime(path, (time.time() - age_s,) * 2)
    Tidy(tmp_path, ArchiveConfig(merged_keep_s=0), offline).merge(covered(tmp_path))
    assert sorted(p.name for p in temporary(tmp_path)) == [".at-work.parquet.7.tmp"] * len(folders)


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
