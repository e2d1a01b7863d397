"""Bytes to events and back; what is wrong is rejected with its cause."""

import pytest
from double11.v1.event_pb2 import Action, Event, Impression, ImpressionItem, ItemChange, PriceChange, StockChange

from recsys.core import EventBatch, EventKind
from streaming.codec import decode_events, decode_impressions, encode_events, from_messages, owner_of, validate

T = 1_600_000_000_000_000


def action(**kw):
    body = {"type": 2, "user_id": "u", "item_id": "i"} | kw.pop("action", {})
    return Event(**{"event_id": "e", "event_time_us": T, "action": Action(**body)} | kw)


def test_every_kind_survives_the_round_trip():
    batch = EventBatch.from_columns(
        {
            "event_id": list("abcdef"),
            "kind": [1, 1, 2, 3, 4, 5],
            "event_type": [5, 1, 0, 0, 0, 0],
            "event_time": [T + i for i in range(6)],
            "known_at": [T + 9, *(T + i for i in range(1, 6))],
            "user_id": ["u", "u", None, None, None, "u"],
            "item_id": ["i", "j", "i", "i", "買", None],
            "session_id": ["s", *[None] * 5],
            "request_id": [None, "r", *[None] * 4],
            "position": [None, 3, *[None] * 4],
            "propensity": [None, 0.25, *[None] * 4],
            "price": [0, None, 100, None, 7, None],
            "quantity": [2, *[None] * 5],
            "stock": [None, None, None, 0, None, None],
            "listed": [None, None, None, None, False, None],
            "title": [None, None, None, None, "上衣", None],
            "category": [None, None, None, None, "c", None],
            "attributes": [None, None, None, None, '{"a": 1}', None],
            "stress": [False, True, False, False, False, False],
        }
    )
    encoded = list(encode_events(batch))
    item = "買\0item,title,category,price_minor,attributes_json".encode()
    assert [key for _, key, _ in encoded] == [b"u", b"u", b"i\0price", b"i\0stock", item, b"u"]
    assert [owner_of(key) for _, key, _ in encoded[2:5]] == [b"i", b"i", "買".encode()]
    assert owner_of(b"plain") == b"plain"
    back = decode_events([value for _, _, value in encoded])
    assert back.rejected == []
    assert back.batch.table.equals(batch.table)
    assert back.row.tolist() == list(range(6))


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (action(event_id=""), "no event_id"),
        (action(event_id="é" * 129), "event_id of 258 bytes"),
        (action(action={"user_id": ""}), "no user_id"),
        (action(action={"item_id": "x" * 257}), "item_id of 257 bytes"),
        (action(action={"type": 0}), "action type 0"),
        (action(action={"type": 9}), "action type 9"),
        (action(action={"price_minor": -1}), "price_minor -1"),
        (action(action={"price_minor": 2**40 + 1}), "price_minor 1099511627777; expected 0 to 1099511627776"),
        (action(action={"quantity": 0}), "quantity 0"),
        (action(action={"position": -2}), "position -2"),
        (action(action={"propensity": float("nan")}), "propensity nan"),
        (action(action={"propensity": float("inf")}), "propensity inf"),
        (action(action={"propensity": 1.5}), "propensity 1.5"),
        (action(event_time_us=0), "event_time_us 0"),
        (action(event_time_us=T * 1_000), "event_time_us"),
        (action(event_time_us=-5), "event_time_us -5"),
        (action(known_at_us=T - 1), "known_at_us"),
        (Event(event_id="e", event_time_us=T), "no body"),
        (Event(event_id="e", event_time_us=T, price=PriceChange(item_id="i", price_minor=-3)), "price_minor -3"),
        (
            Event(event_id="e", event_time_us=T, price=PriceChange(item_id="i", price_minor=2**61)),
            f"price_minor {2**61}",
        ),
        (
            Event(event_id="e", event_time_us=T, stock=StockChange(item_id="i", stock_units=2**61)),
            f"stock_units {2**61}",
        ),
        (Event(event_id="e", event_time_us=T, item=ItemChange(item_id="i", price_minor=2**61)), f"price_minor {2**61}"),
        (Event(event_id="e", event_time_us=T, stock=StockChange(item_id="", stock_units=3)), "no item_id"),
        (Event(event_id="e", event_time_us=T, stock=StockChange(item_id="i", stock_units=-1)), "stock_units -1"),
        (Event(event_id="e", event_time_us=T, item=ItemChange(item_id="i", title="x" * 5_000)), "text of 5000 bytes"),
        (
            Event(event_id="e", event_time_us=T, item=ItemChange(item_id="i", attributes_json="x" * 17_000)),
            "attributes_json 17000 bytes",
        ),
    ],
)
def test_an_invalid_event_is_rejected_with_what_came_and_what_was_expected(event, reason):
    assert reason in (validate(event) or "")
    good = action(event_id="good")
    found = decode_events([good.SerializeToString(), event.SerializeToString(), good.SerializeToString()])
    assert found.row.tolist() == [0, 2]
    (rejected,) = found.rejected
    assert (rejected.row, rejected.cause) == (1, "invalid")
    assert reason in rejected.detail
    assert "expected" in rejected.detail


