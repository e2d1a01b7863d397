"""A gateway whose catalogue is on a broker that dies and comes back: it answers all the while, keeps out what was sold
out, says that it is behind, and then goes on: what sells out afterwards is out again.
"""

import asyncio
import os
import shutil
import time

from double11.v1.event_pb2 import Event, StockChange
from kafka_broker import HOME, settings
from serving_world import TOML, Gateway, toml_of

from recsys.core.config import Config
from recsys.serving import ClientConfig, RecommendClient
from streaming.log import open_log
from streaming.topics import Topics

GIVEN_UP_S = 240.0
QUICK = "\n[serving.catalog]\nlag_s_max = 1.0\nwatch_s = 0.2\nbackoff_s_max = 0.5\n"

if HOME and not os.environ.get("DOUBLE11_KAFKA"):

    async def test_a_follower_outlives_its_broker(mortal_kafka, live_home, run, shoppers, tmp_path):
        shutil.copytree(live_home, tmp_path / "home")
        environ = settings("confluent", delivery_timeout_ms=240_000)
        config, url = Config(environ=environ), f"kafka://{mortal_kafka.address}"
        args = ("--no-writer", "--arm", "popular", "--log", url)
        with Gateway(tmp_path / "home", run.root, *args, toml=TOML + QUICK + toml_of(environ)) as gateway:
            async with RecommendClient(gateway.target, ClientConfig(throttle_ratio=0)) as client:

                async def slate_when(wanted):
                    """Asks on until it holds of (ids, fallbacks); every slate is full, and free of what is out."""
                    until_s = time.monotonic() + GIVEN_UP_S
                    while True:
                        slate = await client.recommend(shoppers[0], deadline_ms=5_000)
                        ids = [i.item_id for i in slate.items]
                        assert len(set(ids)) == 10
                        assert not out & set(ids)
                        if wanted(ids, slate.fallbacks):
                            return ids
                        assert time.monotonic() < until_s, (ids, slate.fallbacks)
                        await asyncio.sleep(0.02)

                out: set[str] = set()
                first, second, *_ = await slate_when(lambda _, fallbacks: "catalog:behind" not in fallbacks)
                await asyncio.to_thread(sell_out, url, config, first)
                await slate_when(lambda ids, _: first not in ids)
                out.add(first)
                mortal_kafka.kill()
                await slate_when(lambda _, fallbacks: "catalog:behind" in fallbacks)
                await asyncio.to_thread(mortal_kafka.start)
                await slate_when(lambda _, fallbacks: "catalog:behind" not in fallbacks)
                await asyncio.to_thread(sell_out, url, config, second)
                await slate_when(lambda ids, _: second not in ids)


def sell_out(url: str, config: Config, item: str) -> None:
    """Durable on return."""
    now_us = time.time_ns() // 1_000
    event = Event(event_id=f"{item}-{now_us}", event_time_us=now_us, stock=StockChange(item_id=item, stock_units=0))
    with open_log(url, config) as log:
        producer = log.producer()
        producer.send(config.get(Topics).catalog, item.encode(), event.SerializeToString(), {"schema": b"1"})
        producer.close()
