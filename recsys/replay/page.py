"""report.html: one file, no scripts, nothing fetched. Every text that comes from data is escaped."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

import polars as pl

from recsys.evaluation import MEASURES
from recsys.evaluation.queries import RARE_EVENTS
from recsys.replay.figures import HEADLINE

EXAMPLES = 4  # users shown
_PLACES = 10
_BAR_PX = 320
_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; }
table { border-collapse: collapse; margin: .6rem 0 1.6rem; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #8884; text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
.slates td, .slates th { text-align: left; max-width: 15rem; }
.hit { font-weight: 600; color: #0a7d33; }
.quiet { opacity: .65; }
svg { vertical-align: middle; }
"""


def render(report: Mapping[str, Any], slates: pl.DataFrame, queries: pl.DataFrame, titles: Mapping[str, str]) -> str:
    """The report as a page: what was asked, arms with intervals, pairs, a few users' slates with titles."""
    data = report["dataset"]
    asked = {
        "dataset": f"{data['name']} ({data['hash'][:12]})",
        "run": report["run"],
        "protocol": f"{report['protocol']}, task {report['task']}, positives {', '.join(report['positives'])}",
        "period": f"{report['from']} to {report['to']}",
        "queries": f"{report['queries']:,} (catalogue of {report['catalogue_items']:,} items)",
        "made by": f"commit {report['commit']}, seed {report['seed']}, {report['hardware']['cpu']}",
    }
    facts = "".join(f"<tr><th>{escape(k)}</th><td>{escape(str(v))}</td></tr>" for k, v in asked.items())
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Replay of {escape(data["name"])}</title>'
        f"<style>{_STYLE}</style></head><body><h1>Replay of {escape(data['name'])}</h1><table>{facts}</table>"
        f"<h2>Arms</h2>{_arms(report['arms'])}<h2>Differences</h2>{_pairs(report['pairs'])}{_rare(report['rare_items'])}"
        f"<h2>Examples</h2>{_examples(list(report['arms']), slates, queries, titles)}</body></html>\n"
    )


def _arms(arms: Mapping[str, Any]) -> str:
    columns = [*MEASURES, "coverage@10", "fallbacks"]
    head = "".join(f"<th>{escape(c)}</th>" for c in ("arm", *columns, "ms p50", "ms p99", f"{HEADLINE}, 95 % interval"))
    top = max((arm["ci95"][HEADLINE][1] for arm in arms.values()), default=0.0) or 1.0
    rows = []
    for name, arm in arms.items():
        cells = "".join(f"<td>{arm[c]:.4f}</td>" if c != "fallbacks" else f"<td>{arm[c]}</td>" for c in columns)
        latency = "".join(f"<td>{arm['latency_ms'][q]:.1f}</td>" for q in ("p50", "p99"))
        rows.append(f"<tr><td>{escape(name)}</td>{cells}{latency}<td>{_bar(arm, top)}</td></tr>")
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _rare(found: Mapping[str, Any]) -> str:
    if not found["queries"]:
        return ""
    head = f"<h2>Items with fewer than {RARE_EVENTS} events</h2><p>{found['queries']:,} queries</p>"
    cells = "".join(f"<th>{escape(c)}</th>" for c in ("arm", *MEASURES))
    rows = "".join(
        f"<tr><td>{escape(name)}</td>{''.join(f'<td>{arm[c]:.4f}</td>' for c in MEASURES)}</tr>"
        for name, arm in found["arms"].items()
    )
    return f"{head}<table><tr>{cells}</tr>{rows}</table>{_pairs(found['pairs'])}"


def _bar(arm: Mapping[str, Any], top: float) -> str:
    low, high = (bound / top * (_BAR_PX - 4) for bound in arm["ci95"][HEADLINE])
    at = arm[HEADLINE] / top * (_BAR_PX - 4)
    return (
        f'<svg width="{_BAR_PX}" height="16" role="img" aria-label="{arm[HEADLINE]:.4f}">'
        f'<rect x="0" y="3" width="{at:.1f}" height="10" fill="#4477aa"/>'
        f'<path d="M{low:.1f} 8H{high:.1f}M{low:.1f} 4V12M{high:.1f} 4V12" stroke="#cc6611" stroke-width="2"/></svg>'
    )


def _pairs(pairs: Mapping[str, Any]) -> str:
    rows = []
    for name, by_measure in pairs.items():
        for measure, pair in by_measure.items():
            low, high = pair["ci95"]
            cells = f"<td>{pair['diff']:+.4f}</td><td>{low:+.4f} to {high:+.4f}</td><td>{pair['p']:.4f}</td>"
            rows.append(f"<tr><td>{escape(name)}</td><td>{escape(measure)}</td>{cells}</tr>")
    head = "".join(f"<th>{c}</th>" for c in ("pair", "measure", "difference", "95 % interval", "p (Holm)"))
    note = '<p class="quiet">Paired bootstrap by user; p is corrected for the number of pairs.</p>'
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>{note}"


def _examples(arms: list[str], slates: pl.DataFrame, queries: pl.DataFrame, titles: Mapping[str, str]) -> str:
    step = max(1, len(queries) // EXAMPLES)
    parts = []
    for row in queries.gather_every(step).head(EXAMPLES).iter_rows(named=True):
        relevant = set(row["relevant"])
        shown = slates.filter((pl.col("query_id") == row["query_id"]) & (pl.col("rank") <= _PLACES)).sort("rank")
        lists = {arm: shown.filter(pl.col("arm") == arm)["item_id"].to_list() for arm in arms}
        body = []
        for place in range(max((len(items) for items in lists.values()), default=0)):
            cells = (_item(items[place], relevant, titles) if place < len(items) else "" for items in lists.values())
            body.append(f"<tr><td>{place + 1}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
        head = "".join(f"<th>{escape(arm)}</th>" for arm in arms)
        wanted = "; ".join(escape(titles.get(item, item)) for item in sorted(relevant)[:_PLACES])
        more = f" and {len(relevant) - _PLACES} more" if len(relevant) > _PLACES else ""
        parts.append(
            f"<h3>User {escape(row['user_id'])}</h3><p>Acted on: {wanted}{more}</p>"
            f'<table class="slates"><tr><th></th>{head}</tr>{"".join(body)}</table>'
        )
    return "".join(parts)


def _item(item_id: str, relevant: set[str], titles: Mapping[str, str]) -> str:
    text = escape(titles.get(item_id, item_id))
    return f'<span class="hit">{text} ✓</span>' if item_id in relevant else text
