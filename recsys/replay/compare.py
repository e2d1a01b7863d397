"""replay(): ask several arms about a past period and write a report that anyone can recompute."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from recsys.core import BadInput, Conflict, ManualClock, RunDirectory, VersionMismatch, disk
from recsys.core.hardware import commit, describe
from recsys.core.items import ItemTable
from recsys.core.logging import get_logger
from recsys.data import Dataset
from recsys.evaluation import make_online_queries, make_queries, with_rare
from recsys.evaluation.queries import Task
from recsys.pipeline import ARMS, PipelineConfig, Ports, build
from recsys.replay import figures, page
from recsys.replay.peers import NO_PEERS, PEER_ARMS, Peers, fit_peers
from recsys.replay.protocol import PROTOCOLS, Answers, Past, ReplayProtocol, ask

DEFAULT_ARMS = ("popular", "own_history", "retrieval", "rank", "full")
K, K_MAX = 100, 1_000
FILES = ("slates.parquet", "queries.parquet", "report.html", "report.json")
_NO_CACHE = PipelineConfig(limit_max=K_MAX, cached_users_max=0)
_log = get_logger(__name__)


def replay(
    dataset_dir: Path | str,
    run: RunDirectory | Path | str,
    out: Path | str,
    *,
    arms: Sequence[str] = DEFAULT_ARMS,
    task: Task = "all",
    from_us: int | None = None,
    to_us: int | None = None,
    positives: Sequence[str] = ("purchase",),
    protocol: ReplayProtocol = "frozen",
    k: int = K,
    queries_max: int | None = None,
    queries_seed: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare arms of one run on [from_us, to_us) and return report.json's content.

    from_us: the cut, default the run's `until`. to_us: default just after the last event. Times in microseconds UTC.
    queries_max: ask a sample of this size, drawn by `queries_seed` (default: `seed`). k: slate length asked for;
    measures beyond it count what is missing as misses. Writes `out` whole or not at all: report.json, slates.parquet,
    queries.parquet, report.html. A report already there is replaced, file by file.
    Raises: VersionMismatch for a run that saw events at or after the cut; BadInput for an unknown arm, protocol, task
    or positive, a period without queries, k out of range; Conflict when `out` holds anything but a report.
    Source: the replay protocol of docs/architecture.md.
    """
    arms = tuple(dict.fromkeys(arms))
    _check(arms, protocol, k)
    check_out(Path(out))
    dataset = Dataset.open(dataset_dir)
    run = run if isinstance(run, RunDirectory) else RunDirectory.open(run)
    from_us = run.until_us if from_us is None else from_us
    to_us = dataset.last_event_us + 1 if to_us is None else to_us
    _check_period(dataset, run, from_us)
    queries_seed = seed if queries_seed is None else queries_seed
    make = make_queries if protocol == "frozen" else make_online_queries
    events = dataset.events(before_us=to_us)  # whenever learnt: what users did is right, the past is cut by `make`
    queries = make(
        events,
        from_us=from_us, to_us=to_us, positives=positives, task=task, queries_max=queries_max,
        seed=queries_seed,
    )  # fmt: skip
    if not len(queries):
        raise BadInput(
            "replay queries", came=f"none in [{iso(from_us)}, {iso(to_us)})",
            expected=f"users with events before it and a {' or '.join(positives)} in it",
            fix="Move --from or --to, name other --positives, or use --task all.",
        )  # fmt: skip
    queries = with_rare(queries, events)
    batches = dataset.event_batches(before_us=from_us if protocol == "frozen" else to_us)
    past = Past(batches, ItemTable.read(run.path("items.parquet")))
    peers = fit_peers(arms, dataset, run, from_us, seed)
    answers = asyncio.run(answer(run, arms, queries, past, k=k, task=task, seed=seed, peers=peers))
    slates = pl.concat([frame for a in answers.values() for frame in a.slates])
    num_items = len(dataset.item_table(before_us=from_us))
    computed = figures.compute(slates, queries, arms, num_items=num_items, seed=seed)
    for name, said in answers.items():
        computed["arms"][name] |= _conduct(said)
        if said.fallbacks:
            _log.warning("replay_fallbacks", arm=name, queries=said.fallbacks, reasons=dict(said.fallback_reasons))
    report = {
        "dataset": {"name": dataset.root.resolve().name, "source": dataset.info.get("source"), "hash": dataset.hash},
        "run": run.run_id,
        "reranker": reranker_of(run),
        "protocol": protocol,
        "task": task,
        "from": iso(from_us),
        "to": iso(to_us),
        "positives": list(positives),
        "seed": seed,
        "queries_max": queries_max,
        "queries_seed": None if queries_max is None else queries_seed,
        "k": k,
        "catalogue_items": num_items,
        **computed,
        "commit": commit(),
        "hardware": describe(),
    }
    _write(Path(out), report, slates, queries, _titles(dataset))
    return report


def iso(time_us: int) -> str:
    """Microseconds UTC as ISO 8601 with Z, microseconds only where there are any."""
    return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=time_us)).isoformat().replace("+00:00", "Z")


