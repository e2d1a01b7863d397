from datetime import UTC, datetime, timedelta

import numpy as np
import polars as pl

from recsys.core import keys
from recsys.training.tower_data import Actions

TIME = pl.Datetime("us", "UTC")
T0 = datetime(2024, 1, 1, tzinfo=UTC)


def _events(rows):
    return pl.DataFrame(
        [(u, i, kind, T0 + timedelta(hours=h)) for u, i, kind, h in rows],
        schema=dict.fromkeys(("user_id", "item_id", "event_type"), pl.String) | {"event_time": TIME},
        orient="row",
    )  # fmt: skip


def test_two_items_in_one_basket_do_not_see_each_other():
    actions = Actions.from_events(
        _events(
            [
                ("u", "a", "purchase", 0),
                ("u", "b", "purchase", 5),
                ("v", "x", "purchase", 5),
                ("u", "c", "purchase", 5),
                ("u", "d", "view", 9),
            ]
        )
    )
    of = {int(k): row for row, k in enumerate(actions.item_key)}
    seen = {i: actions.histories(np.array([of[int(keys([i])[0])]]), 50).item_key.tolist() for i in "abcdx"}
    assert seen == {
        "a": [],
        "b": keys("a").tolist(),
        "c": keys("a").tolist(),
        "d": keys("abc").tolist(),
        "x": [],
    }


def test_impressions_and_returns_teach_nothing_and_the_bound_keeps_the_newest():
    kinds = ("impression", "view", "return", "cart", "purchase")
    actions = Actions.from_events(_events(list(zip("uuuuu", "abacd", kinds, range(5), strict=True))))
    assert len(actions) == 3
    assert actions.weights().tolist() == [1, 2, 3]
    assert actions.histories(np.array([2]), 1).item_key.tolist() == keys("c").tolist()


def test_older_actions_count_less_where_age_matters():
    actions = Actions.from_events(_events([("u", "a", "view", 0), ("u", "b", "cart", 24), ("v", "c", "purchase", 48)]))
    assert actions.weights().tolist() == [1, 2, 3]
    assert actions.weights(half_life_days=1.0).tolist() == [0.25, 1, 3]
    assert (actions.weights(half_life_days=1e-9) > 0).all()


def test_no_actions_at_all():
    assert len(Actions.from_events(_events([]))) == 0
