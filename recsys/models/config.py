"""Settings of the models. Light: read by the command line and by tests without torch."""

from __future__ import annotations

from dataclasses import dataclass

from recsys.core.config import in_range, section


@section("models.tower")
@dataclass(frozen=True, kw_only=True, slots=True)
class TowerConfig:
    """The two towers. dim: dimension of user and item vectors; heads: attention queries over the history."""

    dim: int = 64
    heads: int = 4
    history_items_max: int = 50
    temperature: float = 0.1

    def __post_init__(self) -> None:
        in_range("models.tower.dim", self.dim, 2, 4096)
        in_range("models.tower.heads", self.heads, 1, 64)
        in_range("models.tower.history_items_max", self.history_items_max, 1, 512)
        in_range("models.tower.temperature", self.temperature, 1e-3, 10)


@section("models.ranker")
@dataclass(frozen=True, kw_only=True, slots=True)
class RankerConfig:
    """The ranker. dim: item embedding; hidden: width of the deep part; quantiles: points of the quantile transform."""

    dim: int = 16
    hidden: int = 32
    quantiles: int = 33
    dropout: float = 0.2
    history_items_max: int = 50

    def __post_init__(self) -> None:
        in_range("models.ranker.dim", self.dim, 2, 1024)
        in_range("models.ranker.hidden", self.hidden, 2, 4096)
        in_range("models.ranker.quantiles", self.quantiles, 3, 1025)
        in_range("models.ranker.dropout", self.dropout, 0, 0.9)
        in_range("models.ranker.history_items_max", self.history_items_max, 1, 512)
