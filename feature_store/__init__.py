"""Features: declared once as views, folded by one code online and offline, read as of a time."""

from feature_store.base import FeatureReader, FeatureStatus, ItemFeatures, UserFeatures

__all__ = ["FeatureReader", "FeatureStatus", "ItemFeatures", "UserFeatures"]
