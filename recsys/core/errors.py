"""The one error tree. Each class maps to one gRPC status and one exit code.

    Double11Error
    ├── BadInput           INVALID_ARGUMENT     2   the caller can fix it: rows, flags, requests, configuration
    ├── NotFound           NOT_FOUND            2   a named file, run, topic or entity does not exist
    ├── VersionMismatch    FAILED_PRECONDITION  2   two parts that do not fit: run and dataset, index and model
    ├── GateNotMet         ABORTED              3   a quality or speed gate said no
    ├── CorruptData        DATA_LOSS            1   bytes that are there but cannot be trusted
    ├── Conflict           ALREADY_EXISTS       1   another writer was first (fencing, single-writer lock)
    ├── DeadlineExceeded   DEADLINE_EXCEEDED    4   the time was over before the answer
    ├── Overloaded         RESOURCE_EXHAUSTED   4   refused to protect the others; carries the pushback
    ├── Unavailable        UNAVAILABLE          4   a service we need does not answer
    └── Internal           INTERNAL             1   a bug of ours

A message says what came, what was expected and what to do. Expected absences are statuses, never exceptions.
"""

from __future__ import annotations

from typing import ClassVar


class Double11Error(Exception):
    """Base of every error double11 raises on purpose.

    what: what was being done or read, e.g. "items.parquet, column price".
    came, expected: the two halves of the contradiction, in words.
    fix: one sentence with the next step for the reader; a command where there is one.
    """

    code: ClassVar[str] = "INTERNAL"
    grpc_status: ClassVar[str] = "INTERNAL"
    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, came: object, expected: str, fix: str) -> None:
        self.what, self.came, self.expected, self.fix = what, str(came), expected, fix
        super().__init__(f"{what}: got {self.came}; expected {expected}. {fix}")

    def as_json(self) -> dict[str, dict[str, str]]:
        """The form every command prints with --json: {"error": {"code", "message", "fix"}}."""
        message = f"{self.what}: got {self.came}; expected {self.expected}."
        return {"error": {"code": self.code, "message": message, "fix": self.fix}}


class BadInput(Double11Error):
    """The caller's input is wrong and the caller can mend it."""

    code, grpc_status, exit_code = "BAD_INPUT", "INVALID_ARGUMENT", 2


class NotFound(Double11Error):
    """Something named by the caller does not exist."""

    code, grpc_status, exit_code = "NOT_FOUND", "NOT_FOUND", 2


class VersionMismatch(Double11Error):
    """Two parts were made for different versions, dimensions or datasets."""

    code, grpc_status, exit_code = "VERSION_MISMATCH", "FAILED_PRECONDITION", 2


class GateNotMet(Double11Error):
    """A gate (`replay --fail-if`, a benchmark target) was evaluated and not met."""

    code, grpc_status, exit_code = "GATE_NOT_MET", "ABORTED", 3


class CorruptData(Double11Error):
    """Bytes are present but fail a hash, a magic number or a parse."""

    code, grpc_status, exit_code = "CORRUPT_DATA", "DATA_LOSS", 1


class Conflict(Double11Error):
    """Another writer holds the lock or moved the offset first."""

    code, grpc_status, exit_code = "CONFLICT", "ALREADY_EXISTS", 1


class DeadlineExceeded(Double11Error):
    """The deadline passed before the work was done."""

    code, grpc_status, exit_code = "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED", 4


class Overloaded(Double11Error):
    """Refused to protect the others. retry_after_ms: the pushback; -1 = clients must not retry."""

    code, grpc_status, exit_code = "OVERLOADED", "RESOURCE_EXHAUSTED", 4

    def __init__(self, what: str, *, came: object, expected: str, fix: str, retry_after_ms: int = -1) -> None:
        self.retry_after_ms = retry_after_ms
        super().__init__(what, came=came, expected=expected, fix=fix)


class Unavailable(Double11Error):
    """A service this call needs does not answer."""

    code, grpc_status, exit_code = "UNAVAILABLE", "UNAVAILABLE", 4


class Internal(Double11Error):
    """A broken invariant of ours."""

    code, grpc_status, exit_code = "INTERNAL", "INTERNAL", 1
