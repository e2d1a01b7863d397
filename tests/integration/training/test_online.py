"""Online training in this process: what is trained, what is published, and what a restart makes of it."""

import json
import threading
from contextlib import closing

import numpy as np
import online_world as world
import pytest
from double11.v1 import delta_pb2
from redis_world import redis_server

from feature_store.materialize import materialize
from feature_store.online import open_reader, open_store
from recsys.candidates import trending
from recsys.candidates.ranked_list import EVERYBODY
from recsys.core import Conflict, CorruptData, VersionMismatch, WallClock, key
from recsys.core.metrics import TRAINING_SAMPLES
from recsys.models.delta import target_of
from recsys.models.ranker import Ranker
from recsys.models.tower import Tower
from recsys.training.config import OnlineConfig
from recsys.training.online.trainer import OnlineTrainer
from streaming.log import open_log
from streaming.log.base import read_all

__all__ = ["redis_server"]
CONFIG = OnlineConfig(interval_s=0.05, batch=16, negatives_min=16, samples_max=40, idle_ms=1, whole_commits=3)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return world.make_run(tmp_path_factory.mktemp("online"))


@pytest.fixture(scope="module")
def store(made):
    run, dataset = made
    return world.make_store(dataset, run.until_us)


@pytest.fixture
def url(tmp_path):
    url = f"embedded:{tmp_path / 'home'}"
    world.make_log(url)
    return url


def trained(run, url, store, state, config=CONFIG):
    """One trainer's life: until caught up. Returns its deltas and its last sequence."""
    with open_log(url) as log:
        trainer = OnlineTrainer(run, log, world.TOPICS, store, state, config, WallClock())
        try:
            return trainer.run(lambda: False, until_caught_up=True), trainer.sequence
        finally:
            trainer.close()


def deltas(url):
    with open_log(url) as log:
        return [value for batch in read_all(log, world.TOPICS.deltas) for value in batch.values]


def rows_made(url, index):
    """Keys of an index's rows that were published."""
    rows = (rows for value in deltas(url) for rows in delta_pb2.Delta.FromString(value).index_rows)
    return {key for some in rows if some.index == index for key in some.keys}


def server(run):
    """The models a worker has, and what deltas change in them."""
    tower, ranker = Tower.load(run), Ranker.load(run)
    return tower, target_of(run.run_id, tower, ranker)


def followed(run, url):
    tower, target = server(run)
    for value in deltas(url):
        target.offer(value)
    return tower, target


def test_samples_become_deltas_that_move_the_items_acted_on(made, store, url, tmp_path):
    run, dataset = made
    some = list(world.samples(dataset, run, 100))
    world.send(url, some)
    published, sequence = trained(run, url, store, tmp_path / "state")
    assert published == sequence >= 2  # at most 40 samples each
    before, _ = server(run)
    after, target = followed(run, url)
    assert (target.sequence, target.samples_until_us) == (sequence, max(s.event_time_us for s in some))
    acted = {key(s.item_id) for s in some if s.action_types} & set(before.items.vocabulary.keys.tolist())
    weight = "tables.embeddings.item.weight"
    moved = (before.net.state_dict()[weight] != after.net.state_dict()[weight]).any(dim=1).numpy()
    places = before.items.vocabulary.rows(np.array(sorted(acted)))
    assert moved[places].all()
    assert not moved[0]
    assert acted <= rows_made(url, "swing")  # and what else their shoppers have
    assert trending.EVERYWHERE in rows_made(url, "trending")
    assert rows_made(url, "popular") == {EVERYBODY}
    for name, tensor in after.net.state_dict().items():
        fixed = name.startswith(("item.", "tables.embeddings.category", "tables.embeddings.brand"))
        assert not fixed or (tensor == before.net.state_dict()[name]).all(), name


def test_a_record_that_is_no_delta_ends_no_trainer(made, store, url, tmp_path):
    run, dataset = made
    with open_log(url) as log, closing(log.producer()) as producer:
        producer.send(world.TOPICS.deltas, run.run_id.encode(), b"\xff\xff")
    world.send(url, list(world.samples(dataset, run, 40)))
    published, sequence = trained(run, url, store, tmp_path / "state")
    assert published == sequence >= 1


