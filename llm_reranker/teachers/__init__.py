"""Teachers: who labels the candidate lists. One file per variant behind `base.Teacher`.

qwen3-moe      a larger model of ours, trained on the lists (qwen3_moe)
hf:FOLDER      a local Hugging Face checkpoint, Qwen3 or Qwen3-MoE, asked for yes or no (local)
openai:MODEL   a model behind an OpenAI-compatible endpoint (endpoint, asking)
"""

from llm_reranker.teachers.base import Judgement, Teacher
from recsys.core.errors import BadInput

TEACHERS = ("qwen3-moe", "hf:FOLDER", "openai:MODEL")

__all__ = ["TEACHERS", "Judgement", "Teacher", "parse"]


def parse(teacher: str) -> tuple[str, str]:
    """("qwen3-moe", ""), ("hf", FOLDER) or ("openai", MODEL). Raises: BadInput for another teacher."""
    kind, _, rest = teacher.partition(":")
    if teacher != "qwen3-moe" and (kind not in ("hf", "openai") or not rest):
        raise BadInput("--teacher", came=teacher, expected=f"one of {', '.join(TEACHERS)}", fix="Name one of those.")
    return kind, rest
