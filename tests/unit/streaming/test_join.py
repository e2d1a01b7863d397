"""Impressions and what became of them; the watermark that closes their windows."""

from recsys.core import EventBatch
from streaming.join import join, to_messages
from streaming.watermark import Watermark

T, HOUR = 1_600_000_000_000_000, 3_600_000_000


def events(*rows):
    names = ("event_id", "event_type", "event_time", "item_id", "request_id")
    columns = dict(zip(names, zip(*rows, strict=True), strict=True))
    n = len(rows)
    extra = {"kind": [1] * n, "user_id": ["u"] * n, "position": [1] * n, "propensity": [0.5] * n}
    return EventBatch.from_columns({k: list(v) for k, v in columns.items()} | extra)


BATCH = events(
    ("r1#1", 1, T, "a", "r1"),
    ("r1#2", 1, T, "b", "r1"),
    ("r2#1", 1, T + HOUR, "a", "r2"),
    ("x", 2, T + 2 * HOUR, "a", None),  # latest slate that showed it: r2
    ("y", 5, T + 3 * HOUR, "a", "r1"),  # names its slate
    ("z", 5, T + 30 * HOUR, "b", None),  # after the window
    ("w", 2, T - 1, "b", None),  # before it was shown
)


def test_actions_go_to_the_slate_they_name_or_the_latest_within_the_window():
    found = {(r["request_id"], r["item_id"]): r for r in join(BATCH).iter_rows(named=True)}
    assert found["r1", "a"]["action_types"] == [5]
    assert found["r2", "a"]["action_types"] == [2]
    assert found["r2", "a"]["action_time_us"] == T + 2 * HOUR
    assert found["r1", "b"]["action_types"] == []
    assert found["r1", "b"]["action_time_us"] == 0


def test_of_slates_of_one_name_the_latest_has_the_action():
    """Of one page, home and cart: an action is one, though both showed the item."""
    found = join(
        events(
            ("home#1", 1, T, "a", "page"),
            ("cart#1", 1, T + HOUR, "a", "page"),
            ("other#1", 1, T + 2 * HOUR, "a", "later"),
            ("x", 2, T + HOUR - 1, "a", "page"),
            ("y", 5, T + 3 * HOUR, "a", "page"),
        )
    )
    assert found["action_types"].to_list() == [[2], [5], []]


def test_only_windows_behind_the_watermark_are_closed():
    closed = join(BATCH, window_us=2 * HOUR, watermark_us=T + 2 * HOUR)
    assert closed["request_id"].to_list() == ["r1", "r1"]


def test_samples_become_messages_with_stable_ids():
    first, again = list(to_messages(join(BATCH))), list(to_messages(join(BATCH), late=True))
    assert [m.sample_id for m in first] == [m.sample_id for m in again]
    assert len({m.sample_id for m in first}) == 3
    assert again[0].late
    assert list(first[2].action_types) == [2]


def test_nothing_shown_gives_no_samples():
    assert not len(join(EventBatch.empty()))


def test_the_watermark_is_the_slowest_moving_partition():
    now = [0.0]
    watermark = Watermark(idle_s=30, monotonic_s=lambda: now[0])
    assert watermark.value_us() is None
    watermark.observe("events", 0, 100)
    watermark.observe("events", 1, 50)
    watermark.observe("events", 0, 90)  # never back
    assert watermark.value_us() == 50
    now[0] = 31
    watermark.observe("events", 0, 200)
    assert watermark.value_us() == 200  # partition 1 has been silent
    now[0] = 100
    assert watermark.value_us() == 200
