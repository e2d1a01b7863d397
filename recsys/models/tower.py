"""The two towers: a user's recent actions and an item to vectors whose inner product is affinity.

User: the embeddings of the last L actions (item + behaviour + age), pooled by H learned attention queries. Item: its
embedding through one linear layer. Both are normalised to length 1. An item's embedding is id + category + brand +
price bucket + a projection of its title's vector. An item without training events uses the "unknown" id row, so what is
left of it places it. What a catalogue does not have (titles, prices) the net of its run does not have either.

Shape legend: B users, L actions of one, V actions of all, N items, U different items among V, M items of the catalogue,
D dimension, T width of a text vector, H heads.
Source: attention pooling as in Lee et al. 2019 (Set Transformer, PMA); two towers as in Yi et al. 2019.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys.core import RunDirectory
from recsys.core.ids import key
from recsys.core.items import ItemTable
from recsys.models import storage
from recsys.models.config import TowerConfig
from recsys.models.embeddings import UNKNOWN_ROW, Vocabulary, sequence_tables
from recsys.models.history import NUM_AGE_BUCKETS, NUM_EVENT_TYPES, Histories
from recsys.models.id_map import IdMap
from recsys.models.jagged import Jagged, keyed, padded
from recsys.models.text.base import TextEncoder

TABLES = ("item", "category", "brand")
NUM_PRICES = 64  # buckets, two to each doubling; 0 = unknown
_ITEMS_PER_BATCH = 16_384
# Random directions keep distances. Ten times what ids start with: before any training, and for an item with few events
# after it, the title says where an item is; from .4 to .8 it hardly matters, at 1.6 ids no longer move (docs/log.md).
_TEXT_START_STD = 0.5


class Sizes(TypedDict):
    """Width of text vectors and number of price buckets; 0 = there are none."""

    text_dim: int
    num_prices: int


@dataclass(frozen=True, slots=True)
class ItemInput:
    """V items as the net reads them: rows of the tables; the text of each, text_UT[text_of_V]; its price bucket."""

    ids: KeyedJaggedTensor
    text_UT: Tensor | None = None
    text_of_V: Tensor | None = None
    price_V: Tensor | None = None

    def to(self, device: torch.device) -> ItemInput:
        """The same on another device."""
        rest = (self.text_UT, self.text_of_V, self.price_V)
        return ItemInput(self.ids.to(device), *(None if t is None else t.to(device) for t in rest))


def price_bucket(price_minor: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Bucket of each price in minor units, 0 where it is negative: unknown."""
    known = np.clip(2 * np.log2(1.0 + np.maximum(price_minor, 0)), 0, NUM_PRICES - 2).astype(np.int64) + 1
    return np.where(price_minor < 0, 0, known)


class ItemRows:
    """What the net reads of every item of the catalogue; `lookup` gives row 0 and zeros for what is not in it."""

    def __init__(
        self,
        item_key: npt.NDArray[np.int64],
        rows: Mapping[str, npt.NDArray[np.int64]],
        text: npt.NDArray[np.float16] | None = None,
        price: npt.NDArray[np.int64] | None = None,
    ) -> None:
        """item_key: int64 [M]; rows: table name to int64 [M]; text: [M, T]; price: buckets [M]; None = nobody knows."""
        self.vocabulary = Vocabulary(item_key)
        self.rows = {t: np.ascontiguousarray(rows[t], np.int64) for t in TABLES}
        self._by_place = {t: np.concatenate([[0], rows[t]]) for t in TABLES}
        self._text = None if text is None else np.concatenate([np.zeros_like(text, shape=(1, text.shape[1])), text])
        self._price = None if price is None else np.concatenate([[0], price])

    @property
    def text(self) -> npt.NDArray[np.float16] | None:
        """Text vectors [M, T]."""
        return None if self._text is None else self._text[1:]

    @property
    def price(self) -> npt.NDArray[np.int64] | None:
        """Price buckets [M]."""
        return None if self._price is None else self._price[1:]

    def text_at(self, place: npt.NDArray[np.int64]) -> npt.NDArray[np.float16] | None:
        """Text vectors [N, T] by row in the vocabulary; zeros for row 0."""
        return None if self._text is None else self._text[place]

    def price_at(self, place: npt.NDArray[np.int64]) -> npt.NDArray[np.int64] | None:
        """Price buckets [N] by row in the vocabulary; unknown for row 0."""
        return None if self._price is None else self._price[place]

    @property
    def sizes(self) -> Sizes:
        """What a TowerNet has to know of texts and prices."""
        text_dim = 0 if self._text is None else self._text.shape[1]
        return {"text_dim": text_dim, "num_prices": 0 if self._price is None else NUM_PRICES}

    @classmethod
    def build(
        cls,
        items: ItemTable,
        trained: npt.NDArray[np.int64],
        ids: IdMap | None = None,
        *,
        text: npt.NDArray[np.float16] | None = None,
        price: bool = False,
    ) -> tuple[ItemRows, dict[str, int]]:
        """From the catalogue; only items in `trained` (keys) get an id row of their own. Also gives rows per table.

        ids: gives the rows instead, where there may be fewer than items. text: of the items [M, T]. price: whether the
        catalogue's prices, if it has any, count.
        """
        place = np.arange(1, len(items) + 1) if ids is None else ids.rows(items.item_key)
        rows = {"item": np.where(np.isin(items.item_key, trained), place, 0)}
        num_rows = {"item": (len(items) if ids is None else ids.rows_max) + 1}
        for table in ("category", "brand"):
            codes = np.array([key(text) if text else -1 for text in items.column(table)], np.int64)
            vocabulary = Vocabulary(np.unique(codes[codes >= 0]))
            rows[table], num_rows[table] = vocabulary.rows(codes), vocabulary.num_rows
        bucket = price_bucket(items.table.column("price").fill_null(-1).to_numpy())
        return cls(items.item_key, rows, text, bucket if price and bucket.any() else None), num_rows

    def own(self, places: npt.NDArray[np.int64]) -> None:
        """Give items, by their row in the vocabulary, an id row of their own from now on."""
        self.rows["item"][places - 1] = places
        self._by_place["item"][places] = places

    def lookup(
        self,
        item_key: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int64],
        unknown: npt.NDArray[np.bool_] | None = None,
    ) -> ItemInput:
        """Lists of items for the net: keys [V], lengths [lists]; ids are hidden where `unknown` [V] is."""
        place = self.vocabulary.rows(item_key)
        rows = {t: self._by_place[t][place] for t in TABLES}
        if unknown is not None:
            rows["item"] = np.where(unknown, UNKNOWN_ROW, rows["item"])
        different, of = np.unique(place, return_inverse=True) if self._text is not None else (place, place)
        return item_input(
            rows,
            lengths,
            None if self._text is None else (self._text[different], of),
            None if self._price is None else self._price[place],
        )


