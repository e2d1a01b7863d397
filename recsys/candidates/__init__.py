"""Candidate sources: thousands of items to hundreds. One file per source, `base.py` has the protocol.

Light names only: FAISS and torch are imported by `recsys.pipeline.build` or a worker's main, never here.
"""

from recsys.candidates.base import CandidateSource, SearchesWhere

__all__ = ["CandidateSource", "SearchesWhere"]
