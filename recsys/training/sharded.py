"""A net whose embedding tables are spread over the ranks by TorchRec, with its optimizers.

TorchRec's planner chooses who holds which rows (on CUDA also: which tables or columns), DistributedModelParallel cuts
the tables, and the fused kernel updates rows during the backward pass. The dense part is a copy on every rank whose
gradients are summed. One rank is the same code with nothing to exchange. Of what several exchange, two things travel
while they compute: the next batch's ids (`send`), and the dense gradients, which are there before those of the tables.

The numbers a table starts from depend on seed, table and row alone, so they are the same for any number of ranks, and
no rank ever holds a whole table.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Literal, TypeVar, cast
from weakref import proxy

import psutil
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.autograd.graph import register_multi_grad_hook
from torch.distributed.nn.functional import all_to_all_single
from torchrec import KeyedJaggedTensor
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_sharding import BaseEmbeddingDist, EmbeddingShardingContext
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.sharding.rw_sharding import RwPooledEmbeddingDist
from torchrec.distributed.types import Awaitable, NoWait, ShardingEnv

from recsys.core import BadInput
from recsys.core.ids import key
from recsys.models.embeddings import dense_parameters, fuse_optimizer, start_rows, table_configs
from recsys.training.ranks import Ranks

Sharding = Literal["auto", "row_wise", "table_wise", "column_wise"]
_TYPES: tuple[str, ...] = ("row_wise", "table_wise", "column_wise")
_BLOCK_ROWS = 4_096  # rows that one generator fills
_RESERVED = 0.15  # share of memory left to activations and the dense part
N = TypeVar("N", bound=nn.Module)

for _noisy in ("torchrec.distributed.planner.types", "torchrec.distributed.planner.storage_reservations"):
    logging.getLogger(_noisy).setLevel(logging.ERROR)  # advice to whoever writes planners
warnings.filterwarnings(
    "ignore", "Please use DTensor instead", FutureWarning
)  # TorchRec's sharded tables are no DTensors


class _PooledSum(BaseEmbeddingDist[EmbeddingShardingContext, Tensor, Tensor]):  # type: ignore[misc]
    """Sums the bags that every rank has of its rows: an all-to-all and a sum, gloo's reduce-scatter takes longer."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self._group = group

    def forward(self, local_embs: Tensor, sharding_ctx: EmbeddingShardingContext | None = None) -> Awaitable[Tensor]:
        """All ranks' bags [B, D] as this rank pooled them, to its own bags [b, D] with everybody's rows in them."""
        assert sharding_ctx is not None, "TorchRec gives it with row-wise bags"
        bags = sharding_ctx.batch_size_per_rank
        own, size = bags[self._group.rank()], len(bags)
        parts = local_embs.new_empty(size * own, local_embs.shape[1])
        parts = all_to_all_single(parts, local_embs, [own] * size, bags, self._group)  # type: ignore[no-untyped-call]
        return NoWait(parts.view(size, own, -1).sum(dim=0))


