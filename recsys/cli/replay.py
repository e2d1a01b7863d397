"""double11 replay: compare arms on a past period and, with --fail-if, decide whether a run may ship."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from recsys.cli.common import SEED_MAX, config_option, emit, json_option, parse_time_us, seed_option
from recsys.core import BadInput
from recsys.evaluation.queries import RARE_EVENTS, parse_positives

_NOT_WITH_CUTS = ("run_dir", "from_", "protocol", "k", "seed", "compare")
_ONLY_WITH_CUTS = ("seeds", "work")
_COLUMNS = ("ndcg@10", "recall@10", "recall@100", "hr@10", "mrr@10", "coverage@10")


@click.command()
@click.argument("dataset", type=click.Path(path_type=Path))
@click.option("--run", "run_dir", type=click.Path(path_type=Path), help="Run directory to compare.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the report.")
@click.option("--arms", default="popular,own_history,retrieval,rank,full", show_default=True, help="Comma list.")
@click.option(
    "--task",
    type=click.Choice(["all", "new-only"]),
    default="all",
    show_default=True,
    help="new-only: what the user has not acted on before; arms know the newest 1,024 pairs of item and day of each.",
)
@click.option("--from", "from_", metavar="ISO", help="The cut (default: the run's until).")
@click.option("--to", metavar="ISO", help="End of the period (default: just after the last event).")
@click.option("--positives", default="purchase", show_default=True, help="Comma list of behaviours, or any.")
@click.option("--protocol", type=click.Choice(["frozen", "online"]), default="frozen", show_default=True)
@click.option("--k", default=100, show_default=True, help="Slate length.")
@click.option("--queries-max", type=int, help="Ask a seeded sample of this size (of each cut).")
@seed_option
@click.option("--cuts", metavar="ISO,...", help="Train and replay at each of these cuts, instead of --run and --from.")
@click.option("--seeds", default="0", show_default=True, help="Comma list, with --cuts.")
@click.option("--work", type=click.Path(path_type=Path), help="Where --cuts keeps runs (default: OUT.work).")
@click.option("--compare", type=click.Path(path_type=Path), help="Base report for --fail-if.")
@click.option("--fail-if", multiple=True, metavar="EXPR", help='E.g. "ndcg@10<-2%" or "rank:recall@100<0.2".')
@config_option
@json_option
def replay(
    dataset: Path,
    run_dir: Path | None,
    out: Path,
    arms: str,
    task: Any,
    from_: str | None,
    to: str | None,
    positives: str,
    protocol: Any,
    k: int,
    queries_max: int | None,
    seed: int,
    cuts: str | None,
    seeds: str,
    work: Path | None,
    compare: Path | None,
    fail_if: tuple[str, ...],
    config_path: Path | None,
    as_json: bool,
) -> None:
    """Compare arms of a run on a past period of DATASET by the replay protocol.

    Writes report.json, slates.parquet, queries.parquet and report.html to --out. Exit code 3 when a --fail-if is true.
    With --cuts a run is trained for every cut and seed, and one report.json pools them all.
    """
    from recsys import replay as room

    _check_given(cuts=cuts is not None)
    room.check_grammar(fail_if, based=compare is not None)
    names = [arm.strip() for arm in arms.split(",") if arm.strip()]
    if cuts is not None:
        out = out.resolve()
        pooled = _rolling(
            dataset,
            out,
            names,
            cuts,
            to,
            seeds,
            task,
            positives,
            queries_max,
            work or out.with_name(f"{out.name}.work"),
            config_path,
        )
        emit(pooled, as_json=as_json, text=lambda: rolling_table(pooled))
        room.check_gates(pooled, None, fail_if)
        return
    if run_dir is None:
        raise BadInput("--run", came="nothing", expected="a run, or --cuts to train at", fix="Pass one of the two.")
    base = room.read_report(compare) if compare is not None else None
    report = room.replay(
        dataset,
        run_dir,
        out,
        arms=names,
        task=task,
        from_us=parse_time_us(from_, "--from"),
        to_us=parse_time_us(to, "--to"),
        positives=parse_positives(positives),
        protocol=protocol,
        k=k,
        queries_max=queries_max,
        seed=seed,
    )
    emit(report, as_json=as_json, text=lambda: f"{table(report)}\n{(out / 'report.html').resolve()}")
    room.check_gates(report, base, fail_if)


def _rolling(
    dataset: Path,
    out: Path,
    arms: list[str],
    cuts: str,
    to: str | None,
    seeds: str,
    task: Any,
    positives: str,
    queries_max: int | None,
    work: Path,
    config_path: Path | None,
) -> dict[str, Any]:
    from llm_reranker.config import DistillConfig
    from recsys import replay as room
    from recsys import training
    from recsys.core.config import Config
    from recsys.data import Dataset

    times = [parse_time_us(cut.strip(), "--cuts") for cut in cuts.split(",") if cut.strip()]
    if not all(s.strip().isdecimal() and int(s) <= SEED_MAX for s in seeds.split(",")):
        expected = f"numbers of 0 to {SEED_MAX}, comma between"
        raise BadInput("--seeds", came=seeds, expected=expected, fix="Write e.g. --seeds 0,1,2.")
    what = room.Rolling(
        cuts=tuple(t for t in times if t is not None),
        to_us=parse_time_us(to, "--to") or Dataset.open(dataset).last_event_us + 1,
        seeds=tuple(map(int, seeds.split(","))),
        arms=tuple(arms),
        task=task,
        positives=parse_positives(positives),
        queries_max=queries_max,
    )
    config = Config.load(config_path, {})
    settings, distil = training.Settings.of(config), config.get(DistillConfig)
    return room.rolling(dataset, out, what, work=work, settings=settings, distil=distil)


def _check_given(*, cuts: bool) -> None:
    """Refuse what was given and would be dropped without a word: options of the other way to compare."""
    context = click.get_current_context()
    given = [
        param.opts[0]
        for param in context.command.params
        if (name := str(param.name)) in (_NOT_WITH_CUTS if cuts else _ONLY_WITH_CUTS)
        and context.get_parameter_source(name) is not ParameterSource.DEFAULT
        and (name, context.params[name]) != ("protocol", "frozen")  # it is that of both
    ]
    if given:
        raise BadInput(
            ", ".join(given), came="with --cuts" if cuts else "no --cuts",
            expected="neither: a rolling report has --seeds, and periods between its cuts" if cuts else "--cuts",
            fix="Leave them out." if cuts else "Name the cuts, or leave them out.",
        )  # fmt: skip


def rolling_table(report: Mapping[str, Any]) -> str:
    """The arms of a rolling report as a text table, pairs below."""
    head = f"{report['dataset']['name']}, task {report['task']}, {report['queries']:,} queries"
    lines = [f"{head} at {len(report['cuts'])} cuts, {len(report['seeds'])} seeds, {', '.join(report['positives'])}"]
    days = [cut[:10] for cut in report["cuts"]]
    names = ("ndcg@10", "recall@10", "recall@100")
    lines.append(f"{'arm':<20}" + "".join(f"{n:>12}" for n in (*names, "seeds sd", *(f"@{d}" for d in days))))
    for arm, row in report["arms"].items():
        values = [*(row[n] for n in names), row["seeds_sd"]["ndcg@10"]]
        values += [row["by_cut"].get(cut, {}).get("ndcg@10", float("nan")) for cut in report["cuts"]]
        lines.append(f"{arm:<20}" + "".join(f"{v:>12.4f}" for v in values))
    for pair, by_measure in report["pairs"].items():
        for measure, test in by_measure.items():
            low, high = test["ci95"]
            ratio = "" if test["ratio"] is None else f" x{test['ratio']:.3f}"
            lines.append(f"{pair}: {measure} {test['diff']:+.4f}{ratio} ({low:+.4f} to {high:+.4f}), p {test['p']:.4f}")
    return "\n".join([*lines, *_rare(report["rare_items"])])


def _rare(found: Mapping[str, Any]) -> list[str]:
    """Lines about items that had hardly an event before the query."""
    said = [f"{arm} {row['ndcg@10']:.4f}" for arm, row in found["arms"].items()]
    lines = [f"items with fewer than {RARE_EVENTS} events, {found['queries']:,} queries, ndcg@10: {', '.join(said)}"]
    for pair, by_measure in found["pairs"].items():
        if test := by_measure.get("ndcg@10"):
            low, high = test["ci95"]
            lines.append(f"  {pair}: {test['diff']:+.4f} ({low:+.4f} to {high:+.4f}), p {test['p']:.4f}")
    return lines if said else []


def table(report: Mapping[str, Any]) -> str:
    """The arms of a report as a text table, pairs below."""
    head = f"{report['dataset']['name']}, {report['protocol']}, task {report['task']}, {report['queries']:,} queries"
    lines = [f"{head} from {report['from']} to {report['to']}"]
    names = [*_COLUMNS, "ndcg@10 95 %", "fallbacks", "p50 ms", "p99 ms"]
    lines.append(f"{'arm':<20}" + "".join(f"{name:>17}" if "95" in name else f"{name:>12}" for name in names))
    for arm, row in report["arms"].items():
        low, high = row["ci95"]["ndcg@10"]
        lines.append(
            f"{arm:<20}" + "".join(f"{row[name]:>12.4f}" for name in _COLUMNS) + f"{f'{low:.4f}-{high:.4f}':>17}"
            f"{row['fallbacks']:>12}{row['latency_ms']['p50']:>12.1f}{row['latency_ms']['p99']:>12.1f}"
        )
    lines += [
        f"{arm}: weight {row['rerank_weight']} beside the ranker"
        + ("" if row["rerank_weight"] else ": validation showed no sure gain, the ranker's order stands")
        for arm, row in report["arms"].items()
        if "rerank_weight" in row
    ]
    for pair, by_measure in report["pairs"].items():
        for measure, test in by_measure.items():
            low, high = test["ci95"]
            lines.append(f"{pair}: {measure} {test['diff']:+.4f} ({low:+.4f} to {high:+.4f}), p {test['p']:.4f}")
    return "\n".join([*lines, *_rare(report["rare_items"])])
