"""Estimators on logs whose truth is known: a simulated bandit, and Open Bandit's two policies where it is at hand."""

import os
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from recsys.core import BadInput
from recsys.replay.off_policy import doubly_robust, ips, snips

ACTIONS, CONTEXTS = 12, 5


def world(seed: int, rounds: int):
    """A contextual bandit: true click rates [C, A], a soft logging policy, a sharper one to evaluate."""
    rng = np.random.default_rng(seed)
    rate = rng.uniform(0.02, 0.4, (CONTEXTS, ACTIONS))
    logging = rng.dirichlet(np.full(ACTIONS, 2.0), CONTEXTS)
    target = rate**3 / (rate**3).sum(axis=1, keepdims=True)
    context = rng.integers(0, CONTEXTS, rounds)
    action = np.array([rng.choice(ACTIONS, p=logging[c]) for c in context])
    reward = (rng.uniform(size=rounds) < rate[context, action]).astype(float)
    truth = float((target[context] * rate[context]).sum(axis=1).mean())
    return rate, target, context, reward, logging[context, action], target[context, action], action, truth


def test_all_three_find_the_truth_and_their_intervals_cover_it():
    inside = dict.fromkeys(("ips", "snips", "dr"), 0)
    values: dict[str, list[float]] = {name: [] for name in inside}
    for seed in range(60):
        rate, target, context, reward, logged, evaluated, action, truth = world(seed, 2_000)
        model = np.clip(rate + 0.03, 0, 1)  # a reward model that is off by three points everywhere
        found = {
            "ips": ips(reward, logged, evaluated),
            "snips": snips(reward, logged, evaluated),
            "dr": doubly_robust(
                reward, logged, evaluated, model[context, action], (target[context] * model[context]).sum(axis=1)
            ),
        }
        for name, estimate in found.items():
            inside[name] += estimate.ci95[0] <= truth <= estimate.ci95[1]
            values[name].append(estimate.value - truth)
            assert 0 < estimate.effective_rounds < 2_000
    for name, covered in inside.items():
        assert covered >= 51, name  # 95 % of 60 is 57; four standard deviations below
        assert abs(np.mean(values[name])) < 0.006, name
    assert np.std(values["dr"]) < np.std(values["ips"])


def test_the_same_policy_is_worth_what_it_earned():
    reward = np.array([0.0, 1.0, 0.0, 1.0, 1.0])
    p = np.array([0.2, 0.5, 0.1, 0.9, 0.3])
    for estimate in (ips(reward, p, p), snips(reward, p, p), doubly_robust(reward, p, p, reward * 0, reward * 0)):
        assert estimate.value == pytest.approx(0.6)
        assert estimate.effective_rounds == pytest.approx(5)


@pytest.mark.parametrize("logged", [[0.0, 0.5], [1.2, 0.5], [float("nan"), 0.5], [0.5], []])
def test_propensities_that_cannot_be_are_refused(logged):
    with pytest.raises(BadInput):
        ips([1.0, 0.0], logged, [0.5, 0.5])


def test_no_overlap_is_said_not_divided_by():
    assert ips([1.0, 0.0], [0.5, 0.5], [0.0, 0.0]).effective_rounds == 0.0
    with pytest.raises(BadInput, match="overlap"):
        snips([1.0, 0.0], [0.5, 0.5], [0.0, 0.0])
    with pytest.raises(BadInput, match="model"):
        doubly_robust([1.0], [0.5], [0.5], [float("nan")], [0.1])


def test_one_logging_policy_predicts_the_other():
    """Open Bandit: the uniform policy's click rate estimated from Thompson sampling's log, against its own log.

    Without DOUBLE11_DATA the same two logs are simulated, with a truth that is known exactly.
    """
    data = os.environ.get("DOUBLE11_DATA")
    folder = Path(data) / "open_bandit_small" if data else None
    if folder is not None and folder.is_dir():
        bts = pl.read_csv(folder / "bts" / "all" / "all.csv.gz")
        uniform = pl.read_csv(folder / "random" / "all" / "all.csv.gz")
        num_items = len(pl.read_csv(folder / "random" / "all" / "item_context.csv"))
        reward, logged = bts["click"].to_numpy(), bts["propensity_score"].to_numpy()
        own = uniform["click"].to_numpy().astype(float)
    else:
        rate, _, context, reward, logged, _, _, _ = world(3, 10_000)
        num_items = ACTIONS
        rng = np.random.default_rng(9)
        own = (rng.uniform(size=10_000) < rate[context, rng.integers(0, ACTIONS, 10_000)]).astype(float)
    evaluated = np.full(len(reward), 1.0 / num_items)
    half = 1.96 * own.std() / len(own) ** 0.5
    for estimate in (ips(reward, logged, evaluated), snips(reward, logged, evaluated)):
        spread = (estimate.ci95[1] - estimate.ci95[0]) / 2
        assert abs(estimate.value - own.mean()) <= 1.5 * (half**2 + spread**2) ** 0.5
