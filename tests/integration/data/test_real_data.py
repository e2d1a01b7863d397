"""Published logs come out with the published counts.

Runs on DOUBLE11_DATA where it is set, and always on the Complete Journey data that its wheel ships.
"""

from __future__ import annotations

import json
import os
from datetime import datetime
from pathlib import Path

import polars as pl
import pytest
from click.testing import CliRunner

from recsys.cli.data import data
from recsys.data import Dataset, import_dataset

ANY = ("view", "favorite", "cart", "purchase")


def queries(dataset: Dataset, from_iso: str, positives: tuple[str, ...]) -> tuple[int, int]:
    """Users with a query, task all and task new-only, by the words of the replay protocol."""
    cut = int(datetime.fromisoformat(from_iso).timestamp()) * 1_000_000
    before, after = dataset.events(before_us=cut), dataset.events(from_us=cut, types=positives)
    after = after.join(before, on="user_id", how="semi")
    touched = before.filter(pl.col("event_type") != "impression")
    fresh = after.join(touched, on=["user_id", "item_id"], how="anti")
    return after["user_id"].n_unique(), fresh["user_id"].n_unique()


def shared_cases() -> list[tuple[str, str, str, tuple[str, ...], tuple[int, int]]]:
    if "DOUBLE11_DATA" not in os.environ:
        return []
    return [
        ("online-retail", "online_retail", "2011-08-01T00:00:00Z", ("purchase",), (766, 699)),
        ("multi-behaviour", "taobao_userbehavior_2017_mb", "2017-12-02T15:59:59Z", ("purchase",), (9_454, 8_193)),
        ("multi-behaviour", "retailrocket_mb", "2015-09-01T19:11:57Z", ANY, (229, 221)),
    ]


CASES = [
    ("complete-journey", None, "2017-12-01T00:00:00Z", ("purchase",), (255, 253)),
    *shared_cases(),
]


@pytest.mark.parametrize(("format_", "folder", "from_iso", "positives", "expected"), CASES)
def test_query_counts(
    tmp_path: Path,
    format_: str,
    folder: str | None,
    from_iso: str,
    positives: tuple[str, ...],
    expected: tuple[int, int],
) -> None:
    source = None if folder is None else Path(os.environ["DOUBLE11_DATA"]) / folder
    options = {"households": "300"} if folder is None else {}
    import_dataset(format_, source, tmp_path / "out", options=options)
    assert queries(Dataset.open(tmp_path / "out"), from_iso, positives) == expected


def test_the_other_shared_sets(tmp_path: Path) -> None:
    if "DOUBLE11_DATA" in os.environ:
        folder = Path(os.environ["DOUBLE11_DATA"])
        games = import_dataset("canonical", folder / "amazon_games_dev", tmp_path / "games")
        assert (games.num_events, games.num_users, games.num_items) == (220_426, 25_229, 16_859)
        assert games.rejected == {}
        clicks = 0
        for policy in ("random", "bts"):
            for campaign in ("all", "men", "women"):
                out = tmp_path / policy / campaign
                import_dataset("open-bandit", folder / "open_bandit_small" / policy / campaign, out)
                counts = dict(Dataset.open(out).events()["event_type"].value_counts().iter_rows())
                assert counts["impression"] == 10_000
                clicks += counts["view"]
        assert clicks == 287
    else:  # the same two properties on what a wheel ships: every row is an event or is set aside
        report = import_dataset("complete-journey", None, tmp_path / "cj")
        assert report.num_users == 2_469
        assert report.num_events + sum(report.rejected.values()) == 1_469_307


def test_slices_of_households_are_nested_and_their_events_keep_their_ids(tmp_path: Path) -> None:
    found = []
    for households in ("40", "80"):
        import_dataset("complete-journey", None, tmp_path / households, options={"households": households})
        found.append(Dataset.open(tmp_path / households))
    small, large = (d.events() for d in found)
    assert small["user_id"].n_unique() == 40
    assert large["user_id"].n_unique() == 80
    kept = large.join(small.select("user_id").unique(), on="user_id", how="semi")
    assert kept["event_id"].to_list() == small["event_id"].to_list()
    items = found[0].items()
    assert items["title"].null_count() == 0
    assert items["category"].null_count() == 0
    assert (items["price"] >= 0).all()


def test_the_commands(tmp_path: Path) -> None:
    run = CliRunner().invoke(
        data,
        ["import", "--format", "complete-journey", "--option", "households=5", "--out", str(tmp_path / "cj"), "--json"],
    )
    assert run.exit_code == 0, run.output
    report = json.loads(run.stdout)
    assert report["num_users"] == 5
    assert report["hash"] == Dataset.open(tmp_path / "cj").hash
    run = CliRunner().invoke(data, ["simulate", "--preset", "tiny", "--seed", "1", "--out", str(tmp_path / "sim")])
    assert run.exit_code == 0, run.output
    assert "events" in run.output
    run = CliRunner().invoke(data, ["formats"])
    assert "households" in run.output
    run = CliRunner().invoke(data, ["import", "--format", "taobao", "--option", "x", "--out", "o"])
    assert run.exit_code != 0
    assert "KEY=VALUE" in str(run.exception)
