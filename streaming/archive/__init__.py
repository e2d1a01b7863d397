"""The archive: a dataset directory that grows with the log, and from which a store can be rebuilt."""

from streaming.archive.items import read_items
from streaming.archive.reader import archived, check_reaches, goes_on, is_archive, starts_at
from streaming.archive.writer import Archive, Follower, Part

__all__ = [
    "Archive",
    "Follower",
    "Part",
    "archived",
    "check_reaches",
    "goes_on",
    "is_archive",
    "read_items",
    "starts_at",
]
