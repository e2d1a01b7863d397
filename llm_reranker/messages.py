"""RerankRequest to and from protobuf, with the limits of rerank.proto. Shape legend: N candidates, F features."""

from __future__ import annotations

import numpy as np
from double11.v1 import rerank_pb2 as pb

from llm_reranker.base import HistoryItem, RerankRequest, RerankResult
from llm_reranker.prompt import TEXT_BYTES_MAX, clip
from recsys.core.errors import BadInput

QUERY_BYTES_MAX = 512
CANDIDATES_MAX = 1000


def to_proto(request: RerankRequest) -> pb.RerankRequest:
    """The message; texts are cut to the limits, as the prompt would cut them."""
    message = pb.RerankRequest(
        request_id=request.request_id, query_text=clip(request.query_text, QUERY_BYTES_MAX), as_of_us=request.as_of_us
    )
    for h in request.history:
        message.history.add(
            item_id=h.item_id, text=clip(h.text), action_type=h.event_type, event_time_us=h.event_time_us
        )
    for item_id, text, row in zip(request.item_ids, request.texts, request.features.tolist(), strict=True):
        message.candidates.add(item_id=item_id, text=clip(text), features=row)
    return message


def from_proto(message: pb.RerankRequest, num_features: int) -> RerankRequest:
    """The request. Raises: BadInput for a field outside its limits."""
    check_count(len(message.candidates))
    texts = [h.text for h in message.history] + [c.text for c in message.candidates]
    for what, text, bytes_max in (
        ("query_text", message.query_text, QUERY_BYTES_MAX), *(("text", t, TEXT_BYTES_MAX) for t in texts)
    ):  # fmt: skip
        if len(text) * 4 > bytes_max and (size := len(text.encode())) > bytes_max:
            raise BadInput(
                f"RerankRequest, {what}", came=f"{size} bytes", expected=f"at most {bytes_max}", fix="Truncate it."
            )
    widths = {len(c.features) for c in message.candidates} - {num_features}
    if widths:
        raise BadInput(
            "RerankCandidate.features", came=f"{sorted(widths)} numbers", expected=f"{num_features}",
            fix="Fill the features that double11.json names, NaN where missing.",
        )  # fmt: skip
    features = np.array([list(c.features) for c in message.candidates], np.float32)
    return RerankRequest(
        request_id=message.request_id,
        as_of_us=message.as_of_us,
        history=[
            HistoryItem(item_id=h.item_id, text=h.text, event_type=h.action_type, event_time_us=h.event_time_us)
            for h in message.history
        ],
        item_ids=[c.item_id for c in message.candidates],
        texts=[c.text for c in message.candidates],
        features=features.reshape(len(message.candidates), num_features),
        query_text=message.query_text,
    )


def check_count(candidates: int) -> None:
    """Raise BadInput for more candidates than a request may have."""
    if candidates > CANDIDATES_MAX:
        raise BadInput(
            "rerank candidates", came=candidates, expected=f"0 to {CANDIDATES_MAX}", fix="Send the ranker's best."
        )


def result_to_proto(request_id: str, result: RerankResult) -> pb.RerankResponse:
    """The response message."""
    return pb.RerankResponse(
        request_id=request_id,
        scores=result.scores.tolist(),
        depth=result.depth,
        version=result.version,
        queue_ms=result.queue_ms,
        compute_ms=result.compute_ms,
        cached_prefix_tokens=result.cached_prefix_tokens,
    )


def result_from_proto(message: pb.RerankResponse) -> RerankResult:
    """The result."""
    return RerankResult(
        scores=np.array(message.scores, np.float32),
        depth=message.depth,
        version=message.version,
        queue_ms=message.queue_ms,
        compute_ms=message.compute_ms,
        cached_prefix_tokens=message.cached_prefix_tokens,
    )
