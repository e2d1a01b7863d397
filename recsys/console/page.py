"""The page. Every text that comes from elsewhere is escaped; no scripts, nothing fetched."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from double11.v1 import admin_pb2 as pb

from recsys.core import Tier

REFRESH_S = 5
_MEASURES = ("ndcg@10", "recall@10", "hr@10", "coverage@10", "fallbacks")
_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 64rem; padding: 0 1rem; }
table { border-collapse: collapse; margin: .6rem 0 1.6rem; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #8884; text-align: left; }
.bad { color: #c22; font-weight: 600; }
meter { width: 14rem; }
"""


def render(target: str, status: pb.GetStatusResponse | str, replay: Mapping[str, Any] | str) -> str:
    """The whole page. status, replay: what was read, or the reason why not."""
    gateway = _problem(status) if isinstance(status, str) else _gateway(status)
    report = _problem(replay) if isinstance(replay, str) else _replay(replay)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>double11</title>'
        f'<meta http-equiv="refresh" content="{REFRESH_S}"><style>{_STYLE}</style></head>'
        f"<body><h1>double11</h1><h2>Gateway {escape(target)}</h2>{gateway}"
        f"<h2>Latest replay</h2>{report}</body></html>\n"
    )


def _gateway(status: pb.GetStatusResponse) -> str:
    facts = [
        ("state", f"{status.state}, up {status.uptime_s:,.0f} s"),
        ("in flight", f"{status.in_flight_requests} of {status.in_flight_limit}"),
        ("peak plan", status.peak_plan or "none"),
        *(sorted(status.versions.items())),
    ]
    total = sum(status.responses_by_tier.values())
    tiers = "".join(
        f"<tr><td>{tier.label}</td><td>{count:,}</td><td>{_meter(count, total)}</td></tr>"
        for tier in Tier
        if (count := status.responses_by_tier.get(tier.label, 0)) or total
    )
    parts = "".join(
        f"<tr><td>{escape(p.name)}</td><td{'' if p.state == 'ok' else ' class=bad'}>{escape(p.state)}</td>"
        f"<td>{escape(p.detail)}</td></tr>"
        for p in status.parts
    )
    return (
        f"{_table(facts)}<h3>Answers by tier</h3><table>{tiers or '<tr><td>none yet</td></tr>'}</table>"
        f"<h3>Parts</h3><table>{parts}</table>"
    )


def _replay(report: Mapping[str, Any]) -> str:
    facts = [(k, report.get(k, "")) for k in ("task", "protocol", "from", "to", "queries", "commit")]
    head = "".join(f"<th>{escape(m)}</th>" for m in ("arm", *_MEASURES))
    rows = "".join(
        f"<tr><td>{escape(name)}</td>{''.join(f'<td>{_figure(arm.get(m))}</td>' for m in _MEASURES)}</tr>"
        for name, arm in dict(report.get("arms", {})).items()
    )
    return f'{_table(facts)}<table><tr>{head}</tr>{rows}</table><p><a href="/replay">the whole report</a></p>'


def _figure(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else escape(str(value if value is not None else ""))


def _meter(count: int, total: int) -> str:
    return f'<meter max="{total}" value="{count}"></meter>'


def _table(facts: Iterable[tuple[str, Any]]) -> str:
    rows = "".join(f"<tr><th>{escape(k)}</th><td>{escape(str(v))}</td></tr>" for k, v in facts)
    return f"<table>{rows}</table>"


def _problem(reason: str) -> str:
    return f'<p class="bad">{escape(reason)}</p>'
