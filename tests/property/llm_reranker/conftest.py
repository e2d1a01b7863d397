"""Fixtures of tests/worlds/llm_reranker_world.py."""

from llm_reranker_world import run_fixture, world_fixture

__all__ = ["run_fixture", "world_fixture"]
