"""Titles as vectors: the words, the encoder fitted on a catalogue, the file that keeps vectors."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.numpy import save_file

from recsys.core import CorruptData, RunDirectory, RunWriter, keys
from recsys.core.items import ItemTable
from recsys.core.metrics import TEXTS_ENCODED
from recsys.models.cold import ColdItems
from recsys.models.config import TowerConfig
from recsys.models.text.base import encode_some, title_text
from recsys.models.text.build import FOLDER, encoder_for, encoder_of
from recsys.models.text.cache import kept_vectors
from recsys.models.text.lsa import Lsa
from recsys.models.text.words import words
from recsys.models.tower import NUM_PRICES, ItemRows, Tower, TowerNet, price_bucket

COLOURS = ("red", "blue", "green", "white", "black")
THINGS = ("ceramic mug", "ceramic tea cup", "usb cable charger", "usb wall charger", "wool winter scarf", "wool hat")
TITLES = [f"{colour.title()} {thing}" for thing in THINGS for colour in COLOURS]
CHINESE = [
    f"{colour}{thing}"
    for thing in ("陶瓷马克杯", "陶瓷茶杯", "手机充电器", "无线充电器")
    for colour in ("红色", "蓝色", "白色")
]
FIELDS = {
    "run_id": "r1", "parent": None, "dataset_hash": "", "until": 0, "seed": 0, "config": {}, "versions": {},
    "commit": "", "feature_views": "v", "measures": {},
}  # fmt: skip


def likeness(encoder, a, b):
    first, second = encoder.encode([a, b])
    return float(first @ second)


def table(titles, prices=None):
    ids = [f"i{n}" for n in range(len(titles))]
    columns = {"item_id": ids, "item_key": keys(ids), "title": titles}
    return ItemTable.from_table(pa.table(columns | ({} if prices is None else {"price": prices})))


def tower_of(items, encoder, price=False, dim=8, known=False):
    torch.manual_seed(0)
    text = encoder.encode([title_text(t) for t in items.column("title")]).astype(np.float16) if encoder else None
    rows, num_rows = ItemRows.build(items, items.item_key if known else items.item_key[:0], text=text, price=price)
    config = TowerConfig(dim=dim, heads=2)
    return Tower(TowerNet(num_rows, config, **rows.sizes).eval(), rows, config)


def test_words_are_runs_of_letters_and_pairs_where_nothing_parts_them():
    found = words(["Red MUG, red", "红色马克杯 Mug", "杯", "", "кружка 2½ café", "🎁"])
    by_row = {row: group["word"].to_list() for (row,), group in found.group_by("row", maintain_order=True)}
    assert by_row == {
        0: ["red", "mug"],
        1: ["红色", "马克", "色马", "克杯", "mug"],
        2: ["杯"],
        4: ["кружка", "2½", "café"],
    }


def test_titles_that_share_telling_words_are_near():
    encoder = Lsa.fit(TITLES, 16)
    near, far = (likeness(encoder, "Red ceramic mug", other) for other in ("White ceramic mug", "Red usb wall charger"))
    assert near > far + 0.3
    assert likeness(encoder, "pink ceramic mug", "ceramic mug") > 0.99  # a word nobody knew says nothing
    np.testing.assert_allclose(np.linalg.norm(encoder.encode(TITLES), axis=1), 1, rtol=1e-5)


def test_chinese_titles_too():
    encoder = Lsa.fit(CHINESE, 16)
    near, far = (likeness(encoder, "黑色陶瓷马克杯", other) for other in ("红色陶瓷马克杯", "红色手机充电器"))
    assert near > far + 0.3


def test_the_same_titles_give_the_same_bits_whatever_was_drawn_before():
    first = Lsa.fit(TITLES, 16)
    torch.rand(3)
    before = torch.get_rng_state()
    second = Lsa.fit([*TITLES, TITLES[0], ""], 16)
    assert torch.equal(before, torch.get_rng_state())
    assert first.version == second.version
    np.testing.assert_array_equal(first.encode(TITLES), second.encode(TITLES))


def test_empty_and_unknown_titles_are_zeros():
    encoder = Lsa.fit(TITLES, 16)
    vectors = encode_some(encoder, ["", "never seen", "🎁", TITLES[0]])
    assert vectors.shape == (4, encoder.dim)
    assert vectors.any(axis=1).tolist() == [False, False, False, True]
    assert encoder.encode([]).shape == (0, encoder.dim)


@pytest.mark.parametrize("texts", [[], [""], ["one title"], ["no word", "in common"]])
def test_a_catalogue_without_titles_to_compare_has_no_encoder(texts):
    assert encoder_for(TowerConfig(), texts) is None


def test_a_text_of_any_length_is_cut():
    long = title_text("ceramic mug " * 10_000 + "charger\nusb")
    assert len(long) <= 4096
    assert title_text(None) == title_text(" \n ") == ""
    assert likeness(Lsa.fit(TITLES, 16), long, "ceramic mug") > 0.99


def test_a_title_places_an_item_before_its_id_does():
    encoder = Lsa.fit(TITLES, 32)
    items = table(TITLES)
    vectors = tower_of(items, encoder, dim=64, known=True).encode_items(items.item_key)
    titles = encoder.encode(items.column("title"))
    pairs = np.triu_indices(len(TITLES), 1)
    assert np.corrcoef((vectors @ vectors.T)[pairs], (titles @ titles.T)[pairs])[0, 1] > 0.7


def test_no_encoder_where_none_is_asked_for():
    assert encoder_for(TowerConfig(text_encoder=""), TITLES) is None


def test_a_run_keeps_its_encoder(tmp_path):
    encoder = Lsa.fit(TITLES, 16)
    with RunWriter(tmp_path / "run", FIELDS) as run:
        encoder.save(run.path(f"{FOLDER}/x").parent)
    with RunWriter(tmp_path / "other", FIELDS) as run:
        run.path("x").write_text("")
    again = encoder_of(RunDirectory.open(tmp_path / "run"))
    assert again.version == encoder.version
    np.testing.assert_array_equal(again.encode(TITLES), encoder.encode(TITLES))
    assert encoder_of(RunDirectory.open(tmp_path / "other")) is None


class Slow:
    """An encoder worth keeping the vectors of; says what it was asked."""

    version, keeps, dim = "slow-1", True, 3

    def __init__(self):
        self.asked = []

    def encode(self, texts):
        self.asked += texts
        return np.array([[len(t), 1, 0] for t in texts], np.float32)


def test_a_text_is_encoded_once(tmp_path):
    encoder, outcomes = Slow(), ("encoded", "kept")
    before = {o: TEXTS_ENCODED.labels(o)._value.get() for o in outcomes}
    first = kept_vectors(encoder, ["aa", "", "b", "aa"], tmp_path)
    assert first.tolist() == [[2, 1, 0], [0, 0, 0], [1, 1, 0], [2, 1, 0]]
    assert sorted(encoder.asked) == ["aa", "b"]
    np.testing.assert_array_equal(
        kept_vectors(encoder, ["ccc", "b", "aa"], tmp_path), [[3, 1, 0], [1, 1, 0], [2, 1, 0]]
    )
    assert sorted(encoder.asked) == ["aa", "b", "ccc"]
    assert {o: TEXTS_ENCODED.labels(o)._value.get() - before[o] for o in outcomes} == {"encoded": 3, "kept": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["slow-1.safetensors"]


def test_the_file_grows_no_larger_than_two_catalogues(tmp_path):
    encoder = Slow()
    for day in range(5):
        kept_vectors(encoder, [f"day {day}, title {n}" for n in range(4)], tmp_path)
    assert len(encoder.asked) == 20
    kept_vectors(encoder, [f"day 4, title {n}" for n in range(4)], tmp_path)
    assert len(encoder.asked) == 20
    assert (tmp_path / "slow-1.safetensors").stat().st_size < 8 * (8 + 6) + 300


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04pickle",
        {"text_key": np.zeros(1, np.int64)},
        {"text_key": np.zeros(1, np.int64), "vectors": np.zeros((1, 4), np.float16)},
        {"text_key": np.zeros(1, np.int64), "vectors": np.full((1, 3), np.nan, np.float16)},
    ],
)
def test_a_damaged_file_is_refused(content, tmp_path):
    path = tmp_path / "slow-1.safetensors"
    path.write_bytes(content) if isinstance(content, bytes) else save_file(content, path)
    with pytest.raises(CorruptData, match="Delete the file"):
        kept_vectors(Slow(), ["a"], tmp_path)


def test_prices_lie_in_growing_buckets_and_unknown_is_none_of_them():
    price = np.array([-1, 0, 1, 99, 100, 200, 10**6, 1 << 62])
    bucket = price_bucket(price)
    assert bucket[0] == 0
    assert (np.diff(bucket) >= 0).all()
    assert bucket[5] - bucket[4] == 2
    assert bucket.max() < NUM_PRICES


def test_without_titles_and_prices_the_net_is_the_one_it_was():
    items = table([None] * 4)
    plain = tower_of(items, None, price=True)
    assert not {n for n in plain.net.state_dict() if n.startswith(("text", "price"))}
    rich = tower_of(table(TITLES[:4], [100, None, 5, 7]), Lsa.fit(TITLES, 16), price=True)
    for name, tensor in plain.net.state_dict().items():
        if not name.startswith("tables."):
            assert torch.equal(tensor, rich.net.state_dict()[name]), name


def test_a_title_places_an_item_that_training_never_saw():
    encoder, items = Lsa.fit(TITLES, 16), table(TITLES)
    tower = tower_of(items, encoder)
    cold = ColdItems(tower, items, encoder)
    nothing = np.full(3, -1)
    titles = ["Pink ceramic mug", "Pink usb wall charger", "never seen"]
    vectors, placed = cold.encode(keys(["x", "y", "z"]), nothing, nothing, nothing, titles)
    assert placed.tolist() == [True, True, False]
    item_key, known = tower.item_vectors()
    nearest = [items.values("title", item_key[[np.argmax(known @ v)]])[0] for v in vectors[:2]]
    assert "ceramic mug" in nearest[0]
    assert "usb wall charger" in nearest[1]
    assert not ColdItems(tower, items).encode(keys(["x"]), nothing[:1], nothing[:1], None, titles[:1])[1].any()


def test_an_item_of_the_run_keeps_its_own_title_and_price():
    encoder, items = Lsa.fit(TITLES, 16), table(TITLES, list(range(1, 31)))
    tower = tower_of(items, encoder, price=True)
    item_key, vectors = tower.item_vectors()
    nothing = np.full(30, -1)
    told = ["something else"] * 30
    encoded, placed = ColdItems(tower, items, encoder).encode(item_key, nothing, nothing, nothing + 10**6, told)
    np.testing.assert_allclose(encoded, vectors, atol=1e-6)
    assert placed.all()


def test_saved_and_loaded_it_reads_the_same_titles(tmp_path):
    encoder = Lsa.fit(TITLES, 16)
    tower = tower_of(table(TITLES, list(range(30))), encoder, price=True)
    with RunWriter(tmp_path / "run", FIELDS) as run:
        tower.save(run.path("models/x").parent)
    again = Tower.load(RunDirectory.open(tmp_path / "run"))
    assert again.items.text.dtype == np.float16
    np.testing.assert_array_equal(again.item_vectors()[1], tower.item_vectors()[1])
