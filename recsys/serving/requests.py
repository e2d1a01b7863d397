"""RecommendRequest to Query, Slate to RecommendResponse: every limit of recommend.proto is checked here."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

import numpy as np
from double11.v1 import recommend_pb2 as pb

from recsys.core import BadInput, Query, Slate, keys
from recsys.core.attributes import EVERYTHING, Where
from recsys.core.ids import ID_BYTES_MAX
from recsys.ranking.catalogue import Catalogue

LIMIT_DEFAULT, LIMIT_MAX = 10, 500
PRIORITY_DEFAULT, PRIORITY_MAX = 5, 9
_EXCLUDE_ITEMS_MAX, _CART_ITEMS_MAX = 1_000, 200
_FILTER_NAMES_MAX, _ALLOW_ITEMS_MAX, _PRICE_MAX = 100, 10_000, (1 << 63) - 1
_SURFACE_BYTES_MAX, _QUERY_BYTES_MAX, _REQUEST_ID_BYTES_MAX = 64, 512, 128


def to_query(request: pb.RecommendRequest, as_of_us: int) -> Query:
    """The checked Query of a request, defaults filled in.

    Raises: BadInput naming the field, what came and its limit.
    """
    _length("user_id", request.user_id, ID_BYTES_MAX, least=1)
    _length("session_id", request.session_id, ID_BYTES_MAX)
    _length("surface", request.surface, _SURFACE_BYTES_MAX)
    _length("request_id", request.request_id, _REQUEST_ID_BYTES_MAX)
    _length("context.query_text", request.context.query_text, _QUERY_BYTES_MAX)
    _length("context.current_item_id", request.context.current_item_id, ID_BYTES_MAX)
    _ids("context.cart_item_ids", request.context.cart_item_ids, _CART_ITEMS_MAX)
    _ids("exclude_item_ids", request.exclude_item_ids, _EXCLUDE_ITEMS_MAX)
    priority = request.priority if request.HasField("priority") else PRIORITY_DEFAULT
    _number("limit", request.limit, 0, LIMIT_MAX, "Ask for a page at a time; 0 means 10.")
    _number("priority", priority, 0, PRIORITY_MAX, "Leave it out for the usual priority, 5.")
    return Query(
        user_id=request.user_id,
        as_of_us=as_of_us,
        limit=request.limit or LIMIT_DEFAULT,
        request_id=request.request_id or uuid.uuid4().hex,
        session_id=request.session_id,
        surface=request.surface,
        query_text=request.context.query_text,
        current_item=request.context.current_item_id,
        cart=tuple(request.context.cart_item_ids),
        exclude=frozenset(request.exclude_item_ids),
        priority=priority,
        stress=request.stress,
        new_only=request.new_only,
        where=_where(request.filter) if request.HasField("filter") else EVERYTHING,
    )


def to_response(slate: Slate, catalogue: Catalogue) -> pb.RecommendResponse:
    """The slate on the wire, with the titles the catalogue knows."""
    titles = catalogue.values("title", np.fromiter((i.item_key for i in slate.items), np.int64, len(slate.items)))
    return pb.RecommendResponse(
        request_id=slate.request_id,
        tier=pb.Tier.ValueType(int(slate.tier)),
        fallbacks=slate.fallbacks,
        versions=dict(slate.versions),
        items=[
            pb.RecommendedItem(
                item_id=item.item_id,
                score=item.score,
                sources=item.sources,
                reason=item.reason,
                propensity=item.propensity,
                stage_scores=dict(item.stage_scores),
                title=title or "",
            )
            for item, title in zip(slate.items, titles, strict=True)
        ],
        timings=[
            pb.StageTiming(
                stage=t.stage,
                start_ms=t.start_ms,
                duration_ms=t.duration_ms,
                outcome=t.outcome,
                items_in=t.items_in,
                items_out=t.items_out,
            )
            for t in slate.timings
        ],
    )


def _where(asked: pb.ItemFilter) -> Where:
    for name in ("categories", "brands", "deny_categories", "deny_brands"):
        _ids(f"filter.{name}", getattr(asked, name), _FILTER_NAMES_MAX, "Filter by fewer.")
    _ids("filter.allow_item_ids", asked.allow_item_ids, _ALLOW_ITEMS_MAX, "Send the ones that matter most.")
    low = asked.price_min_minor if asked.HasField("price_min_minor") else None
    high = asked.price_max_minor if asked.HasField("price_max_minor") else None
    _number("filter.price_min_minor", low or 0, 0, _PRICE_MAX, "Prices are in minor units, at least 0.")
    if high is not None:
        _number("filter.price_max_minor", high, low or 0, _PRICE_MAX, "Its least value is 0, or price_min_minor.")
    return Where(
        categories=frozenset(asked.categories) or None,
        brands=frozenset(asked.brands) or None,
        deny_categories=frozenset(asked.deny_categories),
        deny_brands=frozenset(asked.deny_brands),
        allow=keys(dict.fromkeys(asked.allow_item_ids)) if asked.allow_item_ids else None,
        price_min_minor=low,
        price_max_minor=high,
    )


def _length(name: str, value: str, bytes_max: int, least: int = 0) -> None:
    size = len(value.encode("utf-8"))
    if not least <= size <= bytes_max:
        raise BadInput(
            f"RecommendRequest.{name}",
            came=f"{size} bytes",
            expected=f"{least} to {bytes_max} bytes of UTF-8",
            fix=f"Shorten {name}." if size else f"Set {name}.",
        )


def _ids(name: str, ids: Sequence[str], ids_max: int, fix: str = "Send the most recent ones.") -> None:
    _number(f"{name} (count)", len(ids), 0, ids_max, fix)
    for place, item_id in enumerate(ids):
        _length(f"{name}[{place}]", item_id, ID_BYTES_MAX, least=1)


def _number(name: str, value: int, low: int, high: int, fix: str) -> None:
    if not low <= value <= high:
        raise BadInput(f"RecommendRequest.{name}", came=value, expected=f"{low} to {high}", fix=fix)
