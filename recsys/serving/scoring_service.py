"""ScoringService [heavy]: user tower + FAISS and the ranker of one run; of FAISS perhaps one shard."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import faiss
import grpc
import numpy as np
import numpy.typing as npt
import torch
from double11.v1 import scoring_pb2 as pb
from double11.v1 import scoring_pb2_grpc as pb_grpc

from recsys.candidates.nearest import snapshot
from recsys.candidates.nearest.live import DEFAULT, DEFAULT_LIVE, LiveIndex
from recsys.candidates.nearest.monitor import RecallMonitor
from recsys.candidates.nearest.sharded import WHOLE, Shard
from recsys.candidates.nearest.snapshot import Restored
from recsys.candidates.nearest.static import AnnIndex, other_dimension
from recsys.core import BadInput, Deadline, Overloaded, RunDirectory
from recsys.core.attributes import attributes_of
from recsys.core.items import ItemTable
from recsys.models.cold import ColdItems
from recsys.models.config import IndexConfig, LiveIndexConfig
from recsys.models.delta import target_of
from recsys.models.embeddings import UNKNOWN_ROW
from recsys.models.ranker import Ranker
from recsys.models.text.build import encoder_of
from recsys.models.tower import Tower
from recsys.ranking.live import NEW_ITEMS_MAX, LiveCatalogue
from recsys.serving.compute import ComputeThread
from recsys.serving.config import WorkerConfig
from recsys.serving.live_items import LiveItems
from recsys.serving.remote import HISTORY_ITEMS_MAX, where_of
from recsys.serving.wire import deadline_of

_REINDEXED_ITEMS_MAX = 4_096  # at once: requests wait meanwhile
_RETRIEVE_ITEMS_MAX = 10_000  # of scoring.proto
Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
History = tuple[npt.NDArray[np.int64], npt.NDArray[np.int8], npt.NDArray[np.int64]]


class ScoringService(pb_grpc.ScoringServiceServicer):
    """Nearest items and ranker scores of one run."""

    def __init__(
        self,
        run: RunDirectory,
        config: WorkerConfig,
        index: IndexConfig = DEFAULT,
        live: LiveIndexConfig = DEFAULT_LIVE,
        *,
        shard: Shard = WHOLE,
        new_items_max: int = NEW_ITEMS_MAX,
        restore: Callable[[int], Restored | None] = lambda _: None,
    ) -> None:
        """Load the models, and the shard's items into the index.

        restore: gives a snapshot of the index, by dimension, or None to take the run's.

        Raises: NotFound, CorruptData, VersionMismatch, Unavailable (a device that is not there).
        """
        torch.set_num_threads(config.threads)
        self._tower, self._ranker = Tower.load(run), Ranker.load(run)
        items, restored = ItemTable.read(run.path("items.parquet")), restore(self._tower.dim)
        cold = ColdItems(self._tower, items, encoder_of(run))
        if not shard.whole:
            items = items.where(shard.holds(items.item_key))
        if restored is None:
            base = AnnIndex.load(run, index, shard)
            if base.dim != self._tower.dim:
                raise other_dimension(f"a tower of dimension {self._tower.dim}", base.dim)
            restored = Restored(LiveIndex(base, attributes_of(items, base.row_key), config=index, live=live))
        self._shard, self._index, self.positions = shard, restored.index, restored.positions
        self.items = LiveItems(self._index, cold, LiveCatalogue(items, new_items_max), shard)
        self._monitor = RecallMonitor(self._index, live)
        self._moved = set[int]()  # items that a delta has given another vector than the run's
        self._stale = dict[int, None]()  # items whose row has changed since the index has their vector; oldest first
        self.models = target_of(run.run_id, self._tower, self._ranker, on_rows=self._row_changed)
        if restored.more:
            self.items.restore(restored.more)
            self._as_of_the_run(restored.more["moved"])
        self._warm_up()
        self._config = config
        self.compute = ComputeThread(config.queue_items_max, partial(faiss.omp_set_num_threads, config.threads))

    async def Retrieve(self, request: pb.RetrieveRequest, context: Context) -> pb.RetrieveResponse:  # noqa: N802
        """Nearest items to the user's vector, excluded ones left out."""
        if not 1 <= request.limit <= _RETRIEVE_ITEMS_MAX:
            raise BadInput(
                "RetrieveRequest.limit", came=request.limit, expected=f"1 to {_RETRIEVE_ITEMS_MAX}", fix="Correct it."
            )
        history = _history(request)
        exclude, where = np.array(request.exclude_keys, np.int64), where_of(request.filter)

        def search() -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
            vector = self._tower.encode_user(*history, request.as_of_us)
            found, score = self._index.search(vector[None, :], request.limit + len(exclude), where)
            keep = np.flatnonzero((found[0] >= 0) & ~np.isin(found[0], exclude))[: request.limit]
            return found[0][keep], score[0][keep]

        item_key, score = await self.compute.run("Retrieve", search, self._deadline(context))
        return pb.RetrieveResponse(
            item_keys=item_key.tolist(),
            scores=score.tolist(),
            version=self._version(self._tower.version),
            shard=self._shard.number,
            num_shards=self._shard.count,
        )

    async def Rank(self, request: pb.RankRequest, context: Context) -> pb.RankResponse:  # noqa: N802
        """Scores of N rows."""
        n, f = len(request.item_keys), len(request.feature_names)
        if len(request.features_f32) != n * f * 4:
            raise BadInput(
                "RankRequest.features_f32",
                came=f"{len(request.features_f32)} bytes",
                expected=f"{n} items x {f} features x 4 bytes",
                fix="Use the gateway of the same release.",
            )
        values = np.frombuffer(request.features_f32, "<f4").reshape(n, f).copy()  # torch wants writable memory
        item_key, history = np.array(request.item_keys, np.int64), _history(request)

        def score() -> npt.NDArray[np.float32]:
            return self._ranker.score(values, tuple(request.feature_names), item_key, *history, request.as_of_us)

        scores = await self.compute.run("Rank", score, self._deadline(context))
        return pb.RankResponse(scores=scores.tolist(), version=self._version(self._ranker.version))

    def take_delta(self, part: bytes) -> bool:
        """Take a record of the deltas topic; true when it completed a delta, now in the models and in the index.

        To be called on the compute thread. Raises: as `DeltaTarget.offer`.
        """
        applied = self.models.offer(part)
        if applied:
            self.reindex()
        return applied

    def reindex(self) -> int:
        """Give the index new vectors of items whose rows have changed, a bounded number; how many are left.

        To be called on the compute thread. When the index has no room they wait for its rebuild.
        """
        some = np.fromiter(islice(self._stale, min(self._index.room_items_max, _REINDEXED_ITEMS_MAX)), np.int64)
        if len(some):
            try:
                self._index.move(some, self._tower.encode_items(some))
            except Overloaded:
                return len(self._stale)
            for item_key in some.tolist():
                del self._stale[item_key]
        return len(self._stale)

    def _row_changed(self, table: str, rows: npt.NDArray[np.int64]) -> None:
        if table == "tower.item":
            known = rows[rows != UNKNOWN_ROW]
            self._tower.items.own(known)
            changed = self._tower.items.vocabulary.keys[known - 1]
            ours = changed[self._shard.holds(changed)].tolist()
            self._moved.update(ours)
            self._stale |= dict.fromkeys(ours)

    def write_snapshot(self, root: Path, of: str, positions: Mapping[int, int]) -> None:
        """Write the index and what was told, as far as `positions`, taken before. Raises: OSError."""
        more = self.items.capture() | {"moved": np.array(sorted(self._moved.copy()), np.int64)}
        snapshot.write(root, self._index, run_id=of, positions=positions, more=more)

    def _as_of_the_run(self, moved: npt.NDArray[np.int64]) -> None:
        """Give items that deltas had moved the vectors of the run: the deltas come again, with the user's side."""
        self._moved.update(moved.tolist())
        self._stale = dict.fromkeys(moved.tolist())
        while self.reindex():
            self._index.wait_rebuilt()

    def _version(self, loaded: str) -> str:
        return f"{loaded}+{self.models.sequence}" if self.models.sequence else loaded

    def _warm_up(self) -> None:
        """One pass through everything before readiness: pays lazy initialisation, and what does not fit fails now."""
        history: History = np.zeros(1, np.int64), np.ones(1, np.int8), np.zeros(1, np.int64)
        self._index.search(self._tower.encode_user(*history, 1)[None, :], 1)
        names = self._ranker.feature_names
        self._ranker.score(np.full((1, len(names)), np.nan, np.float32), names, np.zeros(1, np.int64), *history, 1)

    def close(self) -> None:
        """Finish the call being computed."""
        self.compute.close()
        self._monitor.close()

    def _deadline(self, context: Context) -> Deadline:
        return deadline_of(context, self._config.deadline_ms_default, self._config.deadline_ms_max)


def _history(request: pb.RetrieveRequest | pb.RankRequest) -> History:
    lengths = {len(request.history_keys), len(request.history_types), len(request.history_times_us)}
    if len(lengths) != 1 or max(lengths) > HISTORY_ITEMS_MAX:
        raise BadInput(
            "history columns",
            came=f"lengths {sorted(lengths)}",
            expected=f"one length, at most {HISTORY_ITEMS_MAX}",
            fix="Use the gateway of the same release.",
        )
    return (
        np.array(request.history_keys, np.int64),
        np.array(request.history_types, np.int8),
        np.array(request.history_times_us, np.int64),
    )
