"""Sections [llm_reranker], [llm_reranker.distill] and [llm_reranker.teacher] of double11.toml."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from recsys.core.config import in_range, section
from recsys.core.errors import BadInput

HEAD_DIM = 32
DEPTH = 40  # candidates a list is learnt on, and how many a request hands over: beyond it scores are extrapolation


@section("llm_reranker")
@dataclass(frozen=True, kw_only=True, slots=True)
class RerankConfig:
    """Bounds of serving.

    prefix_tokens_max and item_tokens_max are for folders without double11.json; ours carry their own.
    batch_tokens_max: computed at once, so that nobody waits long behind one who has time for much: of a request that is
    longer the first candidates are scored.
    score_cache_items_max: scores kept for the same context, item and features; 0 = off. adaptive_depth: score fewer
    candidates where the time is short; off, a batch is computed whole and may come too late.
    device: "cuda" has precision "bf16" and no other. precision: of the model's products; int8 is faster and keeps the
    order but for near ties. cuda_graphs_max: forwards of so many sizes are recorded and played back; 0 = none.
    backend: "ours", or a scoring server at backend_url, asked backend_requests_max requests at once: "sglang"
    (`/v1/score`, with token ids) or "vllm" (`/score`), as which model backend_model says.
    threads: of torch, in the server; more than there are free cores is far slower than one.
    metrics_port: Prometheus text over HTTP on metrics_host, 0 = off; of several workers on one host the first one's.
    deadline_ms_default: for callers that set none.
    """

    candidates_max: int = 1000
    prefix_tokens_max: int = 512
    item_tokens_max: int = 48
    batch_tokens_max: int = 8192
    queue_requests_max: int = 256
    prefix_cache_bytes_max: int = 256 << 20
    score_cache_items_max: int = 65_536
    adaptive_depth: bool = True
    backend: Literal["ours", "sglang", "vllm"] = "ours"
    backend_url: str = ""
    backend_model: str = ""
    backend_requests_max: int = 16
    device: Literal["cpu", "cuda"] = "cpu"
    precision: Literal["fp32", "int8", "bf16"] = "fp32"
    cuda_graphs_max: int = 32
    threads: int = 1
    deadline_ms_default: float = 200.0
    deadline_ms_max: float = 10_000.0
    drain_s_max: float = 10.0
    metrics_host: str = "127.0.0.1"
    metrics_port: int = 0

    def __post_init__(self) -> None:
        in_range("llm_reranker.candidates_max", self.candidates_max, 1, 1000)
        in_range("llm_reranker.prefix_tokens_max", self.prefix_tokens_max, 32, 32_768)
        in_range("llm_reranker.item_tokens_max", self.item_tokens_max, 1, 1024)
        in_range("llm_reranker.batch_tokens_max", self.batch_tokens_max, 64, 1 << 20)
        in_range("llm_reranker.queue_requests_max", self.queue_requests_max, 1, 65_536)
        in_range("llm_reranker.prefix_cache_bytes_max", self.prefix_cache_bytes_max, 0, 1 << 40)
        in_range("llm_reranker.score_cache_items_max", self.score_cache_items_max, 0, 100_000_000)
        in_range("llm_reranker.backend_requests_max", self.backend_requests_max, 1, 4096)
        in_range("llm_reranker.cuda_graphs_max", self.cuda_graphs_max, 0, 1024)
        in_range("llm_reranker.threads", self.threads, 1, 256)
        in_range("llm_reranker.deadline_ms_max", self.deadline_ms_max, 1, 600_000)
        in_range("llm_reranker.deadline_ms_default", self.deadline_ms_default, 1, self.deadline_ms_max)
        in_range("llm_reranker.drain_s_max", self.drain_s_max, 0.1, 600)
        in_range("llm_reranker.metrics_port", self.metrics_port, 0, 65_535)
        if (self.device == "cuda") != (self.precision == "bf16"):
            raise BadInput(
                "llm_reranker.precision",
                came=f"{self.precision} on {self.device}",
                expected="fp32 or int8 on cpu, bf16 on cuda",
                fix="Set device and precision together.",
            )


@section("llm_reranker.distill")
@dataclass(frozen=True, kw_only=True, slots=True)
class DistillConfig:
    """The student, its teacher and the work that goes into them; the defaults take two to four minutes on 2 cores.

    depth: rows of a list, best by rank, that are a fair sample of what serving sees; validation is on them. Below it a
    list may hold rows because of their label, so only negatives are used from there. validation_share: of the queries.
    embedding_dropout: share of items whose collaborative embedding is hidden in training, as a newcomer's is.
    student_epochs: who reads a list twice learns it by heart, and forgets the ranker's order.
    student_steps_min: few lists get more epochs, up to four times as many.
    num_experts: 0 = a dense student with as many active parameters. upcycle_epochs: a dense student is trained that
    long first and becomes the experts.
    temperature: of both sides of the listwise KL. prefix_tokens_max, item_tokens_max: what the student ever reads.
    """

    hidden_size: int = 128
    num_layers: int = 2
    num_experts: int = 8
    experts_per_token: int = 2
    expert_width: int = 128
    teacher_hidden_size: int = 192
    teacher_layers: int = 4
    teacher_expert_width: int = 192
    soft_tokens: int = 1
    vocab_size: int = 2048
    prefix_tokens_max: int = 96
    item_tokens_max: int = 24
    train_queries_max: int = 2000
    validation_queries_max: int = 1000
    validation_share: float = 0.15
    depth: int = DEPTH
    teacher_epochs: int = 1
    student_epochs: int = 1
    student_steps_min: int = 100
    upcycle_epochs: int = 0
    batch_lists: int = 8
    learning_rate: float = 3e-4
    embedding_dropout: float = 0.1
    temperature: float = 2.0
    router_balance: float = 0.01

    def __post_init__(self) -> None:
        for name, low, high in (
            ("hidden_size", 32, 8192), ("num_layers", 1, 128), ("num_experts", 0, 512), ("expert_width", 8, 65_536),
            ("experts_per_token", 1, self.num_experts or 512), ("teacher_hidden_size", 32, 8192),
            ("teacher_layers", 1, 128), ("teacher_expert_width", 8, 65_536), ("soft_tokens", 1, 4),
            ("vocab_size", 512, 1 << 18),
            ("prefix_tokens_max", 16, 32_768), ("item_tokens_max", 1, 1024), ("train_queries_max", 1, 10_000_000),
            ("validation_queries_max", 1, 1_000_000), ("validation_share", 0.01, 0.9), ("depth", 2, 1000),
            ("teacher_epochs", 1, 1000), ("student_epochs", 1, 1000), ("upcycle_epochs", 0, 1000),
            ("student_steps_min", 1, 1_000_000),
            ("batch_lists", 1, 4096), ("learning_rate", 1e-7, 1.0), ("embedding_dropout", 0.0, 0.99),
            ("temperature", 0.1, 100.0), ("router_balance", 0.0, 10.0),
        ):  # fmt: skip
            in_range(f"llm_reranker.distill.{name}", getattr(self, name), low, high)
        for name in ("hidden_size", "teacher_hidden_size"):
            if getattr(self, name) % HEAD_DIM:
                raise BadInput(
                    f"configuration llm_reranker.distill.{name}",
                    came=getattr(self, name),
                    expected=f"a multiple of {HEAD_DIM}",
                    fix="Round it.",
                )
        if self.upcycle_epochs and not self.can_upcycle:
            raise BadInput(
                "configuration llm_reranker.distill.upcycle_epochs",
                came=f"{self.upcycle_epochs} with {self.num_experts} experts, {self.experts_per_token} per token",
                expected="experts, a multiple of experts_per_token",
                fix="Choose such sizes, or upcycle_epochs = 0.",
            )

    @property
    def can_upcycle(self) -> bool:
        """Whether a dense student can become these experts: see llm_reranker.upcycle."""
        return self.num_experts > 0 and self.num_experts % self.experts_per_token == 0


@section("llm_reranker.teacher")
@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherConfig:
    """Who labels lists: a local checkpoint (`distill --teacher hf:FOLDER`) on `device`, in bf16 where that is "cuda".

    All else is of an OpenAI-compatible endpoint (`openai:MODEL`).
    base_url: empty = OPENAI_BASE_URL, else OpenAI's. api_key_variable: the environment variable that holds the key;
    the key itself is never configuration. mode: listwise asks for an order, pointwise for yes or no and how likely.
    answer_format: json_schema makes the server keep to the form, where it can. permutations: orders in which a list is
    shown (listwise). list_items_max: a longer list is asked about in parts. history_lines_max: newest actions shown.
    reasoning_tokens_max: for models that think before they answer, listwise only; 0 = they do not.
    usd_per_million_*: the provider's prices; 0 = unknown, then tokens_max alone bounds what is spent.
    """

    device: Literal["cpu", "cuda"] = "cpu"
    base_url: str = ""
    api_key_variable: str = "OPENAI_API_KEY"
    mode: Literal["listwise", "pointwise"] = "listwise"
    answer_format: Literal["text", "json_schema"] = "text"
    permutations: int = 3
    list_items_max: int = 20
    history_lines_max: int = 30
    concurrency: int = 4
    requests_per_minute_max: float = 300.0
    retries_max: int = 5
    timeout_s: float = 60.0
    reasoning_tokens_max: int = 0
    cost_usd_max: float = 5.0
    tokens_max: int = 20_000_000
    usd_per_million_prompt_tokens: float = 0.0
    usd_per_million_completion_tokens: float = 0.0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("permutations", 1, 100), ("list_items_max", 2, 200), ("history_lines_max", 0, 1000),
            ("concurrency", 1, 256),
            ("requests_per_minute_max", 0.1, 1e6), ("retries_max", 0, 20), ("timeout_s", 0.1, 3600),
            ("reasoning_tokens_max", 0, 1 << 20),
            ("cost_usd_max", 0.0, 1e6), ("tokens_max", 1, 1 << 50), ("usd_per_million_prompt_tokens", 0.0, 1e6),
            ("usd_per_million_completion_tokens", 0.0, 1e6),
        ):  # fmt: skip
            in_range(f"llm_reranker.teacher.{name}", getattr(self, name), low, high)
