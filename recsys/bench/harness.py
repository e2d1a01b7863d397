"""Measure contestants side by side: warm up, interleave in rotating order, repeat; medians and spread.

Interleaving gives every contestant the same share of a machine's moods (turbo, neighbours, page cache); the rotation
gives none of them the place after the slowest one. Source: design, house rule 10.
"""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from recsys.core.hardware import commit, describe
from recsys.core.progress import bar

Unit = Literal["per_s", "ms"]
# does a batch of work, returns how many units of it
Work = Callable[[], float]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Contest:
    """What is measured. unit: units of work per second, or milliseconds per unit.

    ours, peer, limit: (name, work); peer and limit may be absent. limit is what the machine allows at best.
    """

    what: str
    unit: Unit
    ours: tuple[str, Work]
    peer: tuple[str, Work] | None = None
    limit: tuple[str, Work] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of the report. ours, peer, limit: medians. median: the same by contestant's name.

    spread: (largest - smallest) / median of each, by role. ratio: ours / peer in the direction in which more is better,
    None without a peer.
    """

    what: str
    unit: str
    ours: float
    peer: float | None
    limit: float | None
    median: Mapping[str, float]
    spread: Mapping[str, float]
    ratio: float | None


def measure(contests: Sequence[Contest], *, repeats: int, warmups: int = 1) -> list[Row]:
    """Run every contest; repeats and warm-ups count calls of each contestant."""
    rows = []
    with bar(total=len(contests) * (repeats + warmups), what="bench", unit="round") as progress:
        for contest in contests:
            roles = {r: c for r in ("ours", "peer", "limit") if (c := getattr(contest, r)) is not None}
            samples: dict[str, list[float]] = {role: [] for role in roles}
            for round_ in range(warmups + repeats):
                order = list(roles)
                for role in order[round_ % len(order) :] + order[: round_ % len(order)]:
                    value = _timed(roles[role][1], contest.unit)
                    if round_ >= warmups:
                        samples[role].append(value)
                progress.update(1)
            rows.append(_row(contest, roles, samples))
    return rows


def sampled(what: str, unit: str, samples: Mapping[str, tuple[str, Sequence[float]]]) -> Row:
    """A row from values measured elsewhere, by role (ours, peer, limit): (name, values). More is better per second."""
    mid = {role: median(values) for role, (_, values) in samples.items()}
    ratio = None
    if "peer" in mid and mid["ours"] and mid["peer"]:
        ratio = mid["ours"] / mid["peer"] if unit == "per_s" else mid["peer"] / mid["ours"]
    return Row(
        what=what,
        unit=unit,
        ours=mid["ours"],
        peer=mid.get("peer"),
        limit=mid.get("limit"),
        median={samples[role][0]: value for role, value in mid.items()},
        spread={r: (max(v) - min(v)) / mid[r] if mid[r] else 0.0 for r, (_, v) in samples.items()},
        ratio=ratio,
    )


class Cost(NamedTuple):
    """Of one run in a process of its own: wall and CPU seconds, peak resident memory in GiB, what the work returned."""

    seconds: float
    cpu_s: float
    gib: float
    result: Any


def alone(work: Callable[..., Any], *args: Any) -> Cost:
    """Run a function of a module in a fresh process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_alone, work, *args).result()


def _alone(work: Callable[..., Any], *args: Any) -> Cost:
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    result = work(*args)
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Cost(time.perf_counter() - wall_s, time.process_time() - cpu_s, kib / (1 << 20), result)


async def duel(
    what: str,
    ours: tuple[str, Callable[[T], Awaitable[object]]],
    peer: tuple[str, Callable[[T], Awaitable[object]]],
    requests: Sequence[T],
    repeats: int,
) -> list[Row]:
    """Latency of single requests that take turns: rows of median and 99th percentile, wall time and this thread's CPU.

    The first of `repeats + 1` rounds over the requests warms up. spread: of the rounds' own percentiles. On a machine
    shared with others the round in which the peer was quickest says most about both: it has a row of its own.
    """
    took: dict[tuple[str, str], list[list[float]]] = {}
    with bar(total=repeats + 1, what="bench", unit="round") as progress:
        for round_ in range(repeats + 1):
            for turn, request in enumerate(requests):
                for role, (_, read) in sorted({"ours": ours, "peer": peer}.items(), reverse=bool(turn % 2)):
                    wall_s, cpu_s = time.perf_counter(), time.thread_time()
                    await read(request)
                    spent = {"CPU": time.thread_time() - cpu_s, "wall": time.perf_counter() - wall_s}
                    for clock, seconds in spent.items():
                        took.setdefault((clock, role), [[] for _ in range(repeats + 1)])[round_].append(seconds * 1e3)
            progress.update(1)
    rows = []
    for clock in ("wall", "CPU"):
        for percentile in (50, 99):
            rounds = {r: [float(np.percentile(v, percentile)) for v in took[clock, r][1:]] for r in ("ours", "peer")}
            all_of = {r: float(np.percentile(np.concatenate(took[clock, r][1:]), percentile)) for r in ("ours", "peer")}
            rows.append(
                Row(
                    what=f"{what}, {clock} p{percentile}",
                    unit="ms",
                    ours=all_of["ours"],
                    peer=all_of["peer"],
                    limit=None,
                    median={ours[0]: all_of["ours"], peer[0]: all_of["peer"]},
                    spread={r: (max(v) - min(v)) / all_of[r] for r, v in rounds.items()},
                    ratio=all_of["peer"] / all_of["ours"],
                )
            )
    quietest = min(range(1, repeats + 1), key=lambda i: float(np.median(took["wall", "peer"][i])))
    for percentile in (50, 99):
        quiet = {r: [float(np.percentile(took["wall", r][quietest], percentile))] for r in ("ours", "peer")}
        samples = {"ours": (ours[0], quiet["ours"]), "peer": (peer[0], quiet["peer"])}
        rows.append(sampled(f"{what}, wall p{percentile} of the quietest round", "ms", samples))
    return rows


def figure(what: str, unit: str, ours: float, *, peer: float | None = None, limit: float | None = None) -> Row:
    """A row for a figure that is not a time, e.g. a recall."""
    ratio = ours / peer if peer else None
    return Row(
        what=what, unit=unit, ours=ours, peer=peer, limit=limit, median={"double11": ours}, spread={}, ratio=ratio
    )


def document(name: str, config: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """The JSON document of a benchmark."""
    return {
        "name": name,
        "commit": commit(),
        "hardware": describe(),
        "config": dict(config),
        "rows": [asdict(r) for r in rows],
    }


def _timed(work: Work, unit: Unit) -> float:
    started_s = time.perf_counter()
    done = work()
    seconds = time.perf_counter() - started_s
    return done / seconds if unit == "per_s" else seconds * 1e3 / done


def _row(contest: Contest, roles: Mapping[str, tuple[str, Work]], samples: Mapping[str, list[float]]) -> Row:
    medians = {role: median(values) for role, values in samples.items()}
    ratio = None
    if "peer" in medians:
        better = (medians["ours"], medians["peer"])
        ratio = better[0] / better[1] if contest.unit == "per_s" else better[1] / better[0]
    return Row(
        what=contest.what,
        unit=contest.unit,
        ours=medians["ours"],
        peer=medians.get("peer"),
        limit=medians.get("limit"),
        median={roles[role][0]: value for role, value in medians.items()},
        spread={role: (max(values) - min(values)) / medians[role] for role, values in samples.items()},
        ratio=ratio,
    )
