"""Teachers: who labels the candidate lists. One file per variant behind `base.Teacher`."""

from llm_reranker.teachers.base import Teacher

TEACHERS = ("qwen3-moe",)

__all__ = ["TEACHERS", "Teacher"]
