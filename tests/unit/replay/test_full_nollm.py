"""The control arm: it sees what the LLM sees but for the LLM, and gets a say only where validation says so."""

import numpy as np
import pytest

from recsys.replay.peers.full_nollm import TextLikeness

CATALOGUE = ["red tea cup", "green tea cup", "leather shoe", "手机 壳 红色", "手机 支架", ""]


@pytest.fixture
def likeness():
    return TextLikeness(CATALOGUE)


def test_texts_that_share_rare_words_are_alike(likeness):
    like = likeness.features(["green tea cup", "leather shoe", "手机 壳 红色", ""], ["red tea cup", "手机 支架"])
    closest, mean = like.T
    assert closest[0] > closest[2] > closest[1] == closest[3] == 0
    assert mean[0] == pytest.approx(closest[0] / 2)
    assert likeness.features(["red tea cup"], ["RED tea-cup"]) == pytest.approx(1.0)


@pytest.mark.parametrize("history", [[], [""], ["unheard of"]])
def test_without_a_history_in_words_there_is_no_likeness(likeness, history):
    assert np.isnan(likeness.features(["red tea cup", ""], history)).all()