@pytest.mark.parametrize("value", [b"\xff\xff\xff", b"\x0a\x05ab", b"\x0a\x02\xc3\x28"])
def test_malformed_protobuf_is_undecodable(value):
    (rejected,) = decode_events([value]).rejected
    assert rejected.cause == "undecodable"
    assert not len(decode_events([value]).batch)


def test_a_truncated_event_is_rejected_at_every_length():
    value = action().SerializeToString()
    for n in range(len(value)):
        found = decode_events([value[:n]])
        assert len(found.rejected) == 1
        assert not len(found.batch)


def test_unknown_fields_of_a_newer_producer_are_skipped():
    value = action().SerializeToString() + b"\xfa\x3f\x03new"  # field 1023
    assert decode_events([value]).rejected == []


def test_an_unknown_schema_version_is_not_guessed_at():
    (rejected,) = decode_events([action().SerializeToString()], [{"schema": b"7"}]).rejected
    assert rejected.cause == "unknown-version"
    assert decode_events([action().SerializeToString()], [{"schema": b"1"}]).rejected == []


def test_a_slate_becomes_one_impression_per_item():
    slate = Impression(
        request_id="r",
        user_id="u",
        session_id="s",
        event_time_us=T,
        items=[ImpressionItem(item_id=i, position=p, propensity=0.5, score=1) for p, i in enumerate("abc", 1)],
    )
    found = decode_impressions([slate.SerializeToString(), b"\xff"])
    assert found.batch.strings("event_id") == ["r#1", "r#2", "r#3"]
    assert found.batch.strings("item_id") == list("abc")
    assert found.batch.numpy("event_type").tolist() == [1, 1, 1]
    assert found.row.tolist() == [0, 0, 0]
    assert [r.cause for r in found.rejected] == ["undecodable"]


def test_slates_of_one_request_are_two():
    """The calls of one page may share a request_id: by it the second slate was a repeat of the first."""
    home = Impression(request_id="page", user_id="u", event_time_us=T, items=[ImpressionItem(item_id="a", position=1)])
    slates = [Impression(slate_id=i, **{f.name: v for f, v in home.ListFields()}) for i in ("home", "cart", "cart")]
    found = decode_impressions([s.SerializeToString() for s in slates]).batch
    assert found.strings("event_id") == ["home#1", "cart#1", "cart#1"]
    assert found.strings("request_id") == ["page"] * 3


@pytest.mark.parametrize(
    "slate",
    [
        Impression(request_id="r", user_id="u", event_time_us=T, slate_id="s" * 257),
        Impression(user_id="u", event_time_us=T),
        Impression(request_id="r", event_time_us=T),
        Impression(request_id="r", user_id="u"),
        Impression(request_id="r", user_id="u", event_time_us=T, items=[ImpressionItem(item_id="", position=1)]),
        Impression(request_id="r", user_id="u", event_time_us=T, items=[ImpressionItem(item_id="i", position=0)]),
        Impression(
            request_id="r",
            user_id="u",
            event_time_us=T,
            items=[ImpressionItem(item_id="i", position=1, score=float("nan"))],
        ),
        Impression(request_id="r", user_id="u", event_time_us=T, items=[ImpressionItem(item_id="i", position=1)] * 501),
    ],
)
def test_an_invalid_slate_is_rejected_whole(slate):
    found = decode_impressions([slate.SerializeToString()])
    assert [r.cause for r in found.rejected] == ["invalid"]
    assert not len(found.batch)


def test_nothing_decodes_to_nothing():
    assert len(decode_events([]).batch) == 0
    assert len(from_messages([]).batch) == 0


def test_parsed_messages_are_taken_as_they_are():
    found = from_messages([action(), action(event_id="")])
    assert found.batch.numpy("kind").tolist() == [EventKind.ACTION]
    assert [r.row for r in found.rejected] == [1]
