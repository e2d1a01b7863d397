"""[heavy] Our Qwen3-MoE forward against transformers and llama.cpp on the same weights, and a rerank as it is served.

One user's prefix of 256 tokens, N candidates of 16, each contestant at its fastest setting: a sweep tries every one
first and is in the document. Candidates per second by wall time and by CPU time, cold (prefix computed) and warm. The
peer of a row is the faster one of its precision's peers; `median` has all of them. limit: the multiply-adds at the
speed of this machine's fastest plain product. Score cache and adaptive depth are the service's: off here.

Shape legend: N candidates, P prefix tokens, S tokens of a candidate.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from scipy.stats import kendalltau
from torch import Tensor

from llm_reranker.linear import kernels, linear
from llm_reranker.model import ModelConfig
from recsys.bench import rerank_llama_cpp as llama_cpp
from recsys.bench.harness import Row, sampled
from recsys.bench.rerank_cuda import LAYER, on_device
from recsys.bench.rerank_peers import Contestant, Ours, Transformers, random_model, tensors
from recsys.bench.rerank_served import served
from recsys.core import Internal
from recsys.core.memory import keep_freed_memory
from recsys.core.progress import bar

_HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}
SHAPES = {
    "8 experts of 256, top 2": {"hidden_size": 256, "num_hidden_layers": 4, **_HEADS, "num_experts": 8,
                                "num_experts_per_tok": 2, "moe_intermediate_size": 256},
    "32 experts of 128, top 4": {"hidden_size": 256, "num_hidden_layers": 4, **_HEADS, "num_experts": 32,
                                 "num_experts_per_tok": 4, "moe_intermediate_size": 128},
    "the default student": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
                            "num_key_value_heads": 2, "head_dim": 32, "num_experts": 8, "num_experts_per_tok": 2,
                            "moe_intermediate_size": 128},
}  # fmt: skip
_CANDIDATES, _PREFIX, _SUFFIX = (50, 100, 200), 256, 16
_PEERS = {"fp32": ("transformers", "llama.cpp F32"), "int8": ("transformers", "llama.cpp F32", "llama.cpp Q8_0")}
_OURS = {precision: f"double11 {precision}" for precision in _PEERS}
_TAU_MIN, _REPEATS, _GEMM, _GEMMS = 0.99, 7, 512, 50
Run = Callable[[], Tensor]


def bench(quick: bool, run_path: Path | None = None) -> tuple[dict[str, Any], list[Row]]:
    """Candidates per second of the forwards; milliseconds of served requests (of the run's reranker, where given)."""
    keep_freed_memory()  # as the rerank worker does; transformers gains as we do
    shapes = dict(list(SHAPES.items())[-1:]) if quick else SHAPES
    sizes, (p, s), repeats = ((6,), (24, 4), 2) if quick else (_CANDIDATES, (_PREFIX, _SUFFIX), _REPEATS)
    sweep: dict[str, dict[str, float]] = {}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="double11-bench-") as name:
        folder = Path(name)
        with torch.inference_mode(), bar(total=len(shapes) * len(sizes), what="bench", unit="shape") as progress:
            gemm = _gemm_flops_per_s()
            for shape, size in shapes.items():
                model = random_model(size)
                for n in sizes:
                    rows += _field(f"{shape}, {n} candidates", model, (n, p, s), repeats, gemm, folder, sweep)
                    progress.update(1)
        rows += served(folder, run_path, requests=8 if quick else 400)
    if torch.cuda.is_available() and not quick:
        with torch.inference_mode():
            rows += on_device(LAYER, candidates=100, prefix=p, suffix=s, repeats=repeats)
    peer = "ran" if llama_cpp.installed() else f"peer not installed: {llama_cpp.INSTALL}"
    config = {
        "shapes": shapes, "prefix_tokens": p, "candidate_tokens": s, "repeats": repeats, "kernels": kernels(),
        "threads": torch.get_num_threads(), "gemm_gflops": {k: v / 1e9 for k, v in gemm.items()}, "llama.cpp": peer,
        "sweep_candidates_per_s": sweep,
    }  # fmt: skip
    return config, rows


def _field(
    what: str,
    model: Any,
    counts: tuple[int, int, int],
    repeats: int,
    gemm: dict[str, float],
    folder: Path,
    sweep: dict[str, dict[str, float]],
) -> list[Row]:
    """All rows of one shape and number of candidates."""
    n, p, s = counts
    config = ModelConfig.from_json(model.config.to_dict(), "bench")
    weights = tensors(model, config)
    prefix_P, suffix_NS = torch.randint(0, config.vocab_size, (p,)), torch.randint(0, config.vocab_size, (n, s))
    with ExitStack() as stack:
        field: dict[str, Contestant] = {name: Ours(config, weights, of) for of, name in _OURS.items()}  # type: ignore[arg-type]
        tried = sweep[what] = {}
        for kind, contestants in _peers(model, config, weights, counts, folder, stack).items():
            for c in contestants:
                c.cold(prefix_P, suffix_NS)
                seconds = _cpu_s(lambda c=c: c.warm(suffix_NS))  # type: ignore[misc]
                tried[c.name] = round(n / seconds, 1)
            field[kind] = max(contestants, key=lambda c: tried[c.name])
        scores = {name: c.cold(prefix_P, suffix_NS) for name, c in field.items()}
        rows = [_tau(what, name, scores) for name in field if name != "transformers"]
        for state in ("cold", "warm"):
            runs: dict[str, Run] = {
                kind: (lambda c=c: c.cold(prefix_P, suffix_NS)) if state == "cold" else (lambda c=c: c.warm(suffix_NS))  # type: ignore[misc]
                for kind, c in field.items()
            }
            took = _timed(runs, repeats)
            flops = _flops(config, n, s, p) + (_flops(config, 1, p, 0, last=False) if state == "cold" else 0)
            names = {kind: c.name for kind, c in field.items()}
            rows += _rows(f"{what}, {state} prefix", n, took, names, {k: n / (flops / v) for k, v in gemm.items()})
    return rows


