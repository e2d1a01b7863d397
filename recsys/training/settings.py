"""The sections of double11.toml that decide a run, together. Light."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from recsys.candidates.covisit import SECTION as COVISIT
from recsys.candidates.covisit import CovisitConfig
from recsys.core.config import Config
from recsys.models.config import IndexConfig, RankerConfig, TowerConfig
from recsys.training.config import TrainingConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """[training], [models.tower], [models.ranker], [models.index] and [candidates.covisit]."""

    training: TrainingConfig = field(default_factory=TrainingConfig)
    tower: TowerConfig = field(default_factory=TowerConfig)
    ranker: RankerConfig = field(default_factory=RankerConfig)
    index: IndexConfig = field(default_factory=IndexConfig)
    covisit: CovisitConfig = field(default_factory=CovisitConfig)

    @classmethod
    def of(cls, config: Config) -> Settings:
        """Resolved from flags, environment and file."""
        return cls(
            training=config.get(TrainingConfig),
            tower=config.get(TowerConfig),
            ranker=config.get(RankerConfig),
            index=config.get(IndexConfig),
            covisit=config.get(CovisitConfig),
        )

    @classmethod
    def from_dict(cls, sections: Mapping[str, Any]) -> Settings:
        """What `as_dict` gave, out of a manifest."""
        return cls(
            training=TrainingConfig(**sections["training"]),
            tower=TowerConfig(**sections["models.tower"]),
            ranker=RankerConfig(**sections["models.ranker"]),
            index=IndexConfig(**sections.get("models.index", {})),  # runs of older releases do not say
            covisit=CovisitConfig(**sections.get(COVISIT, {})),
        )

    def as_dict(self) -> dict[str, Any]:
        """For the manifest: section name to its values."""
        return {
            "training": asdict(self.training),
            "models.tower": asdict(self.tower),
            "models.ranker": asdict(self.ranker),
            "models.index": asdict(self.index),
            COVISIT: asdict(self.covisit),
        }