def test_restarts_change_nothing_in_what_is_published(made, store, url, tmp_path):
    run, dataset = made
    again = f"embedded:{tmp_path / 'again'}"
    world.make_log(again)
    some = list(world.samples(dataset, run, 240))
    with open_log(url) as log:
        trainer = OnlineTrainer(run, log, world.TOPICS, store, tmp_path / "state", CONFIG, WallClock())
        for start in range(0, 240, 40):
            for at in (url, again):
                world.send(at, some[start : start + 40])
            trainer.run(lambda: False, until_caught_up=True)
            trained(run, again, store, tmp_path / "restarted")  # a life for each 40; some whole commits among them
        trainer.close()
    assert followed(run, url)[1].sequence == 6
    assert deltas(again) == deltas(url)
    assert len(list((tmp_path / "restarted").glob("commit-*"))) <= CONFIG.whole_commits


def test_reads_of_all_steps_share_their_connections(made, url, tmp_path, redis_server):
    run, dataset = made
    world.send(url, world.samples(dataset, run, 400))
    with open_log(url) as log:
        features = open_reader(redis_server.url)
        opened = redis_server.client.info("stats")["total_connections_received"]
        trainer = OnlineTrainer(run, log, world.TOPICS, features, tmp_path / "state", CONFIG, WallClock())
        assert trainer.run(lambda: False, until_caught_up=True) >= 10  # some steps each
        # One for reads, one to look whether the store was rebuilt, and that of this question.
        assert redis_server.client.info("stats")["total_connections_received"] - opened <= 3
        features.close()  # while its event loop can still run
        trainer.close()


@pytest.fixture
def mortal_redis(made, redis_server):
    """A Redis that knows the users and comes back as it was."""
    run, dataset = made
    redis_server.client.config_set("appendfsync", "always")
    with closing(open_store(redis_server.url)) as store:
        materialize(dataset.event_batches(before_us=run.until_us), store)
    return redis_server


def test_a_store_that_is_away_is_waited_for_and_changes_nothing(made, mortal_redis, url, tmp_path):
    run, dataset = made
    again = f"embedded:{tmp_path / 'again'}"
    world.make_log(again)
    for at in (url, again):
        world.send(at, world.samples(dataset, run, 120))
    with closing(open_reader(mortal_redis.url)) as features:
        trained(run, url, features, tmp_path / "state")
        mortal_redis.kill()
        back = threading.Timer(2.0, mortal_redis.start)
        back.start()
        trained(run, again, features, tmp_path / "waited")
        back.join()
    assert deltas(again) == deltas(url) != []


def test_who_waits_for_a_store_can_be_stopped(made, mortal_redis, url, tmp_path):
    run, dataset = made
    world.send(url, world.samples(dataset, run, 40))
    with closing(open_reader(mortal_redis.url)) as features, open_log(url) as log:
        mortal_redis.kill()
        trainer = OnlineTrainer(run, log, world.TOPICS, features, tmp_path / "state", CONFIG, WallClock())
        stop = threading.Event()
        threading.Timer(0.5, stop.set).start()
        assert trainer.run(stop.is_set) == 0
        trainer.close()
        mortal_redis.start()
        assert trained(run, url, features, tmp_path / "state") == (1, 1)


def test_a_delta_that_was_not_published_is_published_by_whoever_restarts(made, store, url, tmp_path):
    run, dataset = made
    world.send(url, world.samples(dataset, run, 40))
    assert trained(run, url, store, tmp_path / "state") == (1, 1)
    lost = f"embedded:{tmp_path / 'lost'}"
    world.make_log(lost)
    world.send(lost, world.samples(dataset, run, 40))
    trained(run, lost, store, tmp_path / "state")  # killed after the commit: the log has no delta
    assert deltas(lost) == deltas(url)
    trained(run, lost, store, tmp_path / "state")
    assert deltas(lost) == deltas(url)  # and it is not doubled


def test_a_log_without_a_sample_is_said_with_what_makes_them(made, store, url, tmp_path, capsys):
    run, dataset = made
    assert trained(run, url, store, tmp_path / "state") == (0, 0)
    assert "no_samples_yet" in (said := "".join(capsys.readouterr()))
    assert "--offline" in said
    world.send(url, world.samples(dataset, run, 40))
    trained(run, url, store, tmp_path / "state")
    assert "no_samples_yet" not in "".join(capsys.readouterr())


