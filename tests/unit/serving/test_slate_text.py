"""`double11 recommend` prints what comes from data."""

from double11.v1 import recommend_pb2 as pb

from recsys.cli.serve import slate_text


def test_a_slate_is_printed_without_what_a_terminal_would_obey():
    item = pb.RecommendedItem(item_id="双" * 100, title="tea\x1b[2J\tcup\nforged line", score=1.0)
    row = slate_text(pb.RecommendResponse(items=[item], tier=pb.TIER_RANK)).splitlines()[1]
    assert "双" * 48 in row
    assert "双" * 49 not in row
    assert "tea\ufffd[2J\ufffdcup\ufffdforged line" in row
