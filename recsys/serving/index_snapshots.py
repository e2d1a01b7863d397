"""[heavy] A scoring worker's snapshots: it starts from the newest one and the log behind it, not from the whole log.

One folder per worker; a thread writes a new one now and then, when something has changed since.
"""

from __future__ import annotations

import threading
from pathlib import Path

from recsys.candidates.nearest import snapshot
from recsys.candidates.nearest.sharded import Shard
from recsys.candidates.nearest.snapshot import Restored
from recsys.core import CorruptData, NotFound, VersionMismatch, metrics
from recsys.core.logging import get_logger
from recsys.models.config import IndexConfig, LiveIndexConfig
from recsys.serving.catalog import CatalogFollower
from recsys.serving.scoring_service import ScoringService

_log = get_logger(__name__)
_CLOSE_S = 5.0


def source_of(run_id: str, log_id: str, shard: Shard) -> str:
    """What a snapshot is of: run, log, and which items."""
    return f"{run_id}@{log_id}" + ("" if shard.whole else f"#{shard}")


def newest(root: Path, of: str, dim: int, config: IndexConfig, live: LiveIndexConfig) -> Restored | None:
    """The newest snapshot below `root`; None where there is none, or none that can be used: that is said and counted.

    of: what it must be of, see `source_of`.
    """
    try:
        restored = snapshot.read(root, run_id=of, dim=dim, config=config, live=live)
    except NotFound:
        return None
    except (CorruptData, VersionMismatch) as error:
        metrics.INDEX_SNAPSHOTS.labels("refused").inc()
        _log.warning("index_snapshot_refused", error=str(error), instead="the run and the whole log")
        return None
    metrics.INDEX_SNAPSHOTS.labels("restored").inc()
    _log.info("index_restored", root=str(root), items=len(restored.index), positions=dict(restored.positions))
    return restored


class Snapshots:
    """Writes a worker's snapshots. `start`, `close`."""

    def __init__(self, root: Path, of: str, service: ScoringService, follower: CatalogFollower, every_s: float) -> None:
        """of: see `source_of`. every_s: pause between two."""
        self._root, self._of, self._service, self._follower, self._every_s = root, of, service, follower, every_s
        self._written = service.positions
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="index-snapshots", daemon=True)

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def close(self) -> None:
        """Write no more. One that is being written is left behind without its final name."""
        self._stop.set()
        self._thread.join(_CLOSE_S)

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            positions = dict(self._follower.positions())
            if positions == self._written or not self._follower.live.trusted:
                continue
            try:
                self._service.write_snapshot(self._root, self._of, positions)
            except OSError as error:
                metrics.INDEX_SNAPSHOTS.labels("failed").inc()
                _log.error("index_snapshot_failed", root=str(self._root), error=str(error))
                continue
            self._written = positions
            metrics.INDEX_SNAPSHOTS.labels("written").inc()
