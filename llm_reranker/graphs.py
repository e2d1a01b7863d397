"""The forward of one request, recorded once per bucket of sizes and played back: CUDA graphs. Heavy: torch.

A small model's kernels are shorter than the time it takes to launch them one by one; a recorded forward is one launch.
Nothing is decoded, so all that there is to record are two prefills: of a context, and of the candidates that see it.
Sizes are filled up to a bucket's. A recorded forward reads and writes the same places of the device's memory each time.

Shape legend: P prefix tokens, N candidates, S tokens of a candidate, T tokens, D hidden, G key/value heads, d head_dim.
Source: https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_reranker.attention import FilledUp, KeyValues, PackedCausal
from llm_reranker.model import Model

_WARM_UP = 2  # forwards before one is recorded: libraries choose kernels and take memory in the first ones
_STEP = 8

# computes once and says how to do it again: the same tensors, filled anew
Recorder = Callable[[Callable[[], list[Tensor]]], tuple[Callable[[], None], list[Tensor]]]


def cuda_graph(run: Callable[[], list[Tensor]]) -> tuple[Callable[[], None], list[Tensor]]:
    """Record a forward on the current CUDA device. Raises: RuntimeError where it waits for the host."""
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(_WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    return graph.replay, outputs


@dataclass(frozen=True, slots=True)
class _Recorded:
    """inputs and prefix are filled before `play`, after which outputs are there until the next."""

    inputs: dict[str, Tensor]
    prefix: KeyValues
    play: Callable[[], None]
    outputs: list[Tensor]


class Graphs:
    """Recorded forwards of one model, the least recently used dropped first. Not thread-safe."""

    def __init__(self, model: Model, *, graphs_max: int, record: Recorder = cuda_graph) -> None:
        self._model, self._graphs_max, self._record = model, graphs_max, record
        self._recorded: OrderedDict[tuple[int, ...], _Recorded] = OrderedDict()

    def __len__(self) -> int:
        return len(self._recorded)

    def prefix(self, ids: Sequence[int]) -> KeyValues:
        """Keys and values of a context, k_GPd and v_GPd of each layer."""
        p = _bucket(len(ids))
        graph = self._of((p,), lambda: self._prefix(p))
        graph.inputs["ids"][: len(ids)].copy_(torch.tensor(ids, dtype=torch.long))  # none sees what comes after it
        graph.play()
        pairs = zip(graph.outputs[::2], graph.outputs[1::2], strict=True)
        return [(k[:, : len(ids)].clone(), v[:, : len(ids)].clone()) for k, v in pairs]

    def states(self, prefix: KeyValues, suffix_TD: Tensor, lengths: Sequence[int]) -> Tensor:
        """Final states [N, D] of each candidate's last token, as model.hidden gives them behind a SharedPrefix.

        suffix_TD: input vectors, candidates of these lengths one after another.
        """
        before = prefix[0][0].shape[1]
        p, n, s = _bucket(before), _bucket(len(lengths)), _bucket(max(lengths))
        graph = self._of((p, n, s), lambda: self._states(p, n, s))
        at = graph.inputs
        for (k, v), (k_kept, v_kept) in zip(graph.prefix, prefix, strict=True):
            k[:, :before].copy_(k_kept)
            v[:, :before].copy_(v_kept)
        length_N = torch.ones(n, dtype=torch.long)  # of what fills up one token is there, to be seen by itself
        length_N[: len(lengths)] = torch.tensor(lengths)
        step_S, start_N = torch.arange(s), torch.arange(n) * s
        real_NS = step_S < length_N[:, None]
        row_T = real_NS[: len(lengths)].flatten().nonzero()[:, 0]
        at["x"].zero_().index_copy_(0, row_T.to(suffix_TD.device), suffix_TD)
        at["position"].copy_((before + step_S).clamp_(max=self._model.positions - 1).repeat(n))
        at["prefix_bias"].copy_(_bias(torch.arange(p) < before))
        at["own_bias"].copy_(_bias(real_NS))
        at["last"].copy_(start_N + length_N - 1)
        graph.play()
        return graph.outputs[0][: len(lengths)].clone()

    def _of(self, key: tuple[int, ...], make: Callable[[], _Recorded]) -> _Recorded:
        found = self._recorded.get(key)
        if found is None:
            found = self._recorded[key] = make()
            if len(self._recorded) > self._graphs_max:
                self._recorded.popitem(last=False)
        self._recorded.move_to_end(key)
        return found

    def _prefix(self, p: int) -> _Recorded:
        model = self._model
        inputs = {"ids": torch.zeros(p, dtype=torch.long, device=model.device)}
        at = torch.arange(p, device=model.device).clamp_(max=model.positions - 1)

        def run() -> list[Tensor]:
            context = PackedCausal([p], states=False, device=model.device)
            model.hidden(model.embed(inputs["ids"]), at, context)
            return [x for pair in context.kept[0] for x in pair]

        return _Recorded(inputs, [], *self._record(run))

    def _states(self, p: int, n: int, s: int) -> _Recorded:
        model, c = self._model, self._model.config
        zeros = functools.partial(torch.zeros, dtype=model.embed_VD.dtype, device=model.device)
        inputs = {
            "x": zeros(n * s, c.hidden_size),
            "position": torch.zeros(n * s, dtype=torch.long, device=model.device),
            "prefix_bias": zeros(p),
            "own_bias": zeros(n, s),
            "last": torch.arange(n, device=model.device) * s,
        }
        shape = (c.num_key_value_heads, p, c.head_dim)
        prefix = [(zeros(*shape), zeros(*shape)) for _ in range(c.num_hidden_layers)]
        attention = FilledUp(prefix, inputs["prefix_bias"], inputs["own_bias"], inputs["last"])

        def run() -> list[Tensor]:
            return [model.hidden(inputs["x"], inputs["position"], attention)]

        return _Recorded(inputs, prefix, *self._record(run))


def _bucket(size: int) -> int:
    """What a size is filled up to: at most a quarter more, four buckets from one power of two to the next."""
    step = max(_STEP, 1 << max(0, size.bit_length() - 3))
    return -(-size // step) * step


def _bias(real: Tensor) -> Tensor:
    """0 where there is something to see, -inf elsewhere."""
    return torch.zeros(real.shape).masked_fill_(~real, -torch.inf)
