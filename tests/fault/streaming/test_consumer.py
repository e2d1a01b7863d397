"""`double11 ingest` killed, stopped and fed with everything producers do wrong: the state is what the oracle says."""

import random
import time
from collections import Counter
from pathlib import Path

import polars as pl
import pytest
from oracle import Oracle
from streaming_traffic import MEBIBYTE, Sent, T, judged, padded, record, traffic
from streaming_world import Ingest, World, check, check_command, seeds

from streaming.archive.files import found, split

EVENTS = 3_000
LAG_S_MAX = 240  # it is measured every few seconds
Seen = list[tuple[str, bool]]


def archived(folder: Path) -> Seen:
    whole, _ = split(found(folder, "events"))  # what has been merged into others stays for a while
    columns = pl.read_parquet(whole, hive_partitioning=False, columns=["event_id", "late"])
    return sorted(row for row in columns.rows() if not row[0].startswith("f"))


def to_archive(expected: Oracle) -> Seen:
    found = [(i, False) for i in expected.accepted] + [(i, True) for i in expected.late]
    return sorted(row for row in found if not row[0].startswith("f"))


def lag(process: Ingest) -> float:
    """Records behind, of all topics and partitions."""
    return process.metrics().get("double11_lag_records", Counter()).total()


async def kill_and_check(world: World, archive: Path, seed: int, sent: list[Sent], kills: int) -> None:
    """Kill the consumer that many times, let it finish, compare."""
    expected, rng = judged(sent), random.Random(seed)
    each = len(sent) // (kills + 2)
    world.send(sent[:each])
    for kill in range(kills):
        # However far the last one came before it died, this one finds enough to do.
        world.send(sent[(kill + 1) * each : (kill + 2) * each])
        with world.ingest("--archive", archive) as process:
            assert process.until(rng.randint(1, each)), f"seed {seed}: caught up after {kill} kills"
            time.sleep(rng.random() * 0.05)  # anywhere inside the next steps
            process.kill()
    world.send(sent[(kills + 1) * each :])
    world.catch_up("--archive", archive)
    await check(world, expected, f"seed {seed}")
    assert world.letters() == expected.causes
    assert archived(archive) == to_archive(expected)


@pytest.mark.parametrize("seed", seeds([11]))
async def test_killed_anywhere_nothing_is_lost_or_doubled(world, tmp_path, seed):
    await kill_and_check(world, tmp_path / "archive", seed, traffic(seed, EVENTS), 6)


@pytest.mark.slow
@pytest.mark.timeout(1_200)
@pytest.mark.parametrize("seed", seeds([], fresh=1))
async def test_killed_at_thirty_points_nothing_is_lost_or_doubled(world, tmp_path, seed):
    await kill_and_check(world, tmp_path / "archive", seed, traffic(seed, 5 * EVENTS), 30)


@pytest.mark.parametrize("seed", seeds([5]))
async def test_whatever_producers_send_the_state_is_right_and_all_of_it_is_counted(world, tmp_path, seed):
    sent = [s for s in traffic(seed, EVENTS) if s.event is None or not s.event.get("user", "").startswith("f")]
    wide = {"kind": "action", "id": "wide", "time": T, "type": 5, "user": "u1", "item": "i1", "price": 7}
    sent.insert(1_500, padded(record(wide), MEBIBYTE))
    if world.log.startswith("kafka:"):  # an embedded log takes no larger value
        sent.insert(1_000, padded(record(wide | {"id": "wider"}), MEBIBYTE + 1))
    expected = judged(sent)
    world.send(sent)
    everything, behind = expected.counts.total() + expected.causes.total(), 0.0
    with world.ingest("--archive", tmp_path / "archive") as process:
        while process.handled() < everything:
            assert process.is_running
            behind = max(behind, lag(process))
        deadline_s = time.monotonic() + LAG_S_MAX
        while lag(process):
            assert time.monotonic() < deadline_s
            time.sleep(0.1)
        counted = process.metrics()
        report = process.stop()
    assert behind > 0
    assert counted["double11_events"] == Counter(report["events"]) == expected.counts
    assert counted["double11_dead_letters"] == Counter(report["dead_letters"]) == expected.causes == world.letters()
    await check(world, expected, f"seed {seed}")
    check_command(world, expected, "u2", ["i3", "i4"])
    assert archived(tmp_path / "archive") == to_archive(expected)


async def test_sigterm_finishes_the_step_and_the_next_run_goes_on(world):
    sent = traffic(7, EVENTS)
    expected = judged(sent)
    world.send(sent)
    with world.ingest() as process:
        assert process.until(200)
        first = process.stop()
    rest = world.catch_up()
    assert first["records"] + rest["records"] == len(sent)
    await check(world, expected)


def test_a_wrong_path_makes_no_log_and_no_store(tmp_path):
    world = World(f"embedded:{tmp_path / 'nowhere'}", f"embedded:{tmp_path / 'either'}", {})
    for command in (
        ("ingest", "--source", world.log, "--store", world.store),
        ("dead-letter", "list", "--log", world.log),
    ):
        answer = world.double11(*command, code=2)["error"]
        assert answer["fix"] == f"Create it: double11 streaming init --log {world.log}"
    answer = world.double11("features", "get", "--store", world.store, "--user", "u", code=2)["error"]
    assert "double11 ingest" in answer["fix"]
    assert not list(tmp_path.iterdir())
