"""Snapshots of the live index: round trip, refusals, and a process killed at any moment of writing them."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import vectors_world as world

from recsys.candidates.nearest import snapshot
from recsys.candidates.nearest.live import LiveIndex
from recsys.candidates.nearest.static import AnnIndex
from recsys.core import CorruptData, NotFound, VersionMismatch
from recsys.core.attributes import Attributes, Where
from recsys.models.config import IndexConfig, LiveIndexConfig

M = 2_000
SETTINGS = {"config": IndexConfig(kind="ivf", recall_k=10, tuning_queries=32), "live": LiveIndexConfig()}


@pytest.fixture(scope="module")
def live():
    made = LiveIndex(AnnIndex.build(world.keys(M), world.vectors(M), SETTINGS["config"]), **SETTINGS)
    made.upsert(world.keys(30, start=M), world.vectors(30, seed=9), Attributes.of(30, category=["tea"] * 30))
    made.upsert(world.keys(10), world.vectors(10, seed=10))
    made.delete(world.keys(20)[10:])
    made.update(world.keys(M)[50:51], stock_units=np.array([0]))
    return made


def read(root, **changed):
    return snapshot.read(root, **{"run_id": "r", "dim": world.DIM, **SETTINGS, **changed})


def test_what_is_restored_answers_the_same(tmp_path, live):
    for offset in (5, 9):
        snapshot.write(tmp_path, live, run_id="r", positions={0: offset, 3: 1})
    assert [p.name for p in tmp_path.iterdir()] == ["live-00000002"]
    back = read(tmp_path)
    assert back.positions == {0: 9, 3: 1}
    assert len(back.index) == len(live)
    for where in (Where(), Where(sold_out=True), Where(categories=frozenset({"tea"}))):
        np.testing.assert_array_equal(
            back.index.search(world.vectors(20, seed=3), 10, where)[0],
            live.search(world.vectors(20, seed=3), 10, where)[0],
        )


def test_what_does_not_fit_is_refused_with_the_fix(tmp_path, live):
    with pytest.raises(NotFound, match="run's index"):
        read(tmp_path)
    folder = snapshot.write(tmp_path, live, run_id="r", positions={})
    with pytest.raises(VersionMismatch, match=r"dimension 16; expected .*dimension 32.*Remove the folder"):
        read(tmp_path, dim=32)
    with pytest.raises(VersionMismatch, match="run r, dim"):
        read(tmp_path, run_id="other")
    with pytest.raises(VersionMismatch, match=r"40 items changed .*delta_items_max, 39"):
        read(tmp_path, live=LiveIndexConfig(delta_items_max=39, rebuild_items=39))
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format_version": 99}))
    with pytest.raises(VersionMismatch, match="format 99"):
        read(tmp_path)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(CorruptData, match=r"manifest\.json"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["ann.faiss", "ann.json", "live.safetensors"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_corrupt_files_are_refused(tmp_path, live, name, harm):
    path = snapshot.write(tmp_path, live, run_id="r", positions={}) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if harm == "remove":
        path.unlink()
    else:
        path.write_bytes(content if harm == "flip" else content[:-1])
    with pytest.raises(CorruptData, match=name.replace(".", r"\.")):
        read(tmp_path)


WRITER = """
import sys, itertools, numpy as np, vectors_world as world
from pathlib import Path
from recsys.candidates.nearest import snapshot
from recsys.candidates.nearest.live import LiveIndex
from recsys.candidates.nearest.static import AnnIndex
index = LiveIndex(AnnIndex.build(world.keys(20_000), world.vectors(20_000)))
print("ready", flush=True)
for i in itertools.count(1):
    index.upsert(np.array([-i]), world.vectors(1, seed=i))
    snapshot.write(Path(sys.argv[1]), index, run_id="r", positions={0: i})
    print(i, flush=True)
"""


def test_a_killed_writer_leaves_the_last_whole_snapshot(tmp_path):
    rng, environment = random.Random(5), {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    last = 0
    for _ in range(4):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
        ) as writer:
            written = [writer.stdout.readline() for _ in range(3)]
            assert written[0] == "ready\n"
            time.sleep(rng.uniform(0, 0.08))
            os.kill(writer.pid, signal.SIGKILL)
            said = [int(line) for line in (written[1:] + writer.stdout.readlines()) if line.strip()]
        back = read(tmp_path, config=IndexConfig())
        last = back.positions[0]
        assert last in (said[-1], said[-1] + 1)  # what was announced, or the one that was just named
        assert len(back.index) == 20_000 + last
    snapshot.write(tmp_path, back.index, run_id="r", positions={0: last})
    assert len(list(tmp_path.iterdir())) == 1  # nothing is left of those that died
