"""The reader by column takes what the protobuf library takes, and nothing that the rules refuse."""

from double11.v1.event_pb2 import Action, Event, StockChange
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.core import EventBatch
from streaming.codec import _decode, _event_rows, decode_events
from streaming.wire import decode_actions

_TEXT = st.text(max_size=12)
_I64 = st.sampled_from([0, 1, 127, 128, 1_600_000_000_000_000, -1, 2**62]) | st.integers(-(2**63), 2**63 - 1)
_I32 = st.sampled_from([0, 1, 300, -1]) | st.integers(-(2**31), 2**31 - 1)
_TIME = st.integers(1, 4 * 10**15) | _I64


@st.composite
def messages(draw):
    event = Event(event_id=draw(_TEXT), event_time_us=draw(_TIME), known_at_us=draw(st.just(0) | _TIME))
    event.stress = draw(st.booleans())
    if draw(st.integers(0, 9)) == 0:
        event.stock.CopyFrom(StockChange(item_id=draw(_TEXT), stock_units=draw(_I64)))
        return event.SerializeToString()
    body = Action(type=draw(st.integers(0, 7)), user_id=draw(_TEXT), item_id=draw(_TEXT))
    body.session_id, body.request_id = draw(_TEXT), draw(_TEXT)
    if draw(st.booleans()):
        body.position, body.propensity = draw(_I32), draw(st.floats(width=32))
    if draw(st.booleans()):
        body.price_minor, body.quantity = draw(_I64), draw(_I32)
    event.action.CopyFrom(body)
    value = bytearray(event.SerializeToString())
    damage = draw(st.integers(0, 5))
    if damage == 0 and value:
        value[draw(st.integers(0, len(value) - 1))] = draw(st.integers(0, 255))
    if damage == 1:
        del value[draw(st.integers(0, len(value))) :]
    if damage == 2:
        value += draw(st.binary(max_size=6))
    return bytes(value)


@settings(max_examples=400, deadline=None)
@given(st.lists(messages() | st.binary(max_size=40), max_size=12))
def test_equals_the_library_message_by_message(values):
    fast, slow = decode_events(values), _decode(values, (), Event.FromString, _event_rows)
    assert fast.row.tolist() == slow.row.tolist()
    assert fast.batch.table.equals(slow.batch.table)
    assert sorted(fast.rejected, key=lambda r: r.row) == slow.rejected


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
