"""Rewrite the module list of docs/architecture.md from the modules' own first sentences."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/architecture.md"
PACKAGES = ("recsys", "llm_reranker", "feature_store", "streaming")
BEGIN, END = "<!-- modules: python docs/modules.py -->\n", "<!-- end of modules -->\n"


def first_sentence(path: Path) -> str:
    """The first sentence of the module's docstring, without its markers."""
    text = " ".join((ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").split("\n\n")[0].split())
    return re.split(r"(?<=[A-Za-z0-9)`\]])\. ", text, maxsplit=1)[0].rstrip(".")


def listing() -> str:
    """One line per module, one heading per package."""
    lines: list[str] = []
    for package in PACKAGES:
        for init in sorted((ROOT / package).rglob("__init__.py")):
            folder = init.parent.relative_to(ROOT)
            lines.append(f"\n### {folder}\n\n{first_sentence(init)}.\n")
            modules = sorted(p for p in init.parent.glob("*.py") if p.name != "__init__.py")
            lines += [f"- [{p.name}](../{p.relative_to(ROOT)}): {first_sentence(p)}" for p in modules]
    return "\n".join(lines) + "\n\n"


def page(text: str) -> str:
    """The page with a fresh list."""
    head, rest = text.split(BEGIN)
    return head + BEGIN + listing() + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text("utf-8")), "utf-8")
