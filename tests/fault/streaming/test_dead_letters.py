"""Ten thousand dead letters sent back by a process that is killed: none is lost, none counts twice."""

import os
import subprocess
import time

import pytest
from streaming_traffic import judged, record
from streaming_world import COMMAND, World, check

from streaming.log import open_log, topics_at

LETTERS = 10_000
LAST = ["kafka-redis" if os.environ.get("DOUBLE11_KAFKA_HOME") else "redis"]


def events_in_log(world: World) -> int:
    with open_log(world.log, world.config) as log:
        return sum(log.end_offsets(topics_at(world.log, world.config).events).values())


@pytest.mark.parametrize("world", LAST, indirect=True)
async def test_killed_while_it_requeues_ten_thousand(world):
    ahead_us = int(time.time() * 1e6) + 3_600_000_000
    sent = [
        record(
            {
                "kind": "action",
                "id": f"e{i}",
                "time": ahead_us + i,
                "type": 2,
                "user": f"u{i % 60}",
                "item": f"i{i % 41}",
            }
            | {"price": i % 900}
        )
        for i in range(LETTERS)
    ]
    world.send(sent)
    large = {"batch_records_max": 5_000}
    with world.ingest("--until-caught-up", **large) as process:
        assert process.report()["dead_letters"] == {"future": LETTERS}
    argv = [*COMMAND, "dead-letter", "requeue", "--log", world.log, "--cause", "future", "--json"]
    victim = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | world.environ)
    while events_in_log(world) == LETTERS and victim.poll() is None:
        pass
    victim.kill()
    victim.communicate()
    done = world.double11("dead-letter", "requeue", "--log", world.log, "--cause", "future")
    assert done["requeued"] + done["requeued_earlier"] == LETTERS
    assert world.double11("dead-letter", "requeue", "--log", world.log)["requeued"] == 0
    print("sent back again after the kill:", done["requeued"])
    with world.ingest("--until-caught-up", future_skew_max_s=86_400, **large) as process:
        report = process.report()
    assert report["events"]["applied"] == LETTERS
    assert report["events"].get("duplicate", 0) <= 1_000  # of the batch that had no mark yet
    await check(world, judged(sent))
    listed = world.double11("dead-letter", "list", "--log", world.log, "--limit", 5)
    assert len(listed["dead_letters"]) == 5
    assert (listed["waiting"], listed["requeued"]) == ({}, {"future": LETTERS})
