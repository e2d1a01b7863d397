"""Outcomes against a plain one-by-one reading of the rules, for any batching."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_store.commit import SEEN, SEEN_MAX
from feature_store.state import Rows
from streaming.dedup import Outcome, classify

_UNIT = st.tuples(st.integers(0, 2), st.integers(0, 60), st.integers(0, 25))
HORIZON = 10


def plain(units, horizon=HORIZON):
    seen, latest, outcomes = {}, {}, []
    for user, time, key in units:
        ids = seen.setdefault(user, {})
        newest = max(latest.get(user, -1), time)
        latest[user] = newest
        ids = seen[user] = {k: t for k, t in ids.items() if t >= newest - horizon}
        if key in ids:
            outcomes.append(Outcome.DUPLICATE)
        elif time < newest - horizon or (len(ids) == SEEN_MAX and (time, key) < min((t, k) for k, t in ids.items())):
            outcomes.append(Outcome.LATE)
        else:
            ids[key] = time
            outcomes.append(Outcome.APPLIED)
            if len(ids) > SEEN_MAX:
                del ids[min((t, k) for k, t in ids.items())[1]]
    return outcomes


def in_batches(units, cuts, horizon=HORIZON):
    edges, seen, outcomes = [0, *sorted(cuts), len(units)], Rows.empty(SEEN, 3), []
    for a, b in itertools.pairwise(edges):
        part = np.array(units[a:b], np.int64).reshape(-1, 3)
        found, seen = classify(part[:, 0], part[:, 1], part[:, 2], seen, horizon)
        outcomes += found.tolist()
    return outcomes


@st.composite
def cases(draw):
    # An id always comes with the same time, as ids are unique for ever.
    times = draw(st.lists(st.integers(0, 60), min_size=26, max_size=26))
    units = [(u, times[k], k) for u, _, k in draw(st.lists(_UNIT, max_size=60))]
    return units, draw(st.lists(st.integers(0, len(units)), max_size=4))


@settings(max_examples=300, deadline=None)
@given(cases())
def test_equals_the_rules_read_one_by_one(case):
    units, cuts = case
    assert in_batches(units, cuts) == plain(units)


def test_what_the_cap_dropped_is_late_not_applied_twice():
    n = SEEN_MAX + 10
    user, time, keys = np.zeros(n, np.int64), np.arange(n), np.arange(n) + 5
    outcome, seen = classify(user, time, keys, Rows.empty(SEEN, 1), 10 * n)
    assert not outcome.any()
    assert len(seen.words) == SEEN_MAX
    again, seen = classify(user, time, keys, seen, 10 * n)
    assert again[:10].tolist() == [Outcome.LATE] * 10
    assert again[10:].tolist() == [Outcome.DUPLICATE] * SEEN_MAX
    assert len(seen.words) == SEEN_MAX


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1 << 32), st.lists(st.integers(0, 2_600), max_size=4))
def test_a_robot_with_more_than_the_cap_is_judged_alike_in_any_batching(seed, cuts):
    rng, day = np.random.default_rng(seed), 3_000
    times = rng.integers(0, day, 2_000)
    arrival = np.argsort(times + rng.integers(0, day // 2, 2_000))
    keys = np.insert(arrival, rng.integers(0, 2_000, 600), rng.choice(arrival, 600))  # repeats, near and far
    units = [(int(k % 7 == 0), int(times[k]), int(k)) for k in keys]
    assert in_batches(units, cuts, day) == plain(units, day)
