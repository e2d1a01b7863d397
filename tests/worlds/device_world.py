"""A device that is not the CPU, where no GPU is: numbers are the CPU's, manners are CUDA's.

What lies on the device and what lies in the host's memory never meet in one operation, nothing of the device becomes a
numpy array, and the kernels that only CUDA has are asked for what CUDA's ask for. Speed, streams and recording are not
like CUDA's at all. Source: torch.utils.backend_registration, the names for a backend that is written in Python.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _DummyPrivateUse1Hook,
    _setup_privateuseone_for_python_backend,
)

from llm_reranker import checkpoint
from llm_reranker.config import RerankConfig
from llm_reranker.engine import Engine
from llm_reranker.graphs import Graphs
from recsys.core.items import ItemTable

NAME = "elsewhere"
_ALIGNED = 8  # numbers: of a mask's rows, for CUDA's kernel
_INDEXED = ("aten::index", "aten::index_put_")  # take places from the host on CUDA too


class There(Tensor):
    """A tensor of the device; `here` is where its numbers really are."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> There:
        with torch.inference_mode(False):  # views of what was made outside of it are made inside
            made: There = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls, here.size(), strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype,
                device=torch.device(NAME, 0),
            )  # fmt: skip
        made.here = here
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute on the CPU what may be computed on the device."""
        in_parts = func.decompose(*args, **kwargs or {})  # under inference_mode what is made of others comes whole
        return _computed(func, args, kwargs or {}) if in_parts is NotImplemented else in_parts


def _here(x: Any) -> Any:
    return x.here if isinstance(x, There) else x


def _there(x: Any) -> Any:
    return There(x) if isinstance(x, Tensor) else x


def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name
    to = kwargs.pop("device", None) if name == "aten::_to_copy" else kwargs.get("device")
    plain = tree_map(_here, (args, kwargs))
    if name == "aten::_to_copy":
        made = func(*plain[0], **plain[1])
        return made if to is not None and torch.device(to).type == "cpu" else There(made)
    if name == "aten::copy_":
        func(*plain[0], **plain[1])
        return args[0]
    host = [
        x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor) and not isinstance(x, There) and x.dim()
    ]
    if host and name not in _INDEXED:
        raise RuntimeError(f"{name}: a tensor of the host, {tuple(host[0].shape)}, beside one of the device")
    if to is not None:
        plain[1]["device"] = torch.device("cpu")
    if name == "aten::histc":  # of whole numbers too
        return There(func(plain[0][0].double(), *plain[0][1:], **plain[1]).to(plain[0][0].dtype))
    if name == "aten::_scaled_dot_product_efficient_attention":
        return tree_map(_there, _attention(*plain[0]))
    return return_and_correct_aliasing(func, args, kwargs, tree_map(_there, func(*plain[0], **plain[1])))


def _attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, with_lse: bool) -> tuple[Tensor, ...]:
    """As CUDA's kernel: as many heads of keys as of queries, a mask whose rows are aligned, a padded last axis."""
    assert q.shape[:2] == k.shape[:2] == v.shape[:2]
    score = q.float() @ k.float().transpose(-1, -2) / math.sqrt(q.shape[-1])
    if bias is not None:
        assert bias.shape == score.shape, "the kernel expands nothing"
        assert bias.dtype == q.dtype
        assert bias.stride(-1) == 1
        assert not any(stride % _ALIGNED for stride in bias.stride()[:-1]), f"a mask of strides {bias.stride()}"
        score = score + bias
    lse = score.logsumexp(-1) if with_lse else score.new_empty(*q.shape[:2], 0)
    lse = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=math.inf)
    return (score.softmax(-1) @ v.float()).to(q.dtype), lse, torch.zeros(()), torch.zeros(())


def _empty(size: Any, dtype: torch.dtype | None = None, *_: Any, **__: Any) -> There:
    return There(torch.empty(size, dtype=dtype))


def _empty_strided(size: Any, stride: Any, dtype: torch.dtype | None = None, *_: Any, **__: Any) -> There:
    return There(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source: Tensor, to: Tensor, non_blocking: bool = False) -> Tensor:
    _here(to).copy_(_here(source))
    return to


class _Nowhere(_DummyBackendModule):  # type: ignore[misc, unused-ignore]
    """Nobody who looks for an accelerator finds this one."""

    def is_available(self) -> bool:
        return False

    def device_count(self) -> int:
        return 0


class _Hook(_DummyPrivateUse1Hook):  # type: ignore[misc, unused-ignore]
    def is_built(self) -> bool:
        return False

    def is_available(self) -> bool:
        return False


@functools.cache
def elsewhere() -> torch.device:
    """The device, made known to torch once."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Nowhere(), hook=_Hook())
    library = torch.library.Library("aten", "IMPL")
    for operator, made in (
        ("empty.memory_format", _empty), ("empty_strided", _empty_strided), ("_copy_from", _copy_from),
    ):  # fmt: skip
        library.impl(operator, made, "PrivateUse1")
    _kept.append(library)
    return torch.device(NAME, 0)


_kept: list[object] = []  # what torch forgets with its last reference


def played_again(run: Callable[[], list[Tensor]]) -> tuple[Callable[[], None], list[Tensor]]:
    """A Recorder (llm_reranker.graphs) where nothing can be recorded: computes again, into the same tensors."""
    outputs = run()

    def play() -> None:
        for kept, new in zip(outputs, run(), strict=True):
            kept.copy_(new)

    return play, outputs


def engine_elsewhere(folder: Path, items: ItemTable) -> Engine:
    """A reranker's folder on the device, in bfloat16, played back."""
    config = RerankConfig(device="cuda", precision="bf16")
    loaded = checkpoint.read(folder, precision=config.precision, device=elsewhere())
    engine = Engine(loaded, items, config, version=loaded.card.version if loaded.card else folder.name)
    engine._graphs = Graphs(loaded.model, graphs_max=4, record=played_again)
    return engine
