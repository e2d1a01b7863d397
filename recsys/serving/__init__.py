"""Serving: the gRPC gateway and its workers, admission, drain, impressions, peak plans, the client library.

The gateway process runs the pipeline and never loads torch, FAISS or transformers; `worker` is the heavy main.
Light names only.
"""

from recsys.serving.client import RecommendClient
from recsys.serving.config import AdmissionConfig, ClientConfig, PeakConfig, ServingConfig, WorkerConfig

__all__ = ["AdmissionConfig", "ClientConfig", "PeakConfig", "RecommendClient", "ServingConfig", "WorkerConfig"]
