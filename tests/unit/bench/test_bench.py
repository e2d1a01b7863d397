"""The harness's arithmetic, and each benchmark once in its smallest size."""

import json

import pytest
import torch

from recsys.bench import SUBJECTS, Contest, Deployment, run
from recsys.bench.harness import figure, measure
from recsys.bench.rerank_peers import Transformers, random_model
from recsys.cli.main import run as command
from recsys.core import BadInput


def test_contestants_are_interleaved_and_warm_ups_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s, calls = [0.0], []
    monkeypatch.setattr("recsys.bench.harness.time.perf_counter", lambda: now_s[0])

    def work(name: str, seconds: list[float]) -> tuple[str, object]:
        durations = iter(seconds)

        def do() -> float:
            calls.append(name)
            now_s[0] += next(durations)
            return 10.0

        return name, do

    contest = Contest(
        what="w",
        unit="per_s",
        ours=work("a", [100.0, 1.0, 2.0, 4.0]),  # type: ignore[arg-type]
        peer=work("b", [100.0, 4.0, 4.0, 4.0]),  # type: ignore[arg-type]
        limit=work("c", [100.0, 1.0, 1.0, 1.0]),  # type: ignore[arg-type]
    )
    (row,) = measure([contest], repeats=3)
    assert "".join(calls) == "abcbcacababc"
    assert (row.ours, row.peer, row.limit) == (5.0, 2.5, 10.0)
    assert row.median == {"a": 5.0, "b": 2.5, "c": 10.0}
    assert row.spread == {"ours": (10.0 - 2.5) / 5.0, "peer": 0.0, "limit": 0.0}
    assert row.ratio == 2.0


def test_ratio_of_times_is_above_one_when_ours_is_shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [0.0]
    monkeypatch.setattr("recsys.bench.harness.time.perf_counter", lambda: now_s[0])

    def lasting(seconds: float) -> object:
        def do() -> float:
            now_s[0] += seconds
            return 2.0

        return do

    contest = Contest(what="w", unit="ms", ours=("a", lasting(0.004)), peer=("b", lasting(0.012)))  # type: ignore[arg-type]
    (row,) = measure([contest], repeats=1)
    assert row.ours == pytest.approx(2.0)
    assert row.peer == pytest.approx(6.0)
    assert row.ratio == pytest.approx(3.0)
    assert row.limit is None


def test_a_figure_without_a_peer_has_no_ratio() -> None:
    assert figure("recall", "share", 0.9).ratio is None
    assert figure("recall", "share", 0.9, peer=1.0).ratio == 0.9


# ingest starts a broker, a Redis and five processes one after the other: most of a minute
SLOW = {"ingest": pytest.mark.slow}


@pytest.mark.parametrize("name", [pytest.param(s, marks=SLOW.get(s, ())) for s in SUBJECTS if s != "serve"])
def test_every_benchmark_runs_and_reports(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["bench", name, "--quick", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert found.keys() == {"name", "commit", "hardware", "config", "rows"}
    assert found["name"] == name
    assert found["hardware"]["cores"] >= 1
    assert found["rows"]
    for row in found["rows"]:
        assert row.keys() == {"what", "unit", "ours", "peer", "limit", "median", "spread", "ratio"}
        assert row["ours"] > 0
        assert row["peer"] is None or row["ratio"] > 0


def test_unknown_benchmark_and_serve_without_a_run_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BadInput, match="one of retrieval"):
        run("cooking")
    with pytest.raises(BadInput, match="--run and --users"):
        run("serve")
    assert command(["bench", "cooking"]) == 2
    assert command(["bench", "serve"]) == 2
    assert "make demo" in capsys.readouterr().err


def test_a_gateway_that_does_not_start_is_reported(tmp_path: object) -> None:
    from pathlib import Path

    from recsys.core import Unavailable

    deployment = Deployment(run=Path(str(tmp_path)) / "none", store=f"embedded:{tmp_path}", users=["u"])
    with pytest.raises(Unavailable, match="double11 serve"):
        run("serve", quick=True, deployment=deployment)


def test_the_shared_cache_of_transformers_is_not_copied() -> None:
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
            "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}  # fmt: skip
    shared, packed = (Transformers(random_model(size), way, "eager") for way in ("shared", "packed"))
    prefix_P, suffix_NS = torch.arange(5), torch.arange(12).reshape(3, 4)
    with torch.inference_mode():
        said = [peer.cold(prefix_P, suffix_NS) for peer in (shared, packed)]
        assert torch.allclose(*said, atol=1e-5)
        assert torch.allclose(shared.warm(suffix_NS), said[0], atol=1e-6)  # and what is kept has not grown
        made = [(layer.keys, layer.values) for layer in shared._cache(3).layers]
    for layer, kept in zip(made, shared._kept, strict=True):
        assert [t.data_ptr() for t in layer] == [t.data_ptr() for t in kept]
        assert {t.shape[0] for t in layer} == {3}
