"""The embedded store's own promises: one writer, whole or refused, rebuilt beside the live state."""

import errno
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import lmdb
import pytest

from feature_store.materialize import materialize
from feature_store.online import Commit, OffsetStep, feature_clock, open_reader, open_store
from feature_store.update import archived_updates
from feature_store.views import VIEW_SET
from recsys.core import BadInput, Conflict, CorruptData, Deadline, EventBatch, Overloaded, VersionMismatch, embedded
from recsys.core.config import Config

NEVER = Deadline.never()
T = 1_600_000_000_000_000


def bought(*users: str) -> EventBatch:
    n = len(users)
    columns = {"kind": [1] * n, "event_type": [5] * n, "event_time": [T] * n, "item_id": ["i"] * n}
    return EventBatch.from_columns({"event_id": [f"e-{u}" for u in users], "user_id": list(users), **columns})


def fill(store, batch) -> None:
    updates, seen = archived_updates(store.load, batch)
    store.commit(Commit(updates=updates, seen_event_ids=seen, max_event_time_us=T))


def test_a_second_writer_is_told_who_holds_the_lock(tmp_path):
    url = f"embedded:{tmp_path}"
    code = f"from feature_store.online import open_store; s = open_store({url!r}); print('up', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout.readline() == "up\n"
        with pytest.raises(Conflict, match=f"second writer.*process {other.pid} holds the lock"):
            open_store(url)
        open_reader(url).close()
        other.kill()
        other.wait()
        open_store(url).close()  # the lock died with its process


async def test_readers_in_the_process_see_what_is_committed(tmp_path):
    store, reader = open_store(f"embedded:{tmp_path}"), open_reader(f"embedded:{tmp_path}")
    fill(store, bought("ann"))
    assert (await reader.user("ann", T + 1, NEVER)).values["purchase_count_all"] == 1
    assert reader.max_event_time_us() == T
    store.close()
    assert (await reader.user("ann", T + 1, NEVER)).values["purchase_count_all"] == 1
    reader.close()


def test_now_is_the_machines_or_the_newest_event(tmp_path):
    store = open_store(f"embedded:{tmp_path}")
    fill(store, bought("ann"))
    assert feature_clock(store, Config()).now_us() > T + 1
    file = {"feature_store": {"clock": "data"}}
    assert feature_clock(store, Config(file)).now_us() == T + 1
    assert feature_clock(store, Config(file, flags={"feature_store.clock": "wall"})).now_us() > T + 1
    store.close()


def test_a_process_of_another_container_with_our_id_is_told_from_a_broken_store(tmp_path):
    open_store(f"embedded:{tmp_path}").close()
    script = (  # as LMDB does in a PID namespace of its own, where that process has this one's number
        "import fcntl, os, sys; f = open(sys.argv[1], 'r+b'); "
        "fcntl.lockf(f, fcntl.LOCK_EX, 1, os.getppid()); print(flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "store" / "lock.mdb")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(Conflict, match=r"one PID namespace.*The store is whole"):
            open_store(f"embedded:{tmp_path}")
        other.communicate()
    open_store(f"embedded:{tmp_path}").close()


def test_a_file_that_is_no_store_is_named(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "data.mdb").write_bytes(b"half a page of something else" * 400)
    with pytest.raises(CorruptData, match="whole LMDB environment"):
        open_store(f"embedded:{tmp_path}")


async def test_a_state_cut_short_is_corrupt_not_wrong(tmp_path):
    store = open_store(f"embedded:{tmp_path}")
    fill(store, bought("ann"))
    (update,) = (u for u in archived_updates(store.load, bought("bob"))[0] if u.kind == "user")
    from feature_store.online import Update

    store.commit(Commit(updates=[Update("user", ["bob", "cid"], [update.blobs[0][:-8], b"1234567"])]))
    for user in ("bob", "cid"):
        with pytest.raises(CorruptData, match="features materialize"):
            await store.user(user, T + 1, NEVER)
    assert (await store.user("ann", T + 1, NEVER)).values["purchase_count_all"] == 1
    store.close()


def test_another_view_set_is_refused_with_the_way_out(tmp_path):
    open_store(f"embedded:{tmp_path}").close()
    with lmdb.open(str(tmp_path / "store")) as env, env.begin(write=True) as txn:
        txn.put(b"\0\0meta", json.dumps({"store_id": "s", "views": "0ld", "generation": 1}).encode())
    reader = open_reader(f"embedded:{tmp_path}")
    with pytest.raises(VersionMismatch, match=rf"0ld.*{VIEW_SET}.*materialize"):
        reader.load("user", ["ann"])
    reader.close()


async def test_materialize_replaces_everything_in_one_switch(tmp_path):
    store, reader = open_store(f"embedded:{tmp_path}"), open_reader(f"embedded:{tmp_path}")
    fill(store, bought("old", "ann"))
    store.commit(Commit(updates=[], offsets=[OffsetStep("events", 0, 0, 5)]))
    seen_half_way = []

    def batches():
        yield bought("ann", "bob")
        seen_half_way.append(reader.load("user", ["old", "bob"]))
        yield bought("cid")

    assert materialize(batches(), store) == 3
    ((old, bob),) = seen_half_way
    assert old
    assert not bob
    assert reader.load("user", ["old"]) == [b""]
    assert (await reader.user("cid", T + 1, NEVER)).values["purchase_count_all"] == 1
    assert (await reader.user("ann", T + 1, NEVER)).values["purchase_count_all"] == 1
    assert store.offsets("events") == {}
    assert materialize([bought("dan")], store) == 1  # and again, into the next generation
    assert reader.load("user", ["cid"]) == [b""]
    store.close()
    reader.close()


def test_a_full_store_says_which_setting_to_raise(tmp_path):
    store = open_store(f"embedded:{tmp_path}", Config({"feature_store": {"embedded": {"map_bytes_max": 1 << 20}}}))
    with pytest.raises(Overloaded, match="map_bytes_max"):
        fill(store, bought(*(f"u{i}" for i in range(5_000))))
    assert store.load("user", ["u1"]) == [b""]
    store.close()


@pytest.mark.parametrize("url", ["kafka://localhost", "nonsense", "embedded:", "file:///x"])
def test_other_urls_are_refused(url):
    with pytest.raises(BadInput):
        open_store(url)


def test_the_folder_is_made(tmp_path):
    open_store(f"embedded:{tmp_path / 'a' / 'b'}").close()
    assert Path(tmp_path, "a", "b", "store", "data.mdb").is_file()


def test_files_of_another_user_are_told_from_a_broken_store() -> None:
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as place:  # pytest's own folders are their owner's alone
        folder = Path(place) / "store"
        Path(place).chmod(0o755)
        embedded.acquire(folder, 1 << 20)
        embedded.release(folder)
        for file in folder.iterdir():
            file.chmod(0)
        os.seteuid(user or 65_534)  # somebody to whom modes apply
        try:
            with pytest.raises(BadInput, match=r"may not write.*The store is whole.*chown"):
                embedded.acquire(folder, 1 << 20)
        finally:
            os.seteuid(user)


def test_a_read_only_disk_is_told_from_a_full_one(tmp_path, monkeypatch):
    def as_lmdb_says_it(path, **_):
        raise lmdb.Error(f"{path}: {os.strerror(errno.EROFS)}")

    monkeypatch.setattr(lmdb, "open", as_lmdb_says_it)
    with pytest.raises(BadInput, match=r"Read-only file system.*mount it to be written"):
        embedded.acquire(tmp_path, 1 << 20)
