"""Whatever bytes come, a request is refused as BadInput or becomes a query within every limit."""

from double11.v1 import recommend_pb2 as pb
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from recsys.core import BadInput
from recsys.serving.requests import to_query

REQUESTS = st.builds(
    pb.RecommendRequest,
    user_id=st.text(max_size=300),
    session_id=st.text(max_size=300),
    surface=st.text(max_size=80),
    limit=st.integers(-(2**31), 2**31 - 1) | st.integers(-2, 502),
    priority=st.none() | st.integers(-2, 12),
    exclude_item_ids=st.lists(st.text(max_size=20), max_size=30),
    request_id=st.text(max_size=140),
    context=st.builds(
        pb.Context,
        query_text=st.text(max_size=600),
        current_item_id=st.text(max_size=300),
        cart_item_ids=st.lists(st.text(max_size=20), max_size=30),
    ),
)


def within_limits(request):
    try:
        query = to_query(request, 1)
    except BadInput:
        return
    assert 1 <= query.limit <= 500
    assert 0 <= query.priority <= 9
    assert 1 <= len(query.user_id.encode()) <= 256
    assert 1 <= len(query.request_id.encode()) <= 128
    assert all(1 <= len(i.encode()) <= 256 for i in (*query.cart, *query.exclude))


@given(REQUESTS)
def test_any_message(request):
    within_limits(request)


@given(st.binary(max_size=200))
def test_any_bytes(data):
    try:
        request = pb.RecommendRequest.FromString(data)
    except DecodeError:
        return
    within_limits(request)
