"""Every FeatureView, declared here and nowhere else, and the version of the set."""

from feature_store.view import Views, version_of
from feature_store.views.item import ITEM_VIEW
from feature_store.views.user import USER_VIEW
from feature_store.views.user_item import USER_ITEM_VIEW

USER = Views("user", (USER_VIEW, USER_ITEM_VIEW))
ITEM = Views("item", (ITEM_VIEW,))

USER_FEATURE_NAMES: tuple[str, ...] = USER.feature_names
ITEM_FEATURE_NAMES: tuple[str, ...] = ITEM.feature_names
VIEW_SET: str = version_of(USER, ITEM)

__all__ = ["ITEM", "ITEM_FEATURE_NAMES", "USER", "USER_FEATURE_NAMES", "VIEW_SET"]
