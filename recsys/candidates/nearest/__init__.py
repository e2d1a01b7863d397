"""Nearest item vectors: an immutable base index, a live index over it, shards. Heavy modules are imported by name."""

from recsys.candidates.nearest.base import VectorIndex

__all__ = ["VectorIndex"]
