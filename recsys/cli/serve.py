"""`double11 serve`: gateway and workers on one host. `double11 recommend`: one slate over the wire, readable."""

from __future__ import annotations

import asyncio
import json
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from recsys.cli.common import config_option, emit, json_option
from recsys.core.config import Config

if TYPE_CHECKING:
    from double11.v1 import recommend_pb2 as pb

    from recsys.serving.gateway import Gateway

_CELL_CHARACTERS_MAX = 48


@click.command()
@click.option("--run", type=click.Path(path_type=Path), help="Run directory (default: the promoted one).")
@click.option("--store", help="Feature store URL (default embedded:$DOUBLE11_HOME or embedded:./.double11).")
@click.option("--log", help="Log URL for events and impressions (default: as --store).")
@click.option("--listen", default="127.0.0.1:50051", show_default=True, help="HOST:PORT; port 0 = any free one.")
@click.option("--arm", default="full", show_default=True, help="Best arm to serve.")
@click.option(
    "--shards", type=click.IntRange(1, 64), default=1, show_default=True, help="Parts that the item index is cut into."
)
@click.option(
    "--workers", type=click.IntRange(1, 64), default=1, show_default=True, help="Scoring processes, of each shard."
)
@click.option(
    "--clock",
    type=click.Choice(["wall", "data"]),
    help="What `now` is; data = the store's newest event [default: [feature_store] clock].",
)
@click.option("--no-reranker", is_flag=True, help="Start no LLM worker: the best tier is rank.")
@click.option("--no-writer", is_flag=True, help="Start no streaming job beside an embedded store.")
@click.option("--plain-text", is_flag=True, help="Listen beyond loopback without TLS: the network is trusted.")
@config_option
def serve(
    run: Path | None,
    store: str | None,
    log: str | None,
    listen: str,
    arm: str,
    shards: int,
    workers: int,
    clock: str | None,
    no_reranker: bool,
    no_writer: bool,
    plain_text: bool,
    config_path: Path | None,
) -> None:
    """Serve a run over gRPC until SIGTERM.

    Prints one JSON line {"ready": true, "port", "admin_port", "run", "tier"} on stdout once it serves.
    """
    from recsys.serving.gateway import Gateway, ServeOptions
    from recsys.training.promote import current_run
    from streaming.log import default_url

    store = store or default_url()
    options = ServeOptions(
        run=run or current_run(),
        store=store,
        log=log or store,
        listen=listen,
        arm=arm,
        shards=shards,
        workers=workers,
        reranker=not no_reranker,
        writer=not no_writer,
        config_path=config_path,
        log_level=click.get_current_context().find_root().params["log_level"],
    )
    flags = {"feature_store.clock": clock, "serving.plain_text_beyond_loopback": plain_text or None}
    asyncio.run(_serve(Gateway(options, Config.load(config_path, flags))))


async def _serve(gateway: Gateway) -> None:
    from recsys.serving.server import stop_signal

    stop = asyncio.create_task(stop_signal().wait())
    starting = asyncio.create_task(_start(gateway))
    try:
        await asyncio.wait({stop, starting}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            await starting  # raises what starting raised
            await stop
    finally:
        starting.cancel()
        stop.cancel()
        await asyncio.gather(starting, stop, return_exceptions=True)
        await gateway.stop()


async def _start(gateway: Gateway) -> None:
    await gateway.start()
    await gateway.wait_ready()
    ready = {
        "ready": True,
        "port": gateway.port,
        "admin_port": gateway.admin_port,
        "run": gateway.run.run_id,
        "tier": gateway.arm.tier.label,
    }
    print(json.dumps(ready), flush=True)


@click.command()
@click.option("--target", default="127.0.0.1:50051", show_default=True, help="HOST:PORT of the gateway.")
@click.option("--user", required=True, help="User id.")
@click.option("--limit", type=int, default=10, show_default=True, help="Items wanted, 1 to 500.")
@click.option("--deadline-ms", type=click.FloatRange(min=0), default=1_000.0, show_default=True)
@click.option(
    "--new-only",
    is_flag=True,
    help="Leave out what the user has acted on before, as far as the newest 1,024 pairs of item and day tell.",
)
@click.option("--category", "categories", multiple=True, help="Only items of this category; may be repeated.")
@click.option("--brand", "brands", multiple=True, help="Only items of this brand; may be repeated.")
@click.option("--price-min", type=click.IntRange(min=0), help="Only items from this price on, in minor units.")
@click.option("--price-max", type=click.IntRange(min=0), help="Only items up to this price, in minor units.")
@config_option
@json_option
def recommend(
    target: str,
    user: str,
    limit: int,
    deadline_ms: float,
    new_only: bool,
    categories: tuple[str, ...],
    brands: tuple[str, ...],
    price_min: int | None,
    price_max: int | None,
    config_path: Path | None,
    as_json: bool,
) -> None:
    """Ask a gateway for one slate and print it with sources, stage latencies and tier."""
    from double11.v1 import recommend_pb2 as pb

    only = pb.ItemFilter(categories=categories, brands=brands, price_min_minor=price_min, price_max_minor=price_max)
    asked = {"user_id": user, "limit": limit, "deadline_ms": deadline_ms, "new_only": new_only, "item_filter": only}
    response = asyncio.run(_recommend(target, Config.load(config_path), asked))
    from google.protobuf.json_format import MessageToDict

    document = MessageToDict(response, preserving_proto_field_name=True)
    emit(document, as_json=as_json, text=lambda: slate_text(response))


async def _recommend(target: str, config: Config, asked: dict[str, Any]) -> pb.RecommendResponse:
    from recsys.serving import RecommendClient
    from recsys.serving.config import ClientConfig

    async with RecommendClient(target, config.get(ClientConfig)) as client:
        return await client.recommend(**asked)


def slate_text(response: pb.RecommendResponse) -> str:
    """A slate as a table: place, score, item, title, reason, sources; then tier, stages and versions."""
    from recsys.core import Tier

    rows = [("#", "score", "item", "title", "reason", "sources")]
    rows += [
        (str(place), f"{i.score:.4f}", _cell(i.item_id), _cell(i.title), i.reason, " ".join(i.sources))
        for place, i in enumerate(response.items, start=1)
    ]
    widths = [max(_width(row[c]) for row in rows) for c in range(len(rows[0]))]
    lines = ["  ".join(c + " " * (w - _width(c)) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    stages = ", ".join(f"{t.stage} {t.duration_ms:.1f}" + _outcome(t.outcome) for t in response.timings)
    lines += [
        "",
        f"tier      {Tier(response.tier).label}"
        + (f" ({', '.join(response.fallbacks)})" if response.fallbacks else ""),
        f"stages ms {stages}",
        "versions  " + ", ".join(f"{part} {v}" for part, v in sorted(response.versions.items())),
        f"request   {response.request_id}",
    ]
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Text from data, short and without anything that a terminal obeys."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text[:_CELL_CHARACTERS_MAX])


def _width(text: str) -> int:
    """Terminal columns: Chinese characters take two."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _outcome(outcome: str) -> str:
    return "" if outcome == "ok" else f" ({outcome})"
