"""Ranges of [serving...], and peak plans."""

import pytest

from recsys.core import BadInput, Tier
from recsys.core.config import Config
from recsys.serving.config import AdmissionConfig, PeakConfig, PeakPlan, PublishConfig, ServingConfig


def test_values_come_from_their_sections():
    config = Config({"serving": {"metrics_port": 9464, "admission": {"in_flight_limit": 3}}})
    assert config.get(ServingConfig).metrics_port == 9464
    assert config.get(AdmissionConfig).in_flight_limit == 3


@pytest.mark.parametrize(
    ("owner", "values"),
    [
        (ServingConfig, {"deadline_ms_default": 3_000.0}),
        (ServingConfig, {"metrics_port": 70_000}),
        (ServingConfig, {"drain_s_max": 0.0}),
        (AdmissionConfig, {"in_flight_limit": 0}),
        (AdmissionConfig, {"queue_items_max": -1}),
        (PublishConfig, {"tenant_key": "x shop"}),
        (PublishConfig, {"tenant_key": ":authority"}),
        (PublishConfig, {"tenant_key": "x-shop-bin"}),
        (PublishConfig, {"tenant_key": "grpc-shop"}),
    ],
)
def test_out_of_range_is_refused(owner, values):
    with pytest.raises(BadInput, match=next(iter(values))):
        owner(**values)


def test_workers_of_shards_or_of_everything_not_both():
    assert ServingConfig(scoring_shards=("dns:///a:1", "dns:///b:1")).scoring_target == ""
    with pytest.raises(BadInput, match="scoring_target and scoring_shards"):
        ServingConfig(scoring_shards=("dns:///a:1",), scoring_target="dns:///a:1")


def test_peak_plans_from_toml_tables():
    file = {"serving": {"peak": {"plans": {"midnight-11": {"tier_best": "retrieval", "in_flight_limit": 64}}}}}
    plans = Config(file).get(PeakConfig).prepared()
    assert plans == {"midnight-11": PeakPlan(name="midnight-11", tier_best=Tier.RETRIEVAL, in_flight_limit=64)}


@pytest.mark.parametrize(
    ("plans", "message"),
    [
        ({"Mid Night": {}}, "a-z"),
        ({"p": {"tier": "rank"}}, r"got \['tier'\]"),
        ({"p": {"tier_best": "best"}}, "got best"),
        ({"p": {"in_flight_limit": 0}}, "got 0"),
        ({"p": {"rerank_items_max": 1.5}}, "got 1.5"),
        ({"p": 3}, "got 3"),
    ],
)
def test_bad_plans_are_refused(plans, message):
    with pytest.raises(BadInput, match=message):
        PeakConfig(plans=plans)


def test_the_plan_in_force_from_the_start_comes_from_the_environment_and_has_to_be_prepared():
    environ = {"DOUBLE11__SERVING__PEAK__ACTIVE": "midnight"}
    assert (Config().get(PeakConfig).active, Config(environ=environ).get(PeakConfig).active) == ("", "midnight")
    with pytest.raises(BadInput, match="got midnight; expected one of calm, storm"):
        Config({"serving": {"peak": {"plans": {"storm": {}, "calm": {}}}}}, environ).get(PeakConfig)