class _BagSharder(EmbeddingBagCollectionSharder):  # type: ignore[misc]
    """Allows row-wise bags on CPU, which TorchRec leaves out."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """Sharding types by device."""
        return [*super().sharding_types(compute_device_type), "row_wise"]

    def shard(self, module: Any, params: Any, env: ShardingEnv, *rest: Any, **others: Any) -> Any:
        """As TorchRec does, but for the exchange of pooled rows on CPU."""
        made = super().shard(module, params, env, *rest, **others)
        if env.process_group is not None and env.process_group.size() > 1 and made._device.type == "cpu":
            made._output_dists = [
                _PooledSum(env.process_group) if isinstance(d, RwPooledEmbeddingDist) else d for d in made._output_dists
            ]
        return made


@dataclass(slots=True)
class _Sent:
    """Ids on their way. how_many: what is on its way first, the numbers of ids; rows: the ids, once those are here."""

    ids: KeyedJaggedTensor
    context: Any
    how_many: Any
    rows: Any = None

    def go_on(self) -> Any:
        """Send the ids themselves, unless they are on their way."""
        if self.rows is None:
            self.rows = self.how_many.wait()
        return self.rows


class Sharded(Generic[N]):
    """A net in training. net: its tables are sharded TorchRec modules; call its methods as those of the plain net."""

    def __init__(
        self, plain: N, ranks: Ranks, *, table_learning_rate: float, seed: int, batch_size: int, sharding: Sharding
    ) -> None:
        """plain: with one module of tables, `tables`, on the meta device. batch_size: of one rank, for the planner.

        Raises: BadInput when the tables fit into the ranks in no way.
        """
        fuse_optimizer(plain.tables, table_learning_rate)  # type: ignore[arg-type]
        self.ranks, self._names = ranks, [c.name for c in table_configs(cast(nn.Module, plain.tables))]
        sharders: list[Any] = [EmbeddingCollectionSharder(), _BagSharder()]
        self._parallel = DistributedModelParallel(
            plain,
            device=ranks.device,
            plan=_plan(plain, sharders, ranks, self._names, batch_size, sharding),
            sharders=sharders,
            env=ShardingEnv.from_process_group(ranks.group),
            init_data_parallel=False,  # TorchRec would wrap the net's forward; our nets have several entrances
        )
        self.net = cast(N, self._parallel.module)
        for name, weight in self._tables():
            for local, row, column in _local(weight):
                _fill(local, row, column, weight.size(1), seed=seed, table=name)
        self.dense = dense_parameters(self.net, [cast(nn.Module, self.net.tables)])
        self._summing: tuple[Tensor, Any] | None = None  # dense gradients one after the other, and who sums them
        self._sent: _Sent | None = None
        if ranks.size > 1:
            self._received, self.net.tables.forward = self.net.tables.forward, self._receive  # type: ignore
            # Torch holds the hook where no cycle is found: with `self` in it, neither tables nor group would ever go.
            register_multi_grad_hook(self.dense, partial(Sharded._start_sum, proxy(self)))

    def send(self, ids: KeyedJaggedTensor) -> None:
        """Begin to send the ids of the next batch to the ranks that hold their rows; all ranks do so at the same place.

        They travel while this batch is worked on. The net's tables, called with this very object, wait for them.
        """
        if self.ranks.size > 1:
            tables = cast(Any, self.net.tables)
            context = tables.create_context()
            self._sent = _Sent(ids, context, tables.input_dist(context, ids))

    def backward(self, loss: Tensor) -> None:
        """Gradients of this rank's share of the loss; dense ones are summed over ranks, table rows are updated."""
        if self._sent is not None:
            self._sent.go_on()
        torch.autograd.backward(loss)
        self.reduce()

    def reduce(self) -> None:
        """Wait for the sum over ranks of the dense gradients, which began when the last of them was there."""
        if self._summing is None:
            return
        summed, work = self._summing
        work.wait()
        start = 0
        for parameter in self.dense:
            parameter.grad = summed[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()
        self._summing = None

    def _start_sum(self, grads: Sequence[Tensor | None]) -> None:
        there = [torch.zeros_like(p) if g is None else g for p, g in zip(self.dense, grads, strict=True)]
        summed = nn.utils.parameters_to_vector(there)
        self._summing = summed, self.ranks.start_sum(summed)

    def _receive(self, ids: KeyedJaggedTensor) -> Any:
        """The forward of the tables, as TorchRec's train pipelines replace it, too."""
        sent, self._sent = self._sent, None
        if sent is None or sent.ids is not ids:
            return self._received(ids)
        return cast(Any, self.net.tables).compute_and_output_dist(sent.context, sent.go_on().wait())

    def state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Everything training has made: name to tensor or sharded tensor, to be saved or loaded in place.

        optimizer: of `dense`; moments it has not made yet are made, as zeros.
        """
        state = {f"net.{n}": t for n, t in self._parallel.state_dict().items()}
        for moments in self._parallel.fused_optimizer.state_dict()["state"].values():
            state |= {f"tables.{n}": t for n, t in moments.items()}
        names = {id(p): n for n, p in self.net.named_parameters()}
        for parameter in self.dense:
            made = optimizer.state[parameter]
            if not made:
                made |= {"step": torch.tensor(0.0)} | {
                    m: torch.zeros_like(parameter) for m in ("exp_avg", "exp_avg_sq")
                }
            state |= {f"dense.{names[id(parameter)]}.{n}": t for n, t in made.items()}
        return state

    @torch.no_grad()
    def fill(self, whole: Mapping[str, Tensor]) -> None:
        """Start from the weights of a plain net."""
        for name, tensor in self._parallel.state_dict().items():
            for local, row, column in _local(tensor) if hasattr(tensor, "local_shards") else [(tensor, 0, 0)]:
                source = whole[name]
                if local.dim() == 2 and hasattr(tensor, "local_shards"):
                    source = source[row : row + local.shape[0], column : column + local.shape[1]]
                local.copy_(source)

    def table(self, name: str) -> tuple[Tensor, Tensor]:
        """A table and its row accumulators, as one rank has them: views, what is written into them counts."""
        assert self.ranks.size == 1, "rows are on several ranks"
        weight = next(t for n, t in self._tables() if n == name).local_shards()[0].tensor
        for moments in self._parallel.fused_optimizer.state_dict()["state"].values():
            if f"{name}.momentum1" in moments:
                return weight, moments[f"{name}.momentum1"].local_shards()[0].tensor
        raise AssertionError("every table has an accumulator")

    def whole(self) -> dict[str, Tensor]:
        """The plain net's state on rank 0, tables gathered there; nothing on the others."""
        whole: dict[str, Tensor] = {}
        for name, tensor in self._parallel.state_dict().items():
            if isinstance(tensor, Tensor) and not hasattr(tensor, "local_shards"):
                whole[name] = tensor.detach().cpu()
                continue
            out = torch.empty(tensor.size(), device=self.ranks.device) if self.ranks.leads else None
            tensor.gather(dst=0, out=out)
            if out is not None:
                whole[name] = out.cpu()
        return whole if self.ranks.leads else {}

    def placement(self) -> dict[str, str]:
        """Table to how it is cut, as the planner chose."""
        plan = next(iter(self._parallel.plan.plan.values()))
        return {name: plan[name].sharding_type for name in self._names}

    def _tables(self) -> Iterator[tuple[str, Any]]:
        for path, tensor in self._parallel.state_dict().items():
            if hasattr(tensor, "local_shards"):
                yield path.split(".")[-2], tensor


def _plan(
    net: nn.Module, sharders: list[Any], ranks: Ranks, names: list[str], batch_size: int, sharding: Sharding
) -> Any:
    # The planner reckons with bytes. On gloo what counts is how many exchanges there are, and each kind has its own.
    kinds = [sharding] if sharding != "auto" else list(_TYPES if ranks.device.type == "cuda" else _TYPES[:1])
    fused = [EmbeddingComputeKernel.FUSED.value]
    planner = EmbeddingShardingPlanner(
        topology=Topology(
            world_size=ranks.size,
            local_world_size=ranks.local_size,
            compute_device=ranks.device.type,
            ddr_cap=psutil.virtual_memory().total // ranks.local_size,
        ),
        batch_size=batch_size,
        storage_reservation=FixedPercentageStorageReservation(_RESERVED),
        constraints={n: ParameterConstraints(sharding_types=kinds, compute_kernels=fused) for n in names},
    )
    try:
        return planner.collective_plan(net, sharders, ranks.group)
    except PlannerError as error:
        raise BadInput(
            "embedding tables",
            came=str(error).strip().splitlines()[0],
            expected=f"tables that fit {ranks.size} ranks",
            fix="Add ranks or memory, or make the tables smaller (models.tower.dim, models.tower.item_rows_max).",
        ) from error


def _local(weight: Any) -> Iterator[tuple[Tensor, int, int]]:
    """The parts of a sharded table that this rank has, with the row and the column they start at."""
    for shard in weight.local_shards():
        yield shard.tensor, *shard.metadata.shard_offsets


@torch.no_grad()
def _fill(local: Tensor, row: int, column: int, dim: int, *, seed: int, table: str) -> None:
    rows, columns = local.shape
    first = row // _BLOCK_ROWS * _BLOCK_ROWS
    for start in range(first, row + rows, _BLOCK_ROWS):
        generator = torch.Generator().manual_seed(key(f"{seed}/{table}/{start}") % (1 << 62))
        block = start_rows(torch.empty(_BLOCK_ROWS, dim), generator)
        low, high = max(start, row), min(start + _BLOCK_ROWS, row + rows)
        local[low - row : high - row] = block[low - start : high - start, column : column + columns]
