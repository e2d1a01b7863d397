"""A run is whole or absent: every way it can be damaged has its own answer."""

import json
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from recsys.core import BadInput, Conflict, CorruptData, NotFound, RunDirectory, RunWriter, VersionMismatch

FIELDS = {
    "run_id": "r1",
    "parent": None,
    "dataset_hash": "d",
    "until": 1_312_156_800_000_000,
    "seed": 7,
    "config": {},
    "versions": {},
    "commit": "c",
    "feature_views": "v",
    "measures": {},
}


def write_run(out: Path, **fields: object) -> RunDirectory:
    with RunWriter(out, {**FIELDS, **fields}) as run:
        run.path("models/ranker.json").write_text('{"features": ["a", "b"]}')
        run.path("index/popular.parquet").write_bytes(bytes(range(256)))
    return RunDirectory.open(out)


def edit_manifest(run: RunDirectory, **changes: object) -> None:
    path = run.root / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_round_trip_lists_and_finds_files(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert run.run_id == "r1"
    assert run.until_us == FIELDS["until"]
    assert run.files_under("models") == ["models/ranker.json"]
    assert run.path("index/popular.parquet").read_bytes() == bytes(range(256))
    assert run.reranker_versions() == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"], "a temporary folder was left behind"


@pytest.mark.parametrize("make_folder", [True, False])
def test_missing_run_names_the_command_that_makes_one(tmp_path: Path, make_folder: bool) -> None:
    if make_folder:
        (tmp_path / "run").mkdir()
    with pytest.raises(NotFound, match=r"double11 train DIR --out"):
        RunDirectory.open(tmp_path / "run")


@pytest.mark.parametrize("verify", [True, False])
def test_missing_file_is_named(tmp_path: Path, verify: bool) -> None:
    run = write_run(tmp_path / "run")
    run.path("models/ranker.json").unlink()
    with pytest.raises(CorruptData, match=r"ranker\.json.*no such file"):
        RunDirectory.open(run.root, verify=verify)


@contextmanager
def somebody() -> Iterator[int]:
    """A user to whom modes apply: us, or nobody instead of root."""
    user = os.geteuid()
    os.seteuid(user or 65_534)
    try:
        yield os.geteuid()
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", ["models/ranker.json", "manifest.json"])
def test_a_file_that_may_not_be_read_is_no_missing_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, verify: bool
) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    monkeypatch.chdir(tmp_path / "open")  # tmp_path is its owner's alone
    run = write_run(Path("run"))
    (run.root / name).chmod(0)
    with somebody() as user, pytest.raises(BadInput, match=rf"{name}: got Permission denied for user {user};.*a\+rX"):
        RunDirectory.open(run.root, verify=verify)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_everybody_whom_the_umask_lets_may_read_a_run(tmp_path: Path, umask: int) -> None:
    """Weights are written for their owner alone, and copies have the mode of the original."""
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    os.close(os.open(private / "model.safetensors", os.O_CREAT, 0o600))
    before = os.umask(umask)
    try:
        with RunWriter(tmp_path / "run", FIELDS) as run:
            shutil.copy2(private / "model.safetensors", run.path("models/ranker.safetensors"))
        RunDirectory.open(run.out).add_files(private, "reranker/v1", {})
    finally:
        os.umask(before)
    files = [p for p in run.out.rglob("*") if p.is_file()]
    assert len(files) == 3
    assert {p.stat().st_mode & 0o777 for p in files} == {0o666 & ~umask}
    assert {p.stat().st_mode & 0o777 for p in run.out.rglob("*") if p.is_dir()} == {0o777 & ~umask}


@pytest.mark.parametrize("verify", [True, False])
def test_half_written_file_is_refused_by_its_size(tmp_path: Path, verify: bool) -> None:
    run = write_run(tmp_path / "run")
    run.path("index/popular.parquet").write_bytes(bytes(range(100)))
    with pytest.raises(CorruptData, match="100 bytes; expected 256 bytes"):
        RunDirectory.open(run.root, verify=verify)


def test_altered_byte_is_refused_by_its_hash(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    run.path("index/popular.parquet").write_bytes(bytes(reversed(range(256))))
    with pytest.raises(CorruptData, match="sha256"):
        RunDirectory.open(run.root)
    assert RunDirectory.open(run.root, verify=False).run_id == "r1"


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"format_version": 1}', "\ufeff\x00"],
    ids=["empty", "cut", "list", "null", "few", "nul"],
)
def test_unreadable_manifest_is_corrupt(tmp_path: Path, text: str) -> None:
    run = write_run(tmp_path / "run")
    (run.root / "manifest.json").write_text(text)
    with pytest.raises(CorruptData, match=r"manifest\.json"):
        RunDirectory.open(run.root)


@pytest.mark.parametrize("files", [[], {"a": 1}, {"a": {"bytes": 1}}, "x"])
def test_manifest_whose_file_list_has_another_shape_is_corrupt(tmp_path: Path, files: object) -> None:
    run = write_run(tmp_path / "run")
    edit_manifest(run, files=files)
    with pytest.raises(CorruptData):
        RunDirectory.open(run.root)


def test_newer_format_is_a_version_mismatch(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    edit_manifest(run, format_version=2)
    with pytest.raises(VersionMismatch, match="format_version"):
        RunDirectory.open(run.root)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "models/../../x", ""])
