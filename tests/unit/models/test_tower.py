import numpy as np
import pytest

from recsys.core import CorruptData, NotFound, RunDirectory, VersionMismatch, keys
from recsys.models.delta import ModelDelta, Rows, encode, target_of
from recsys.models.history import Histories
from recsys.models.ranker import Ranker
from recsys.models.tower import Tower

DAY_US = 86_400_000_000


def _user(tower, ids, as_of_us=10 * DAY_US):
    n = len(ids)
    return tower.encode_user(keys(ids), np.full(n, 5, np.int8), np.arange(n) * DAY_US, as_of_us)


def test_vectors_are_of_length_one_and_of_the_towers_dimension(tower, items):
    item_key, vectors = tower.item_vectors()
    assert item_key.tolist() == items.item_key.tolist()
    assert vectors.shape == (20, tower.dim)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    assert np.linalg.norm(_user(tower, ["i1", "i2"])) == pytest.approx(1, rel=1e-5)


def test_an_empty_history_and_unknown_items_have_a_vector(tower):
    for ids in ([], ["nobody has seen this"]):
        assert np.isfinite(_user(tower, ids)).all()


def test_items_without_events_are_told_apart_by_category_alone(tower, items):
    vectors = dict(zip(*[a.tolist() for a in tower.item_vectors()], strict=True))
    untrained = items.item_key[15:]
    category = dict(zip(untrained.tolist(), items.values("category", untrained), strict=True))
    for a in category:
        for b in category:
            same = np.allclose(vectors[a], vectors[b])
            assert same == (category[a] == category[b])


def test_a_batch_gives_what_each_history_alone_gives(tower):
    lists = [["i1", "i2", "i3"], [], ["i4"]]
    batch = Histories.from_lists(
        [keys(x) for x in lists],
        [np.full(len(x), 5, np.int8) for x in lists],
        [np.arange(len(x)) * DAY_US for x in lists],
        [10 * DAY_US] * 3,
    )
    together = tower.encode_users(batch)
    for row, ids in zip(together, lists, strict=True):
        np.testing.assert_allclose(row, _user(tower, ids), atol=1e-6)


def test_only_the_newest_actions_count(tower):
    long = ["i9", "i8", "i1", "i2", "i3", "i4"]
    newest = tower.encode_user(keys(long[2:]), np.full(4, 5, np.int8), np.arange(2, 6) * DAY_US, 10 * DAY_US)
    np.testing.assert_array_equal(_user(tower, long), newest)


def test_saved_and_loaded_it_answers_the_same_bits(tower, written):
    again = Tower.load(written(tower))
    assert again.version == tower.version
    np.testing.assert_array_equal(again.item_vectors()[1], tower.item_vectors()[1])
    np.testing.assert_array_equal(_user(again, ["i1", "i17", "?"]), _user(tower, ["i1", "i17", "?"]))


def test_files_that_are_not_a_model_are_refused(tower, written):
    run = written(tower)
    (run.root / "models/tower.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(CorruptData):
        RunDirectory.open(run.root)
    with pytest.raises(CorruptData, match="tower"):
        Tower.load(run)


def test_weights_of_other_settings_are_refused(tower, written):
    run = written(tower)
    settings = run.root / "models/tower.json"
    settings.write_text(settings.read_text().replace('"heads": 2', '"heads": 3'))
    with pytest.raises(CorruptData, match="weights"):
        Tower.load(run)


@pytest.mark.parametrize("model", ["tower", "ranker"])
@pytest.mark.parametrize(("written_as", "is_now"), [('"config"', '"settings"'), ('"dim"', '"width"')])
def test_settings_of_another_release_are_a_version_mismatch(model, written_as, is_now, tower, ranker, written):
    made, load = {"tower": (tower, Tower.load), "ranker": (ranker, Ranker.load)}[model]
    run = written(made)
    settings = run.root / f"models/{model}.json"
    settings.write_text(settings.read_text().replace(written_as, is_now))
    with pytest.raises(VersionMismatch, match=f"model {model}.*train again"):
        load(run)


def test_a_run_without_a_model_says_so(ranker, written):
    with pytest.raises(NotFound):
        Tower.load(written(ranker))


def test_a_delta_moves_the_rows_and_tensors_of_loaded_models(tower, ranker, items):
    target = target_of("r1", tower, ranker)
    assert set(target.tables) == {"tower.item", "ranker.item"}
    before = tower.item_vectors()[1].copy()
    first = items.item_key[:1]
    moved = Rows(first, np.full((1, tower.dim), 3.0, np.float32))
    for message in encode(ModelDelta(run_id="r1", sequence=1, tables={"tower.item": moved}, dense={})):
        assert target.offer(message)
    changed = np.any(tower.item_vectors()[1] != before, axis=1)
    assert changed.tolist() == [True] + [False] * (len(items) - 1)
