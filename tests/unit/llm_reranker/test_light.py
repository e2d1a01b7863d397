"""What the gateway imports of this package brings no torch, no transformers, no tokenizers."""

from __future__ import annotations

import subprocess
import sys

LIGHT = ("llm_reranker", "llm_reranker.blend", "llm_reranker.client", "llm_reranker.config", "llm_reranker.lists",
         "llm_reranker.messages", "llm_reranker.prompt", "llm_reranker.quality")  # fmt: skip


def test_light_modules_are_light() -> None:
    heavy = "('torch', 'transformers', 'tokenizers')"
    code = f"import sys, {', '.join(LIGHT)}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"