def item_input(
    rows: Mapping[str, npt.NDArray[np.int64]],
    lengths: npt.NDArray[np.int64],
    text: tuple[npt.NDArray[np.floating], npt.NDArray[np.int64]] | None,
    price: npt.NDArray[np.int64] | None,
) -> ItemInput:
    """Arrays as tensors. rows: table to [V]; lengths [lists]; text: vectors [U, T] and whose each is [V]; price [V]."""
    ids = keyed({t: Jagged(r, lengths.astype(np.int32)) for t, r in rows.items()})
    of_price = None if price is None else torch.from_numpy(price)
    if text is None:
        return ItemInput(ids, price_V=of_price)
    return ItemInput(ids, torch.from_numpy(text[0].astype(np.float32)), torch.from_numpy(text[1]), of_price)


class TowerNet(nn.Module):
    """The weights of both towers."""

    def __init__(
        self,
        num_rows: Mapping[str, int],
        config: TowerConfig,
        tables_device: str = "cpu",
        *,
        text_dim: int = 0,
        num_prices: int = 0,
    ) -> None:
        """num_rows: rows per table of TABLES. tables_device: meta = no memory yet, training will cut and fill them.

        text_dim, num_prices: width of text vectors and buckets of prices, 0 = there are none.
        """
        super().__init__()
        dim, heads = config.dim, config.heads
        self.tables = sequence_tables(num_rows, dim, {t: [t] for t in TABLES}, tables_device)
        self.event_type = nn.Embedding(NUM_EVENT_TYPES, dim)
        self.age = nn.Embedding(NUM_AGE_BUCKETS, dim)
        self.age_bias = nn.Embedding(NUM_AGE_BUCKETS, heads)
        self.query = nn.Linear(dim, heads, bias=False)
        self.mix = nn.Sequential(nn.Linear(heads * dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.item = nn.Linear(dim, dim)
        nn.init.eye_(self.item.weight)
        for embedding in (self.event_type, self.age):
            nn.init.normal_(embedding.weight, std=0.05)
        nn.init.zeros_(self.age_bias.weight)
        # last, so that what is above starts from the same numbers with them and without
        self.text = nn.Linear(text_dim, dim, bias=False) if text_dim else None
        self.price = nn.Embedding(num_prices, dim) if num_prices else None
        if self.text is not None:
            nn.init.normal_(self.text.weight, std=_TEXT_START_STD)
        if self.price is not None:
            nn.init.zeros_(self.price.weight)

    def embed(self, items: ItemInput) -> Tensor:
        """The sum of all there is of every item, [V, D]."""
        found = self.tables(items.ids)
        total: Tensor = found["item"].values() + found["category"].values() + found["brand"].values()
        return self.described(total, items)

    def described(self, total_VD: Tensor, items: ItemInput) -> Tensor:
        """Plus what title and price say."""
        if self.text is not None:
            assert items.text_of_V is not None, "made by the ItemRows that the net was made for"
            total_VD = total_VD + F.embedding(items.text_of_V, self.text(items.text_UT))
        if self.price is not None:
            total_VD = total_VD + self.price(items.price_V)
        return total_VD

    def users(self, embedded_VD: Tensor, event_type_V: Tensor, age_V: Tensor, lengths_B: Tensor) -> Tensor:
        """User vectors [B, D] of length 1. age_V: age buckets."""
        token_VD = embedded_VD + self.event_type(event_type_V) + self.age(age_V)
        logit_VH = self.query(token_VD) + self.age_bias(age_V)
        token_BLD, mask_BL = padded(token_VD, lengths_B)
        logit_BLH, _ = padded(logit_VH, lengths_B)
        weight_BLH = torch.softmax(logit_BLH.masked_fill(~mask_BL[:, :, None], -1e9), dim=1)
        pooled_BHD = torch.einsum("blh,bld->bhd", weight_BLH * mask_BL[:, :, None], token_BLD)
        return F.normalize(pooled_BHD.mean(dim=1) + self.mix(pooled_BHD.flatten(1)), dim=-1)

    def items(self, embedded_ND: Tensor) -> Tensor:
        """Item vectors [N, D] of length 1."""
        return F.normalize(self.item(embedded_ND), dim=-1)


class Tower:
    """Trained towers, as serving and indexing use them."""

    def __init__(
        self,
        net: TowerNet,
        items: ItemRows,
        config: TowerConfig,
        version: str = "unsaved",
        text_encoder: TextEncoder | None = None,
    ) -> None:
        """Use `load`, or training. text_encoder: that training used; `recsys.models.text.build` has a run's."""
        self.net, self.items, self.config, self.version = net, items, config, version
        self.text_encoder = text_encoder

    @property
    def dim(self) -> int:
        """Dimension of the vectors."""
        return self.config.dim

    @classmethod
    def load(cls, run: RunDirectory) -> Tower:
        """The towers of a run. Raises: NotFound, CorruptData, VersionMismatch."""
        stored = storage.load(run, "tower")
        catalogue = {n: t.numpy() for n, t in stored.section("items").items()}
        with run.settings_of("model tower"):
            config, num_rows = TowerConfig(**stored.settings["config"]), stored.settings["num_rows"]
            items = ItemRows(catalogue["key"], catalogue, catalogue.get("text"), catalogue.get("price"))
        net = TowerNet(num_rows, config, **items.sizes)
        storage.restore(net, stored.section("net"), f"run {run.run_id}, models/tower.safetensors")
        return cls(net, items, config, stored.version)

    def save(self, folder: Path) -> None:
        """Write tower.safetensors and tower.json into `folder`."""
        rows = {f"items.{t}": storage.keys_tensor(r) for t, r in self.items.rows.items()}
        tensors = {f"net.{n}": t for n, t in self.net.state_dict().items()}
        tensors |= rows | {"items.key": storage.keys_tensor(self.items.vocabulary.keys)}
        described = {"text": self.items.text, "price": self.items.price}
        tensors |= {f"items.{n}": torch.from_numpy(a) for n, a in described.items() if a is not None}
        num_rows = {c.name: c.num_embeddings for c in self.net.tables.embedding_configs()}
        self.version = storage.save(folder, "tower", {"config": asdict(self.config), "num_rows": num_rows}, tensors)

    def encode_user(
        self,
        history_keys: npt.NDArray[np.int64],
        history_types: npt.NDArray[np.int8],
        history_times_us: npt.NDArray[np.int64],
        as_of_us: int,
    ) -> npt.NDArray[np.float32]:
        """The user vector [D] of one history (oldest first, any length)."""
        one = Histories.from_lists([history_keys], [history_types], [history_times_us], [as_of_us])
        vector: npt.NDArray[np.float32] = self.encode_users(one)[0]
        return vector

    @torch.inference_mode()
    def encode_users(self, histories: Histories) -> npt.NDArray[np.float32]:
        """User vectors [B, D]."""
        used = histories.last(self.config.history_items_max)
        user_BD = self.net.users(
            self.net.embed(self.items.lookup(used.item_key, used.lengths)),
            torch.from_numpy(used.event_type),
            torch.from_numpy(used.age_bucket()),
            torch.from_numpy(used.lengths),
        )
        vectors: npt.NDArray[np.float32] = user_BD.numpy()
        return vectors

    @torch.inference_mode()
    def item_vectors(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Every item of the catalogue: keys int64 [M] and vectors [M, D]."""
        item_key = self.items.vocabulary.keys
        return item_key, self.encode_items(item_key)

    @torch.inference_mode()
    def encode_items(self, item_key: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Item vectors [N, D]; what is not of the catalogue is "some item" of which nothing is known."""
        parts = [
            self.net.items(self.net.embed(self.items.lookup(part, np.array([len(part)])))).numpy()
            for part in np.split(item_key, range(_ITEMS_PER_BATCH, len(item_key), _ITEMS_PER_BATCH))
        ]
        return np.concatenate(parts)
