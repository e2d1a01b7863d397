"""Towers trained by several processes: as by one, killed and gone on with, on another number of processes too."""

import errno
import json
import os
import shutil
import subprocess
import sys

import bags_world
import numpy as np
import polars as pl
import pytest
import training_world as world
from full_disk import files_end_at

from recsys.core import CorruptData, VersionMismatch
from recsys.data import simulate


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    out = tmp_path_factory.mktemp("sharded") / "data"
    simulate("tiny", 0, out)
    return out


@pytest.fixture(scope="module")
def by_one(dataset, tmp_path_factory):
    """Losses and item vectors of one process that nobody disturbed, and its working folder with the checkpoints."""
    work = tmp_path_factory.mktemp("by-one")
    return *world.train(dataset, work)[:2], work


@pytest.fixture
def killed_pair(dataset, tmp_path):
    """A working folder in which two ranks left checkpoints before they were killed."""
    finished = world.train_apart(2, dataset, tmp_path / "work", tmp_path / "out.npz", kill_step=7)
    assert finished.returncode != 0
    assert not (tmp_path / "out.npz").exists()
    (kept,) = (tmp_path / "work").glob("tower-checkpoint-*/step-*")
    assert len(list(kept.glob("shard-*.safetensors"))) == 2
    return tmp_path / "work"


def test_two_ranks_killed_go_on_as_one_with_the_same_losses(dataset, by_one, killed_pair):
    losses, vectors, _ = world.train(dataset, killed_pair)
    assert len(losses) == len(by_one[0]) - world.STEP_OF_CHECKPOINTS
    np.testing.assert_allclose(losses, by_one[0][world.STEP_OF_CHECKPOINTS :], rtol=0, atol=1e-5)
    np.testing.assert_allclose(vectors, by_one[1], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_two_ranks_then_one_then_three_have_the_losses_of_one(dataset, by_one, killed_pair, tmp_path):
    killed = world.train_apart(1, dataset, killed_pair, tmp_path / "one.npz", kill_step=12)
    assert killed.returncode != 0
    finished = world.train_apart(3, dataset, killed_pair, tmp_path / "three.npz")
    assert finished.returncode == 0, finished.stderr
    losses, vectors = world.read(tmp_path / "three.npz")
    np.testing.assert_allclose(losses, by_one[0][10:], rtol=0, atol=1e-5)
    np.testing.assert_allclose(vectors, by_one[1], rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [2, 3])
def test_several_ranks_match_one(nproc, dataset, by_one, tmp_path):
    finished = world.train_apart(nproc, dataset, tmp_path / "work", tmp_path / "out.npz")
    assert finished.returncode == 0, finished.stderr
    losses, vectors = world.read(tmp_path / "out.npz")
    np.testing.assert_allclose(losses, by_one[0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(vectors, by_one[1], rtol=0, atol=1e-5)


def test_two_ranks_of_bags_match_one(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*torchrun, bags_world.__file__, str(tmp_path / "out.npz")], timeout=600, check=True, env=environ)
    with np.load(tmp_path / "out.npz") as made:
        np.testing.assert_allclose(made["losses_all"], made["losses_alone"], rtol=0, atol=1e-5)
        for name in (n for n in made.files if n.startswith("all.")):
            np.testing.assert_allclose(made[name], made[f"alone{name[3:]}"], rtol=0, atol=1e-5)


def test_the_same_seed_gives_the_same_bits_and_so_does_going_on(dataset, by_one, tmp_path):
    shutil.copytree(by_one[2], tmp_path / "work")
    (checkpoint,) = (tmp_path / "work").glob("tower-checkpoint-*")
    newest = max(checkpoint.iterdir())
    shutil.rmtree(newest)
    losses, vectors, _ = world.train(dataset, tmp_path / "work")
    assert 0 < len(losses) < len(by_one[0])
    assert losses == by_one[0][-len(losses) :]
    np.testing.assert_array_equal(vectors, by_one[1])


def _newest(work):
    return max(work.glob("tower-checkpoint-*/step-*"))


def test_a_checkpoint_of_another_training_is_left_alone(dataset, by_one, tmp_path):
    shutil.copytree(by_one[2], tmp_path / "work")
    losses, *_ = world.train(dataset, tmp_path / "work", tower_epochs=1)
    assert len(losses) == len(by_one[0]) // 2


def test_a_checkpoint_of_items_in_other_categories_is_left_alone(dataset, by_one, tmp_path):
    """As many and the same names: only which item has which."""
    shutil.copytree(by_one[2], tmp_path / "work")
    shutil.copytree(dataset, tmp_path / "corrected")
    items = pl.read_parquet(dataset / "items.parquet")
    items.with_columns(pl.col("category").reverse()).write_parquet(tmp_path / "corrected" / "items.parquet")
    assert len(world.train(tmp_path / "corrected", tmp_path / "work")[0]) == len(by_one[0])


def test_a_checkpoint_of_another_dimension_is_refused(dataset, by_one, tmp_path):
    shutil.copytree(by_one[2], tmp_path / "work")
    place = _newest(tmp_path / "work") / "place.json"
    claimed = json.loads(place.read_text())
    claimed["facts"]["model"]["dim"] = 8
    place.write_text(json.dumps(claimed))
    with pytest.raises(VersionMismatch, match=r"shape .* expected shape .*Delete"):
        world.train(dataset, tmp_path / "work", dim=8)


def test_a_checkpoint_that_is_no_safetensors_is_refused_and_never_unpickled(dataset, by_one, tmp_path):
    shutil.copytree(by_one[2], tmp_path / "work")
    for shard in _newest(tmp_path / "work").glob("*.safetensors"):
        shard.write_bytes(b"\x80\x04cbuiltins\nexit\n(tR.")
    with pytest.raises(CorruptData, match="Delete"):
        world.train(dataset, tmp_path / "work")


def test_a_disk_that_is_full_is_said_and_training_goes_on_once_it_is_not(dataset, by_one, tmp_path):
    with files_end_at(10_000), pytest.raises(OSError, match="tower-checkpoint") as refused:
        world.train(dataset, tmp_path / "work")
    assert refused.value.errno == errno.EFBIG
    np.testing.assert_allclose(world.train(dataset, tmp_path / "work")[1], by_one[1], rtol=0, atol=1e-5)


def test_a_bounded_table_serves_more_items_than_it_has_rows(dataset, tmp_path):
    tower = world.train(dataset, tmp_path / "work", item_rows_max=20)[2]
    assert tower.net.state_dict()["tables.embeddings.item.weight"].shape[0] == 21
    rows = tower.items.rows["item"]
    assert len(rows) > 100
    assert np.count_nonzero(rows) == len(np.unique(rows[rows > 0])) <= 20
    assert np.isfinite(tower.item_vectors()[1]).all()
