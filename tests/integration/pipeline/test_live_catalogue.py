"""What the catalogue stream says holds in every tier and slates stay full; the store is believed where it is silent."""

import numpy as np
import pyarrow as pa
import pytest

from recsys.core import EventBatch, EventKind, Tier, Unavailable
from recsys.pipeline import build
from recsys.ranking.live import LiveCatalogue

DOWN = Unavailable("the store", came="nothing", expected="an answer", fix="Start it.")


class Store:
    """The shop's store, until it is `down`."""

    def __init__(self, store):
        self.store, self.view_set, self.down = store, store.view_set, False

    async def user(self, *args):
        if self.down:
            raise DOWN
        return await self.store.user(*args)

    async def items(self, *args):
        return await self.store.items(*args)


@pytest.fixture
def live(shop):
    made = LiveCatalogue(shop.items())
    made.trusted = True
    return made


def stock(live, shop, units, ids, at=0):
    live.apply(
        EventBatch.from_columns(
            {
                "event_id": [f"s-{at}-{i}" for i in ids],
                "kind": np.full(len(ids), EventKind.STOCK, np.int8),
                "event_time": np.full(len(ids), shop.UNTIL_US + at, np.int64),
                "item_id": ids,
                "stock": pa.array([units] * len(ids), pa.int64()),
            }
        )
    )


async def shown(cascade, shop, tier, **query):
    slate = await cascade.recommend(shop.query(**query), shop.NEVER)
    assert slate.tier == tier
    return [i.item_id for i in slate.items]


@pytest.mark.parametrize(("arm", "tier"), [("retrieval", Tier.RETRIEVAL), ("popular", Tier.POPULAR)])
async def test_what_sells_out_goes_and_the_slate_stays_full(shop, store, run, live, arm, tier):
    cascade = build(arm, run, shop.ports(store, live=live))
    for at in range(4):  # ten items a time; the shop has eighty
        before = await shown(cascade, shop, tier)
        assert len(before) == 10
        stock(live, shop, 0, before, at)
        assert not set(before) & set(await shown(cascade, shop, tier))


async def test_without_the_store_the_cached_slate_and_popular_items_are_filtered_and_filled(shop, store, run, live):
    failing = Store(store)
    cascade = build("retrieval", run, shop.ports(failing, live=live))
    good = await shown(cascade, shop, Tier.RETRIEVAL)
    failing.down = True
    stock(live, shop, 0, good[:4])
    cached = await shown(cascade, shop, Tier.CACHED)
    assert cached[:6] == good[4:]
    assert len(set(cached) - set(good[:4])) == 10
    popular = await shown(cascade, shop, Tier.POPULAR, user="nobody")
    stock(live, shop, 0, popular[:9], 1)
    rest = await shown(cascade, shop, Tier.POPULAR, user="nobody")
    assert (rest[0], len(rest)) == (popular[9], 10)
    stock(live, shop, 0, good, 2)
    assert not set(await shown(cascade, shop, Tier.POPULAR)) & set(good)  # nothing of the cached slate is left
    stock(live, shop, 5, good, 3)
    assert await shown(cascade, shop, Tier.CACHED) == good


@pytest.mark.parametrize("trusted", [True, False])
async def test_a_restock_the_store_has_not_heard_of_counts_once_the_stream_is_current(shop, store, run, live, trusted):
    live.trusted = trusted
    cascade = build("retrieval", run, shop.ports(store, live=live))
    query = {"limit": 80}
    assert shop.SOLD_OUT not in await shown(cascade, shop, Tier.RETRIEVAL, **query)  # the stream is silent about it
    stock(live, shop, 3, [shop.SOLD_OUT])
    assert (shop.SOLD_OUT in await shown(cascade, shop, Tier.RETRIEVAL, **query)) is trusted
    assert shop.DELISTED not in await shown(cascade, shop, Tier.RETRIEVAL, **query)


@pytest.mark.parametrize("user", range(8))
@pytest.mark.parametrize("arm", ["retrieval", "popular", "own_history_popular"])
async def test_a_longer_slate_begins_with_the_shorter_one(shop, store, run, arm, user):
    cascade = build(arm, run, shop.ports(store))
    slates = {}
    for limit in (10, 50, 79):
        slate = await cascade.recommend(shop.query(user, limit=limit), shop.NEVER)
        slates[limit] = [i.item_id for i in slate.items]
    assert slates[79][:10] == slates[50][:10] == slates[10]
    assert slates[79][:50] == slates[50]