def test_names_that_leave_the_run_are_refused(tmp_path: Path, name: str) -> None:
    run = write_run(tmp_path / "run")
    edit_manifest(run, files={name: {"bytes": 1, "sha256": "0"}})
    with pytest.raises(CorruptData, match="relative path"):
        RunDirectory.open(run.root)


def test_what_the_manifest_does_not_list_does_not_exist(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run.root / "models/stray.bin").write_bytes(b"x")
    opened = RunDirectory.open(run.root)
    assert not opened.has("models/stray.bin")
    with pytest.raises(NotFound, match=r"stray\.bin.*not in the manifest"):
        opened.path("models/stray.bin")


def test_failure_while_writing_leaves_nothing(tmp_path: Path) -> None:
    def killed_while_writing() -> None:
        with RunWriter(tmp_path / "run", FIELDS) as run:
            run.path("models/half.bin").write_bytes(b"x")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        killed_while_writing()
    assert list(tmp_path.iterdir()) == []


def test_existing_run_is_kept_unless_replaced(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    with pytest.raises(Conflict, match="--out"):
        RunWriter(tmp_path / "run", FIELDS)
    with RunWriter(tmp_path / "run", {**FIELDS, "run_id": "r2"}, replace=True) as run:
        run.path("x").write_text("new")
    replaced = RunDirectory.open(tmp_path / "run")
    assert (replaced.run_id, list(replaced.manifest["files"])) == ("r2", ["x"])
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("times", [1, 2])
def test_a_run_behind_a_link_is_replaced_and_the_link_stays(tmp_path: Path, times: int) -> None:
    """The layout of the laptop overlay: a run, and a relative link `current` to it beside it."""
    write_run(tmp_path / "run")
    (tmp_path / "current").symlink_to("run")
    for n in range(times):
        with RunWriter(tmp_path / "current", {**FIELDS, "run_id": f"r{n}"}, replace=True) as run:
            run.path("x").write_text("new")
    assert RunDirectory.open(tmp_path / "run").run_id == f"r{times - 1}"
    assert (tmp_path / "current").readlink() == Path("run")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["current", "run"]


def test_what_is_no_run_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("keep me")
    for manifest in (None, '{"name": "an extension of a browser"}', "[]", "{"):
        if manifest is not None:
            (tmp_path / "manifest.json").write_text(manifest)
        with pytest.raises(Conflict, match="no run"):
            RunWriter(tmp_path, FIELDS, replace=True)
    with pytest.raises(Conflict, match="no run"):
        RunWriter(tmp_path / "precious.txt", FIELDS, replace=True)
    run = write_run(tmp_path / "run")
    (run.root / "items.parquet").write_bytes(b"damaged, and so is the manifest")
    (run.root / "manifest.json").write_text("{")
    with RunWriter(run.root, FIELDS, replace=True):
        pass
    assert RunDirectory.open(run.root).manifest["files"] == {}


def test_missing_manifest_field_is_bad_input(tmp_path: Path) -> None:
    fields = {k: v for k, v in FIELDS.items() if k != "seed"}
    with pytest.raises(BadInput, match="no seed"), RunWriter(tmp_path / "run", fields):
        pass
    assert list(tmp_path.iterdir()) == []


def test_add_files_lists_a_new_folder_and_changes_the_manifest(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    source = tmp_path / "reranker"
    (source / "sub").mkdir(parents=True)
    (source / "config.json").write_text("{}")
    (source / "sub/model.safetensors").write_bytes(b"weights")
    run.add_files(source, "reranker/v1", {"rerankers": ["v1"]})
    opened = RunDirectory.open(run.root)
    assert opened.reranker_versions() == ["v1"]
    assert opened.files_under("reranker/v1") == ["reranker/v1/config.json", "reranker/v1/sub/model.safetensors"]
    with pytest.raises(Conflict, match="already there"):
        opened.add_files(source, "reranker/v1", {})


def test_of_two_who_add_the_same_version_the_second_is_told(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    sources = [tmp_path / name for name in "ab"]
    for source in sources:
        source.mkdir()
        (source / "config.json").write_text(json.dumps(source.name))
    both = threading.Barrier(2)

    def add(source: Path, mine: RunDirectory) -> str:
        both.wait()
        try:
            mine.add_files(source, "reranker/1", {"rerankers": ["1"]})
        except Conflict:
            return "conflict"
        return source.name

    with ThreadPoolExecutor(2) as pool:
        ends = list(pool.map(add, sources, [RunDirectory.open(run.root) for _ in sources]))
    winner, loser = sorted(ends, key=lambda end: end == "conflict")
    assert loser == "conflict"
    assert json.loads(RunDirectory.open(run.root).path("reranker/1/config.json").read_text()) == winner


def test_add_files_takes_over_what_a_dead_writer_left(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    left = run.root / "reranker/v1"
    left.mkdir(parents=True)
    (left / "half.bin").write_bytes(b"x")
    source = tmp_path / "new"
    source.mkdir()
    (source / "config.json").write_text("{}")
    run.add_files(source, "reranker/v1", {})
    assert RunDirectory.open(run.root).files_under("reranker/v1") == ["reranker/v1/config.json"]
    assert not (left / "half.bin").exists()


def test_what_is_made_on_the_way_is_beside_a_run_however_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run")
    assert run.work == tmp_path / "run.work"
    monkeypatch.chdir(run.root)
    assert RunDirectory.open(".").work == tmp_path / "run.work"