def test_repeats_and_samples_without_actions_train_nothing(made, store, url, tmp_path):
    run, dataset = made
    some = list(world.samples(dataset, run, 40))
    world.send(url, some)
    trained(run, url, store, tmp_path / "state")
    before = TRAINING_SAMPLES.labels(outcome="repeat")._value.get()
    world.send(url, some)
    assert trained(run, url, store, tmp_path / "state") == (0, 1)
    assert TRAINING_SAMPLES.labels(outcome="repeat")._value.get() - before == 20


def test_garbage_on_the_topic_is_counted_and_passed(made, store, url, tmp_path):
    run, dataset = made
    before = TRAINING_SAMPLES.labels(outcome="undecodable")._value.get()
    with open_log(url) as log:
        producer = log.producer()
        producer.send(world.TOPICS.samples, b"u", b"\xff\xff")
        producer.close()
    world.send(url, world.samples(dataset, run, 40))
    assert trained(run, url, store, tmp_path / "state")[0] >= 1
    assert TRAINING_SAMPLES.labels(outcome="undecodable")._value.get() - before == 1


def test_a_loss_that_is_no_number_stops_with_the_batch_saved_and_nothing_published(made, store, url, tmp_path):
    run, dataset = made
    world.send(url, world.samples(dataset, run, 40))
    config = OnlineConfig(interval_s=0.05, batch=4, negatives_min=16, idle_ms=1, learning_rate=1.0)
    with open_log(url) as log:
        trainer = OnlineTrainer(run, log, world.TOPICS, store, tmp_path / "state", config, WallClock())
        trainer._tower._net.query.weight.data.fill_(float("nan"))
        with pytest.raises(CorruptData, match="bad-batch"):
            trainer.run(lambda: False, until_caught_up=True)
        trainer.close()
    assert list((tmp_path / "state").glob("online-bad-batch-*.safetensors"))
    assert not deltas(url)


def test_a_state_of_another_run_another_trainer_and_broken_files_are_refused(made, store, url, tmp_path):
    run, dataset = made
    state = tmp_path / "state"
    world.send(url, world.samples(dataset, run, 40))
    trained(run, url, store, state)
    with open_log(url) as log:
        first = OnlineTrainer(run, log, world.TOPICS, store, state, CONFIG, WallClock())
        with pytest.raises(Conflict, match="another trainer"):
            OnlineTrainer(run, log, world.TOPICS, store, state, CONFIG, WallClock())
        first.close()
        with pytest.raises(Conflict, match="delta 1 of another trainer"):
            OnlineTrainer(run, log, world.TOPICS, store, tmp_path / "fresh", CONFIG, WallClock())
    manifest = json.loads((run.root / "manifest.json").read_text())
    other = type(run)(run.root, manifest | {"run_id": "other"})
    with pytest.raises(VersionMismatch, match=r"run .*--state"):
        trained(other, url, store, state)
    (commit,) = state.glob("commit-*")
    commit.write_bytes(b"\x80\x04cbuiltins\nexit\n(tR.")
    with pytest.raises(CorruptData, match="Restore"):
        trained(run, url, store, state)


def test_rows_wait_for_their_turn_and_none_are_made_where_none_are_wanted(made, store, url, tmp_path):
    run, dataset = made
    few = OnlineConfig(interval_s=0.05, samples_max=40, idle_ms=1, index_rows_max=5)
    numbers = []
    for number in range(3):
        world.send(url, world.samples(dataset, run, 40, seed=number))
        trained(run, url, store, tmp_path / "state", few)
        numbers.append(len(rows_made(url, "swing")))
    assert numbers == [5, 10, 15]
    none = f"embedded:{tmp_path / 'none'}"
    world.make_log(none)
    world.send(none, world.samples(dataset, run, 40))
    assert trained(run, none, store, tmp_path / "other", OnlineConfig(index_rows_max=0))[0] == 1
    assert not rows_made(none, "swing") | rows_made(none, "trending") | rows_made(none, "popular")
    world.send(none, world.samples(dataset, run, 40, seed=1))
    trained(run, none, store, tmp_path / "other")  # a state whose commits know nothing of indexes
    assert rows_made(none, "popular") == {EVERYBODY}
