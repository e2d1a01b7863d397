"""The cascade of one request. `build` is the only code that makes one; serving, replay and training lists call it.

Light names only: torch, FAISS and transformers are imported inside `build`, and only when a part runs in process.
"""

from recsys.pipeline.arms import ARMS, Arm, Feed
from recsys.pipeline.budget import Budget
from recsys.pipeline.build import build
from recsys.pipeline.ports import PipelineConfig, Ports, RerankWeights
from recsys.pipeline.recommend import Cascade, Collected

__all__ = [
    "ARMS",
    "Arm",
    "Budget",
    "Cascade",
    "Collected",
    "Feed",
    "PipelineConfig",
    "Ports",
    "RerankWeights",
    "build",
]
