"""What EventService has acknowledged is on the log, although the broker was killed meanwhile."""

import asyncio
import contextlib
import os
import time

import grpc
from double11.v1 import event_pb2 as pb
from double11.v1 import event_pb2_grpc as pb_grpc
from kafka_broker import HOME

from recsys.serving.config import PublishConfig, ServingConfig
from recsys.serving.event_service import EventService
from recsys.serving.log_writer import LogWriter
from recsys.serving.server import Server
from streaming.codec import decode_events
from streaming.config import StreamingConfig, Topics
from streaming.log import open_log
from streaming.log.base import read_all

BEFORE, AFTER = 40, 40

if HOME and not os.environ.get("DOUBLE11_KAFKA"):

    async def test_acknowledged_events_survive_a_broker_killed_between(mortal_kafka, kafka_config):
        broker = mortal_kafka
        config, _ = kafka_config("confluent")
        topics = config.get(Topics)
        partitions = StreamingConfig(partitions=2).partitions_by_topic(topics)
        with open_log(f"kafka://{broker.address}", config) as log:
            await asyncio.to_thread(log.create_topics, partitions)
            writer, server = LogWriter(log.producer(), 8 << 20), Server(1.0)
            serving = ServingConfig(deadline_ms_max=60_000)
            service = EventService(writer, topics, partitions, serving, PublishConfig())
            pb_grpc.add_EventServiceServicer_to_server(service, server.grpc)
            port = await server.start("127.0.0.1:0", [])
            acknowledged: list[str] = []
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                stub = pb_grpc.EventServiceStub(channel)

                async def publish(until):
                    while len(acknowledged) < until:
                        action = pb.Action(type=pb.ACTION_TYPE_VIEW, user_id=f"u{len(acknowledged)}", item_id="i")
                        now_us = time.time_ns() // 1_000
                        event = pb.Event(event_id=f"e{now_us}", event_time_us=now_us, action=action)
                        with contextlib.suppress(grpc.aio.AioRpcError):  # not acknowledged: stored or not
                            answer = await stub.Publish(pb.PublishRequest(events=[event]), timeout=60)
                            acknowledged.extend([event.event_id] * answer.accepted)

                await publish(BEFORE)
                going_on = asyncio.create_task(publish(BEFORE + AFTER))
                await asyncio.sleep(0)
                broker.kill()
                during = len(acknowledged)
                await asyncio.to_thread(broker.start)
                await going_on
            await server.drain()
            assert await asyncio.to_thread(writer.close, 20.0)
            values = [v for batch in read_all(log, topics.events) for v in batch.values]
            stored = decode_events(values).batch.strings("event_id")
        assert during < len(acknowledged) == BEFORE + AFTER
        assert set(acknowledged) <= set(stored)
        assert len(stored) == len(set(stored))  # an idempotent producer: nothing twice
