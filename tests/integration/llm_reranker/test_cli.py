"""`double11 distill` adds a version to a run, refuses a second one unless told, and says what it did in JSON."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from types import ModuleType

import polars as pl
import pytest
from chat_world import Said, front

from llm_reranker.local import LocalReranker
from recsys.cli.main import run as double11
from recsys.core.run_dir import RunDirectory


@pytest.fixture
def copy(run: RunDirectory, tmp_path: Path) -> RunDirectory:
    return RunDirectory.open(shutil.copytree(run.root, tmp_path / "run"))


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "double11.toml"
    path.write_text(
        "[llm_reranker.distill]\nhidden_size = 32\nnum_layers = 1\nnum_experts = 4\nexpert_width = 16\n"
        "teacher_hidden_size = 32\nteacher_layers = 1\nvocab_size = 512\ntrain_queries_max = 16\n"
        "validation_queries_max = 8\nstudent_epochs = 1\n"
    )
    return path


def test_a_second_version_needs_replace_and_then_serves(
    copy: RunDirectory, config: Path, world: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lists = world.write_lists(tmp_path / "lists.parquet", queries=40)
    argv = ["distill", ".", "--run", str(copy.root), "--lists", str(lists), "--config", str(config), "--json"]
    assert double11(argv) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["error"]["code"] == "CONFLICT"
    before = copy.path("reranker/1/model.safetensors").read_bytes()
    assert double11([*argv, "--replace"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["version"] == "2"
    assert set(document["ndcg@10"]) == {"rank", "teacher", "student", "blended"}
    run = RunDirectory.open(copy.root)
    assert run.reranker_versions() == ["1", "2"]
    assert run.path("reranker/1/model.safetensors").read_bytes() == before
    for version in (None, "1"):
        reranker = LocalReranker.load(run, version)
        assert reranker.version == (version or "2")
        reranker.close()


def test_answers_of_no_use_are_said(
    copy: RunDirectory, config: Path, world: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    said = {True: b"1 2 3 4 5 6 7 8", False: b"I am sorry"}
    choice = b'{"choices": [{"index": 0, "message": {"role": "assistant", "content": "%s"}}]}'
    monkeypatch.setenv("OPENAI_API_KEY", "open-sesame")
    lists = world.write_lists(tmp_path / "lists.parquet", queries=40, candidates=8)
    with front("http://127.0.0.1:9/v1", lambda n, _: Said(200, choice % said[n % 2 == 0])) as (url, answered):
        config.write_text(
            f'{config.read_text()}[llm_reranker.teacher]\nbase_url = "{url}"\npermutations = 1\nconcurrency = 1\n'
            "requests_per_minute_max = 60000\n"
        )
        argv = ["distill", ".", "--run", str(copy.root), "--lists", str(lists), "--config", str(config), "--replace"]
        assert double11([*argv, "--teacher", "openai:m", "--labels", str(tmp_path / "labels")]) == 0
    total = len(answered)
    assert f"{total // 2} of {total} answers of the teacher were of no use" in capsys.readouterr().out


def test_sigterm_keeps_the_labels_that_were_paid_for(
    copy: RunDirectory, config: Path, world: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = Said(200, b'{"choices": [{"index": 0, "message": {"role": "assistant", "content": "1 2 3 4 5 6 7 8"}}]}')

    def ended(n: int, _: object) -> Said:
        if n == 2:
            time.sleep(0.5)  # the lists before this one have been handed out
            os.kill(os.getpid(), signal.SIGTERM)
        return answer

    monkeypatch.setenv("OPENAI_API_KEY", "open-sesame")
    lists, labels = world.write_lists(tmp_path / "lists.parquet", queries=40, candidates=8), tmp_path / "labels"
    before = signal.getsignal(signal.SIGTERM)
    with front("http://127.0.0.1:9/v1", ended) as (url, answered):
        config.write_text(
            f'{config.read_text()}[llm_reranker.teacher]\nbase_url = "{url}"\npermutations = 1\nconcurrency = 1\n'
        )
        argv = ["distill", ".", "--run", str(copy.root), "--lists", str(lists), "--config", str(config), "--replace"]
        with pytest.raises(SystemExit) as ending:
            double11([*argv, "--teacher", "openai:m", "--labels", str(labels)])
        assert ending.value.code == 143
        assert signal.getsignal(signal.SIGTERM) is before
        assert pl.read_parquet(labels / "*" / "*.parquet")["query_id"].n_unique() == 2 <= len(answered)


def test_bad_input_has_an_exit_code_and_a_fix(
    copy: RunDirectory, world: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["--run", str(copy.root), "--replace", "--json"]
    assert double11(["distill", str(tmp_path / "none"), *run]) == 2
    assert double11(["distill", ".", "--run", str(tmp_path / "none"), "--json"]) == 2
    assert double11(["distill", ".", *run, "--lists", str(tmp_path / "none.parquet")]) == 1
    codes = [json.loads(line)["error"]["code"] for line in capsys.readouterr().out.splitlines()]
    assert codes == ["BAD_INPUT", "NOT_FOUND", "CORRUPT_DATA"]
    later = pl.read_parquet(world.write_lists(tmp_path / "l.parquet", queries=12)).with_columns(
        pl.col("query_time") + copy.until_us
    )
    later.write_parquet(tmp_path / "later.parquet")
    for how in ([], ["--checkpoint", str(copy.root / "reranker/1")]):
        assert double11(["distill", ".", *run, *how, "--lists", str(tmp_path / "later.parquet")]) == 2
        assert "query_time" in capsys.readouterr().out
    assert RunDirectory.open(copy.root).reranker_versions() == ["1"]
