"""The processes that train one model together: who is here, whose share is whose, sums over all of them.

One process is a group of one, so that training is written once. Under torchrun (RANK and WORLD_SIZE are set) the group
is the launcher's, on one host or several; all ranks see the same batches and each works on its share.

Shape legend: B rows of a batch, b rows of this rank's share, D dimension.
"""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.optim  # if first imported inside a group, it keeps that one: as the default of an argument
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torchrec.distributed.comm_ops import set_gradient_division

from recsys.core import BadInput
from recsys.core.memory import keep_freed_memory

# Gloo's threads end with the last reference to their group. One that lets go of a tensor when the interpreter is being
# taken down aborts the process (pytorch #190489), so what only cycles hold is collected before that.
atexit.register(gc.collect)

_TIMEOUT = timedelta(minutes=30)  # the slowest rank may prepare that many windows more than the fastest


@dataclass(frozen=True, slots=True)
class Ranks:
    """A process among `size` that train together; rank 0 leads and writes. local_size: ranks on its host."""

    rank: int
    size: int
    local_size: int
    device: torch.device
    group: dist.ProcessGroup

    @property
    def leads(self) -> bool:
        """True on the one rank that writes."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """The contiguous part of `count` things that is this rank's; parts differ by one at most."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def counts(self, count: int) -> list[int]:
        """How many of `count` things each rank has."""
        edges = [count * r // self.size for r in range(self.size + 1)]
        return [stop - start for start, stop in pairwise(edges)]

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(value, group=self.group)
        return value

    def start_sum(self, value: Tensor) -> dist.Work:
        """Begin to sum a tensor over all ranks, in place; it is the sum once what is returned has been waited for."""
        work: dist.Work | None = dist.all_reduce(value, group=self.group, async_op=True)
        assert work is not None, "this rank is of the group"
        return work

    def gathered(self, parts: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
        """Of each part every rank's rows [b, D] in rank order as [B, D], B its count; gradients find their way back.

        All parts go in one exchange.
        """
        if self.size == 1:
            return list(parts)
        heights = [self.counts(count) for count in counts]  # by part, then rank
        rows: Tensor = _Gathered.apply(torch.cat(list(parts)), [sum(h) for h in zip(*heights, strict=True)], self)  # type: ignore[no-untyped-call]
        blocks = torch.split(rows, [h for of_rank in zip(*heights, strict=True) for h in of_rank])
        return [torch.cat(blocks[part :: len(heights)]) for part in range(len(heights))]

    @contextmanager
    def own_cores(self) -> Iterator[None]:
        """Share this host's cores out among its ranks, where there are enough: the kernel puts two of them on one."""
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        if self.device.type != "cpu" or not 1 < self.local_size <= len(cores):
            yield
            return
        edges = [len(cores) * (self.rank % self.local_size + after) // self.local_size for after in (0, 1)]
        _move_threads(cores[slice(*edges)])
        try:
            yield
        finally:
            _move_threads(cores)

    def wait_for_all(self) -> None:
        """Return when every rank is here."""
        if self.size > 1:
            dist.barrier(self.group)


def launched() -> tuple[int, int] | None:
    """(rank, size) where torchrun, or another launcher that sets RANK and WORLD_SIZE, started this process."""
    rank, size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    return (int(rank), int(size)) if rank is not None and size is not None else None


@contextmanager
def joined(device: str = "cpu") -> Iterator[Ranks]:
    """The launcher's group, or a group of this process alone where there is none.

    device: cpu (gloo) or cuda (nccl, one device per rank).
    Raises: BadInput for cuda without a device.
    """
    if launched() is None:
        with alone(device) as ranks:
            yield ranks
        return
    keep_freed_memory()
    dist.init_process_group(_backend(device), timeout=_TIMEOUT)
    _let_senders_finish()
    try:
        ranks = _ranks(device)
        yield ranks
        ranks.wait_for_all()  # nobody hangs up while another still reads
    finally:
        dist.destroy_process_group()


@contextmanager
def alone(device: str = "cpu") -> Iterator[Ranks]:
    """A group of this process alone; inside another one of one, that one.

    Raises: BadInput inside a group of several, who would have to do together what only this one does.
    """
    if not dist.is_initialized():
        keep_freed_memory()
        dist.init_process_group(_backend(device), store=HashStore(), rank=0, world_size=1)
        try:
            yield _ranks(device)
        finally:
            dist.destroy_process_group()
        return
    if dist.get_world_size() > 1:
        raise BadInput(
            "training on several hosts",
            came="a working folder without what another rank made",
            expected="OUT on a file system that all hosts share",
            fix="Choose an --out there.",
        )
    yield _ranks(device)


def _move_threads(cores: Iterable[int]) -> None:
    """Have all threads of this process, gloo's too, run on these cores."""
    for thread in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):  # it has ended meanwhile
            os.sched_setaffinity(int(thread), cores)


def _let_senders_finish() -> None:
    """Have gloo's event loops preempt nobody: threads of batch jobs wait for their turn.

    One that takes the core from a thread that is sending asks for the lock which that one holds, over and over, until
    the scheduler's next tick, 4 ms later (`handleEvents` in gloo's transport/tcp/pair.cc).
    """
    for thread in os.listdir("/proc/self/task") if hasattr(os, "SCHED_BATCH") else ():
        with suppress(ProcessLookupError, FileNotFoundError, PermissionError):  # ended meanwhile, or not ours to set
            if Path(f"/proc/self/task/{thread}/comm").read_text("utf-8").strip() == "gloo_tcp_loop":
                os.sched_setscheduler(int(thread), os.SCHED_BATCH, os.sched_param(0))


def _backend(device: str) -> str:
    if device == "cuda" and not torch.cuda.is_available():
        raise BadInput("training.device", came="cuda", expected="a CUDA device", fix="Set [training] device to cpu.")
    set_gradient_division(False)  # losses are shares of one sum; TorchRec's default is the mean over ranks
    return "cuda:nccl,cpu:gloo" if device == "cuda" else "gloo"


def _ranks(device: str) -> Ranks:
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if dist.get_world_size() > 1 else 1
    place = torch.device(device, int(os.environ.get("LOCAL_RANK", "0"))) if device == "cuda" else torch.device("cpu")
    return Ranks(dist.get_rank(), dist.get_world_size(), local_size, place, _world())


def _world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None, "called with a group"
    return group


class _Gathered(torch.autograd.Function):
    """All-gather of row blocks of different height; backward: each rank's block of the summed gradient."""

    @staticmethod
    def forward(ctx: Any, x_bD: Tensor, counts: list[int], ranks: Ranks) -> Tensor:
        ctx.counts, ctx.ranks = counts, ranks
        padded_bD = x_bD.new_zeros(max(counts), x_bD.shape[1])
        padded_bD[: len(x_bD)] = x_bD
        blocks = [torch.empty_like(padded_bD) for _ in counts]
        dist.all_gather(blocks, padded_bD, group=ranks.group)
        return torch.cat([block[:n] for block, n in zip(blocks, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad_BD: Tensor) -> tuple[Tensor, None, None]:
        summed_BD = ctx.ranks.sum(grad_BD.contiguous())
        start = sum(ctx.counts[: ctx.ranks.rank])
        return summed_BD[start : start + ctx.counts[ctx.ranks.rank]], None, None