def _peers(
    model: Any, config: ModelConfig, weights: dict[str, Tensor], counts: tuple[int, int, int], folder: Path,
    stack: ExitStack,
) -> dict[str, list[Contestant]]:  # fmt: skip
    """Every setting of every peer, by kind."""
    n, p, s = counts
    found: dict[str, list[Contestant]] = {
        "transformers": [Transformers(model, w, e) for w in ("shared", "packed") for e in ("eager", "grouped_mm")]
    }
    if llama_cpp.installed():
        for kind in ("F32", "Q8_0"):
            path = folder / f"{kind}.gguf"
            llama_cpp.write_gguf(path, config, weights, kind)
            found[f"llama.cpp {kind}"] = [
                stack.enter_context(_opened(path, kind, setting, p + n * s, n + 1)) for setting in llama_cpp.SETTINGS
            ]
    return found


@contextmanager
def _opened(path: Path, kind: str, setting: llama_cpp.Setting, tokens: int, sequences: int) -> Iterator[Contestant]:
    contestant = llama_cpp.LlamaCpp(
        path, kind, setting, tokens_max=tokens, sequences=sequences, threads=torch.get_num_threads()
    )
    yield contestant
    contestant.close()


def _tau(what: str, name: str, scores: dict[str, Tensor]) -> Row:
    """Agreement of the order with transformers'. Raises: Internal where float32 forwards disagree: no fair race."""
    tau = float(kendalltau(scores[name], scores["transformers"]).statistic)
    if name == _OURS["fp32"] and tau < _TAU_MIN:
        raise Internal(f"{what}, order of {name}", came=tau, expected=f"tau >= {_TAU_MIN}", fix="Report it.")
    return sampled(f"{what}, order against transformers", "tau", {"ours": (name, [tau])})


def _timed(runs: dict[str, Run], repeats: int) -> dict[str, list[tuple[float, float]]]:
    """Wall and CPU seconds of each, taking turns in rotating order; the first round warms up."""
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    order = list(runs)
    for round_ in range(repeats + 1):
        for name in order[round_ % len(order) :] + order[: round_ % len(order)]:
            wall_s, cpu_s = time.perf_counter(), time.process_time()
            runs[name]()
            if round_:
                took[name].append((time.perf_counter() - wall_s, time.process_time() - cpu_s))
    return took


def _rows(
    what: str, n: int, took: dict[str, list[tuple[float, float]]], names: dict[str, str], limits: dict[str, float]
) -> list[Row]:
    rows = []
    for precision, kinds in _PEERS.items():
        for index, clock in enumerate(("wall", "CPU")):
            per_s = {kind: [n / sample[index] for sample in samples] for kind, samples in took.items()}
            peers = [kind for kind in kinds if kind in per_s]
            best = max(peers, key=lambda kind: median(per_s[kind]))
            roles: dict[str, tuple[str, Sequence[float]]] = {
                "ours": (names[_OURS[precision]], per_s[_OURS[precision]]),
                "peer": (names[best], per_s[best]),
                "limit": ("multiply-adds at GEMM speed", [limits[precision]]),
                **{kind: (names[kind], per_s[kind]) for kind in peers if kind != best},
            }
            rows.append(sampled(f"{what}, {precision}, {clock}", "per_s", roles))
    return rows


def _flops(c: ModelConfig, sequences: int, tokens: int, prefix: int, *, last: bool = True) -> int:
    """Of `sequences` x `tokens` after a prefix: projections, experts and attention that the scores need.

    In the last layer keys and values of all tokens, all else of one token a sequence (last) or of none.
    """
    t, heads, d = sequences * tokens, c.num_attention_heads * c.head_dim, c.hidden_size
    key_values = 2 * c.num_key_value_heads * c.head_dim * d
    attended = 2 * heads * (prefix + tokens / 2)
    experts = c.num_experts_per_tok * 3 * d * c.moe_intermediate_size + d * c.num_experts
    rest = 2 * heads * d + attended + experts
    whole = (c.num_hidden_layers - 1) * t * (key_values + rest) + t * key_values + (sequences * rest if last else 0)
    return int(2 * whole)


def _gemm_flops_per_s() -> dict[str, float]:
    """Of one core, in the fastest plain product of each precision that it has: square, whatever library.

    One thread, because those of a pool wait by spinning; several products at a time, because the kernel books CPU time
    by the tick, and one takes less than that.
    """
    a, b = torch.randn(_GEMM, _GEMM), torch.randn(_GEMM, _GEMM)
    packed = {precision: linear(b, precision) for precision in ("fp32", "int8")}
    rows = {precision: product.inputs(a) for precision, product in packed.items()}

    def speed(product: Run) -> float:
        return 2 * _GEMM**3 * _GEMMS / _cpu_s(lambda: [product() for _ in range(_GEMMS)][-1])

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    of_packed = {p: speed(lambda p=p: packed[p].product(rows[p])) for p in packed}  # type: ignore[misc]
    fp32 = max(of_packed["fp32"], speed(lambda: a @ b))
    torch.set_num_threads(threads)
    return {**of_packed, "fp32": fp32}


def _cpu_s(work: Run) -> float:
    """The quicker of two runs after one that warms up, CPU seconds: other processes only ever add."""
    work()
    took = []
    for _ in range(2):
        started_s = time.process_time()
        work()
        took.append(time.process_time() - started_s)
    return min(took)
