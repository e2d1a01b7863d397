"""Shared nouns: ids, events, queries, slates, deadlines, clocks, errors, configuration, run directories.

Imports nothing of double11 and never torch. Every other package builds on these names.
"""

from recsys.core.candidates import Candidates
from recsys.core.clock import Clock, DataClock, ManualClock, WallClock
from recsys.core.deadline import Deadline
from recsys.core.errors import (
    BadInput,
    Conflict,
    CorruptData,
    DeadlineExceeded,
    Double11Error,
    GateNotMet,
    Internal,
    NotFound,
    Overloaded,
    Unavailable,
    VersionMismatch,
)
from recsys.core.events import EVENT_SCHEMA, EventBatch, EventKind, EventType
from recsys.core.ids import key, keys
from recsys.core.query import Query
from recsys.core.run_dir import RunDirectory, RunWriter
from recsys.core.slate import Slate, SlateItem, StageTiming, Tier

__all__ = [
    "EVENT_SCHEMA",
    "BadInput",
    "Candidates",
    "Clock",
    "Conflict",
    "CorruptData",
    "DataClock",
    "Deadline",
    "DeadlineExceeded",
    "Double11Error",
    "EventBatch",
    "EventKind",
    "EventType",
    "GateNotMet",
    "Internal",
    "ManualClock",
    "NotFound",
    "Overloaded",
    "Query",
    "RunDirectory",
    "RunWriter",
    "Slate",
    "SlateItem",
    "StageTiming",
    "Tier",
    "Unavailable",
    "VersionMismatch",
    "WallClock",
    "key",
    "keys",
]
