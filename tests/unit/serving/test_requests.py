"""Every limit of recommend.proto, from both sides."""

import pytest
from double11.v1 import recommend_pb2 as pb

from recsys.core import BadInput, keys
from recsys.serving.remote import remote_filter, where_of
from recsys.serving.requests import to_query


def request(**fields):
    return pb.RecommendRequest(**{"user_id": "u1", **fields})


def test_defaults_are_filled_in():
    query = to_query(request(), as_of_us=7)
    assert (query.limit, query.priority, query.as_of_us) == (10, 5, 7)
    assert query.request_id


def test_a_filter_is_carried_over():
    asked = pb.ItemFilter(
        categories=["c", "c"], brands=["b"], deny_categories=["d"], deny_brands=["e"], price_min_minor=0,
        price_max_minor=9, allow_item_ids=["y", "x", "y"],
    )  # fmt: skip
    where = to_query(request(filter=asked), as_of_us=7).where
    assert (where.categories, where.brands) == (frozenset("c"), frozenset("b"))
    assert (where.deny_categories, where.deny_brands) == (frozenset("d"), frozenset("e"))
    assert (where.price_min_minor, where.price_max_minor) == (0, 9)
    assert where.allow.tolist() == keys(["y", "x"]).tolist()  # the order of the request, each once
    assert where_of(remote_filter(where)).predicate == where.predicate
    assert not to_query(request(filter=pb.ItemFilter()), as_of_us=7).where.restricts
    assert not to_query(request(), as_of_us=7).where.restricts


def test_everything_is_carried_over():
    context = pb.Context(query_text="茶", current_item_id="i1", cart_item_ids=["i2"])
    query = to_query(
        request(
            session_id="s", surface="home", context=context, limit=500, exclude_item_ids=["x", "x"], priority=0,
            stress=True, new_only=True, request_id="r",
        ),
        as_of_us=7,
    )  # fmt: skip
    assert (query.session_id, query.surface, query.limit, query.priority) == ("s", "home", 500, 0)
    assert (query.query_text, query.current_item, query.cart) == ("茶", "i1", ("i2",))
    assert (query.exclude, query.stress, query.new_only, query.request_id) == (frozenset({"x"}), True, True, "r")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"user_id": ""}, r"user_id: got 0 bytes; expected 1 to 256"),
        ({"user_id": "é" * 129}, r"user_id: got 258 bytes"),
        ({"limit": -1}, r"limit: got -1; expected 0 to 500"),
        ({"limit": 501}, r"limit: got 501"),
        ({"limit": 2**31 - 1}, r"limit: got 2147483647"),
        ({"priority": 10}, r"priority: got 10; expected 0 to 9"),
        ({"priority": -1}, r"priority: got -1"),
        ({"surface": "x" * 65}, r"surface: got 65 bytes"),
        ({"session_id": "x" * 257}, r"session_id: got 257 bytes"),
        ({"request_id": "x" * 129}, r"request_id: got 129 bytes"),
        ({"exclude_item_ids": ["x"] * 1001}, r"exclude_item_ids \(count\): got 1001"),
        ({"exclude_item_ids": ["a", ""]}, r"exclude_item_ids\[1\]: got 0 bytes"),
        ({"context": pb.Context(query_text="x" * 513)}, r"query_text: got 513 bytes"),
        ({"context": pb.Context(cart_item_ids=["x"] * 201)}, r"cart_item_ids \(count\): got 201"),
        ({"context": pb.Context(current_item_id="x" * 257)}, r"current_item_id: got 257 bytes"),
        ({"filter": pb.ItemFilter(categories=["x"] * 101)}, r"filter.categories \(count\): got 101; expected 0 to 100"),
        ({"filter": pb.ItemFilter(deny_brands=[""])}, r"filter.deny_brands\[0\]: got 0 bytes"),
        ({"filter": pb.ItemFilter(allow_item_ids=["x"] * 10_001)}, r"allow_item_ids \(count\): got 10001"),
        ({"filter": pb.ItemFilter(price_min_minor=-1)}, r"price_min_minor: got -1"),
        ({"filter": pb.ItemFilter(price_min_minor=5, price_max_minor=4)}, r"price_max_minor: got 4; expected 5 to"),
    ],
)
def test_out_of_limits_is_refused_with_what_came_and_what_was_expected(fields, message):
    with pytest.raises(BadInput, match=message):
        to_query(request(**fields), as_of_us=7)
