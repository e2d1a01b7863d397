"""The reader by column takes what the protobuf library takes, and nothing that the rules refuse."""

from double11.v1.event_pb2 import Action, Event, PriceChange, StockChange
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.core import EventBatch
from streaming.codec import _decode, _event_rows, decode_events
from streaming.wire import decode_actions, decode_changes

_TEXT = st.text(max_size=12)
_I64 = st.sampled_from([0, 1, 127, 128, 2**40, 2**40 + 1, 1_600_000_000_000_000, -1, 2**62]) | st.integers(
    -(2**63), 2**63 - 1
)
_I32 = st.sampled_from([0, 1, 300, -1]) | st.integers(-(2**31), 2**31 - 1)
_TIME = st.integers(1, 4 * 10**15) | _I64


@st.composite
def messages(draw):
    event = Event(event_id=draw(_TEXT), event_time_us=draw(_TIME), known_at_us=draw(st.just(0) | _TIME))
    event.stress = draw(st.booleans())
    kind = draw(st.integers(0, 5))
    if kind == 0:
        event.stock.CopyFrom(StockChange(item_id=draw(_TEXT), stock_units=draw(_I64)))
        return damaged(draw, event)
    if kind == 1:
        event.price.CopyFrom(PriceChange(item_id=draw(_TEXT), price_minor=draw(_I64)))
        return damaged(draw, event)
    body = Action(type=draw(st.integers(0, 7)), user_id=draw(_TEXT), item_id=draw(_TEXT))
    body.session_id, body.request_id = draw(_TEXT), draw(_TEXT)
    if draw(st.booleans()):
        body.position, body.propensity = draw(_I32), draw(st.floats(width=32))
    if draw(st.booleans()):
        body.price_minor, body.quantity = draw(_I64), draw(_I32)
    event.action.CopyFrom(body)
    return damaged(draw, event)


def damaged(draw, event):
    """The event's bytes, some of them changed, cut or with more behind: a second body for instance."""
    value = bytearray(event.SerializeToString())
    damage = draw(st.integers(0, 5))
    if damage == 0 and value:
        value[draw(st.integers(0, len(value) - 1))] = draw(st.integers(0, 255))
    if damage == 1:
        del value[draw(st.integers(0, len(value))) :]
    if damage == 2:
        value += draw(st.binary(max_size=6) | st.sampled_from([b"\x5a\x00", b"\x62\x00", b"\x52\x00"]))
    return bytes(value)


@settings(max_examples=400, deadline=None)
@given(st.lists(messages() | st.binary(max_size=40), max_size=12))
def test_equals_the_library_message_by_message(values):
    fast, slow = decode_events(values), _decode(values, (), Event.FromString, _event_rows)
    assert fast.row.tolist() == slow.row.tolist()
    assert fast.batch.table.equals(slow.batch.table)
    assert sorted(fast.rejected, key=lambda r: r.row) == slow.rejected


def test_plain_changes_are_all_read_by_column():
    values = [Event(event_id=f"e{i}", event_time_us=1_600_000_000_000_000 + i, stress=i % 3 == 0) for i in range(300)]
    for i, event in enumerate(values):
        if i % 2:
            event.price.CopyFrom(PriceChange(item_id=f"買{i}", price_minor=i - 1))
        else:
            event.stock.CopyFrom(StockChange(item_id=f"買{i}", stock_units=i))
    batch, row = decode_changes([v.SerializeToString() for v in values])
    assert row.tolist() == list(range(300))
    assert batch.table.column("stock").to_pylist()[:4] == [0, None, 2, None]
    assert batch.table.column("price").to_pylist()[:4] == [None, 0, None, 2]
    assert batch.strings("item_id")[7] == "買7"
    assert decode_changes([])[1].tolist() == []


def test_plain_actions_are_all_read_by_column():
    values = [
        Event(
            event_id=f"e{i}",
            event_time_us=1_600_000_000_000_000 + i,
            action=Action(type=1 + i % 6, user_id=f"買{i}", item_id="i", price_minor=i, quantity=1 + i),
        ).SerializeToString()
        for i in range(300)
    ]
    batch, row = decode_actions(values)
    assert row.tolist() == list(range(300))
    assert batch.numpy("price").tolist() == list(range(300))
    assert decode_actions([])[1].tolist() == []
    assert len(EventBatch.empty()) == len(decode_actions([b""])[0])
