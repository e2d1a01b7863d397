"""The offline store: feature values and samples by day, derived from the archive and rebuildable."""