async def answer(
    run: RunDirectory,
    arms: Sequence[str],
    queries: pl.DataFrame,
    past: Past,
    *,
    k: int,
    task: Task,
    seed: int,
    peers: Peers = NO_PEERS,
) -> dict[str, Answers]:
    """What each arm of a run, or peer, says to the queries, the features folded from `past` alone."""
    clock = ManualClock(0)
    with ExitStack() as stack:
        cascades = {}
        for name in arms:
            reranker, weights = peers.rerankers.get(name, (None, None))
            ports = Ports(
                features=past.store,
                live=past.live,
                clock=clock,
                rng=np.random.default_rng(seed),
                sources=peers.sources,
                scorer=peers.scorers.get(name),
                reranker=reranker,
                rerank_weights=weights,
            )
            cascades[name] = build(PEER_ARMS.get(name, name), run, ports, config=_NO_CACHE)
            stack.callback(cascades[name].close)
        return await ask(cascades, queries, past, clock, k=k, new_only=task == "new-only")


def _conduct(said: Answers) -> dict[str, Any]:
    p50, p99 = np.percentile(said.latency_ms, [50, 99])
    weight = {} if said.rerank_weight is None else {"rerank_weight": said.rerank_weight}
    return {
        **weight,
        "fallbacks": said.fallbacks,
        "fallback_reasons": dict(sorted(said.fallback_reasons.items())),
        "latency_ms": {"p50": round(float(p50), 3), "p99": round(float(p99), 3)},
    }


def _titles(dataset: Dataset) -> dict[str, str]:
    named = dataset.items().select("item_id", "title").drop_nulls()
    return dict(zip(named["item_id"].to_list(), named["title"].to_list(), strict=True))


def reranker_of(run: RunDirectory) -> str | None:
    """Version of the reranker that serves, None for a run without one."""
    return next(reversed(run.reranker_versions()), None)


def check_arms(arms: Sequence[str]) -> None:
    """Raise BadInput for arms that nobody knows, or none."""
    unknown = [arm for arm in arms if arm not in ARMS and arm not in PEER_ARMS]
    if unknown or not arms:
        expected = f"some of {', '.join([*ARMS, *PEER_ARMS])}"
        raise BadInput("--arms", came=", ".join(unknown) or "none", expected=expected, fix="Correct the names.")


def check_out(out: Path) -> None:
    """Raise Conflict for a path that holds anything but a report: only that is replaced."""
    if not out.exists():
        return
    found = {path.name for path in out.iterdir()} if out.is_dir() else {"a file"}
    others = sorted(found.difference(FILES))
    if others or (found and not figures.is_report(out)):
        came = f"it exists and is no report: {', '.join(others[:3] or sorted(found))} in it"
        expected = "a new path, or a folder with a report and nothing else"
        raise Conflict(f"--out {out}", came=came, expected=expected, fix="Choose another.")


@contextmanager
def writing(out: Path) -> Iterator[Path]:
    """A folder to write FILES to, which becomes `out`; of a report already there each file is replaced or removed.

    report.json goes last, since it says what the others are. Nothing else in `out` is touched.
    """
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        if not out.exists():
            temporary.rename(out)
            return
        for name in FILES:
            if (temporary / name).exists():
                (temporary / name).replace(out / name)
            else:
                (out / name).unlink(missing_ok=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(
    out: Path, report: Mapping[str, Any], slates: pl.DataFrame, queries: pl.DataFrame, titles: Mapping[str, str]
) -> None:
    with writing(out) as temporary:
        with disk.writing(temporary):
            slates.write_parquet(temporary / "slates.parquet")
            queries.write_parquet(temporary / "queries.parquet")
        (temporary / "report.json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")
        (temporary / "report.html").write_text(page.render(report, slates, queries, titles), "utf-8")


def _check(arms: Sequence[str], protocol: str, k: int) -> None:
    check_arms(arms)
    if protocol not in PROTOCOLS:
        raise BadInput("--protocol", came=protocol, expected=" or ".join(PROTOCOLS), fix="Choose one of them.")
    if protocol == "online" and (fitted := [arm for arm in arms if arm in PEER_ARMS]):
        raise BadInput(
            "--protocol online", came=f"arms {', '.join(fitted)}", expected="arms that take in what happens meanwhile",
            fix="Leave these arms out, or use --protocol frozen.",
        )  # fmt: skip
    if not 1 <= k <= K_MAX:
        raise BadInput("--k", came=k, expected=f"1 to {K_MAX}", fix="Ask for 100: measures look no further.")


def _check_period(dataset: Dataset, run: RunDirectory, from_us: int) -> None:
    if run.until_us > from_us:
        raise VersionMismatch(
            f"run {run.run_id}",
            came=f"trained until {iso(run.until_us)}",
            expected=f"nothing at or after {iso(from_us)}, the cut",
            fix=f"Train with --until {iso(from_us)}, or replay --from {iso(run.until_us)} or later.",
        )
    if from_us > dataset.last_event_us:
        raise BadInput(
            "--from", came=iso(from_us), expected=f"not after the last event, {iso(dataset.last_event_us)}",
            fix="Give an earlier cut, and a run trained until then.",
        )  # fmt: skip
