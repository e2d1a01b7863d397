import numpy as np
import pytest

from recsys.core import BadInput, VersionMismatch, keys
from recsys.core.metrics import MISSING_FEATURES
from recsys.models.config import RankerConfig
from recsys.models.embeddings import Vocabulary
from recsys.models.ranker import Prior, Ranker, RankerNet
from recsys.models.scaling import Scaling

DAY_US = 86_400_000_000


def _score(ranker, values, ids, names=None, ask=Ranker.score):
    return ask(
        ranker,
        np.asarray(values, np.float32),
        names or ranker.feature_names,
        keys(ids),
        keys(["i1", "i2"]),
        np.full(2, 5, np.int8),
        np.arange(2) * DAY_US,
        10 * DAY_US,
    )


VALUES = np.array([[0.1, 2.0, np.nan], [np.nan, np.nan, np.nan], [-5.0, 1e9, 3.0]])
IDS = ["i1", "unknown", "i7"]


def test_every_candidate_has_a_finite_score(ranker):
    scores = _score(ranker, VALUES, IDS)
    assert scores.shape == (3,)
    assert scores.dtype == np.float32
    assert np.isfinite(scores).all()
    assert _score(ranker, np.empty((0, 3)), []).shape == (0,)


def test_a_candidate_is_judged_on_its_own(ranker):
    together = _score(ranker, VALUES, IDS)
    for i in range(3):
        np.testing.assert_allclose(_score(ranker, VALUES[i : i + 1], IDS[i : i + 1]), together[i : i + 1], atol=1e-5)


def test_columns_are_found_by_name(ranker):
    swapped = _score(ranker, VALUES[:, ::-1], IDS, names=ranker.feature_names[::-1])
    np.testing.assert_array_equal(swapped, _score(ranker, VALUES, IDS))


def test_an_absent_feature_is_missing_and_counted(ranker):
    counter = MISSING_FEATURES.labels(feature="item_price")
    before = counter._value.get()
    absent = _score(ranker, VALUES[:, :2], IDS, names=ranker.feature_names[:2])
    gone = VALUES.copy()
    gone[:, 2] = np.nan
    np.testing.assert_array_equal(absent, _score(ranker, gone, IDS))
    assert counter._value.get() == before + 3


@pytest.mark.parametrize("ask", [Ranker.score, Ranker.probabilities])
def test_features_of_another_model_are_refused(ranker, ask):
    with pytest.raises(VersionMismatch, match="Serve the run"):
        _score(ranker, VALUES, IDS, names=("a", "b", "c"), ask=ask)


@pytest.mark.parametrize("ask", [Ranker.score, Ranker.probabilities])
def test_a_matrix_of_another_shape_is_refused(ranker, ask):
    with pytest.raises(BadInput, match="shape"):
        _score(ranker, VALUES[:2], IDS, ask=ask)


def test_saved_and_loaded_it_answers_the_same_bits(ranker, written):
    ranker.priors = (Prior("covisit", 2.0, 0.5),)
    again = Ranker.load(written(ranker))
    assert (again.version, again.feature_names, again.priors, again.heads) == (
        ranker.version,
        ranker.feature_names,
        ranker.priors,
        ranker.heads,
    )
    np.testing.assert_array_equal(_score(again, VALUES, IDS), _score(ranker, VALUES, IDS))
    chances = [_score(model, VALUES, IDS, ask=Ranker.probabilities) for model in (ranker, again)]
    np.testing.assert_equal(*chances)


def test_each_behaviour_has_a_chance_and_the_targets_is_that_of_the_score(ranker):
    ranker.priors = (Prior("covisit", 2.0, 0.5),)
    chances = _score(ranker, VALUES, IDS, ask=Ranker.probabilities)
    assert list(chances) == ["purchase", "view"]
    score = _score(ranker, VALUES, IDS)
    np.testing.assert_allclose(chances["purchase"], 1 / (1 + np.exp(-score)), rtol=1e-5)
    ranker.net.others_wide.data.zero_()
    ranker.net.others_deep.data.zero_()
    ranker.net.others_level.data.fill_(-0.75)  # of the target's logit before priors and calibration
    leaning = ranker.leaning(VALUES.astype(np.float32), np.zeros(3, np.int64))
    viewed = 2 * ((score + 1) / 0.5 - leaning - 0.75) + 1
    level = _score(ranker, VALUES, IDS, ask=Ranker.probabilities)
    np.testing.assert_allclose(level["view"], 1 / (1 + np.exp(-viewed)), rtol=1e-4)
    np.testing.assert_array_equal(level["purchase"], chances["purchase"])
    none = _score(ranker, np.empty((0, 3)), [], ask=Ranker.probabilities)
    assert {name: chance.shape for name, chance in none.items()} == {"purchase": (0,), "view": (0,)}


def test_a_run_of_a_release_without_heads_is_refused_and_says_what_to_do(ranker, written):
    run = written(ranker)
    settings = run.root / "models/ranker.json"
    settings.write_text(settings.read_text().replace('"heads"', '"calibration"'))
    with pytest.raises(VersionMismatch, match=r"another release \('heads'\).*train again"):
        Ranker.load(run)


def test_scaling_keeps_order_bounds_surges_and_marks_missing():
    scaling = Scaling(2, 9)
    rows = np.stack([np.repeat([0.0, 1.0, 2.0, 50.0], 5), np.full(20, 7.0)], axis=1).astype(np.float32)
    scaling.fit(rows)
    import torch

    seen = torch.tensor([[0.0, 7], [1, 7], [2, 7], [50, 7], [1e9, 7], [float("nan"), float("nan")]])
    out = scaling(seen)
    place, missing = out[:, 0], out[:, 4:]
    assert torch.isfinite(out).all()
    assert (place[1:5] >= place[:4]).all()
    assert place[4] == place[3] <= 1
    np.testing.assert_allclose(place[:4], [-0.75, -0.25, 0.25, 0.75])  # ties share the middle of their rows
    assert missing[5].tolist() == [1, 1]
    assert out[5, :4].tolist() == [0, 0, 0, 0]


def test_a_prior_orders_by_place_and_has_another_weight_where_new_items_are_asked_for():
    prior = Prior("covisit", 4.0, 1.0)
    score, carts, query = [5.0, np.nan, 1e9, 7.0], [1.0, 1.0, 0.0, np.nan], np.array([0, 0, 0, 1])
    columns, names = np.array([carts, score], np.float32).T, ("own_carts", "covisit_score")
    np.testing.assert_allclose(prior.worth(columns, names, query), [1 / np.log2(3), 0, 1, 1], rtol=1e-6)
    in_cart = Prior("covisit", 4.0, among="own_carts")
    np.testing.assert_allclose(in_cart.worth(columns, names, query), [1, 0, 0, 0], rtol=1e-6)
    config = RankerConfig(dim=4, hidden=8)
    names = ("covisit_score", "new_only")
    ranker = Ranker(RankerNet(2, 1, config).eval(), names, Vocabulary(np.empty(0, np.int64)), config, (prior,))
    values = np.array([[2, 0], [1, 0], [2, 1], [1, 1]], np.float32)
    added = ranker.leaning(values, np.array([0, 0, 1, 1]))
    np.testing.assert_allclose(added, [4, 4 / np.log2(3), 1, 1 / np.log2(3)], rtol=1e-6)
