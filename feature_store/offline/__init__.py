"""The offline store: feature values by day in Parquet, derived from online state and rebuildable."""

from feature_store.offline.snapshots import read, snapshot, write

__all__ = ["read", "snapshot", "write"]
