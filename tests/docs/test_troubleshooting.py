"""The page quotes what the source really says."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
# What the runtime says, not we.
FOREIGN = {"fork() called from a process already using GNU OpenMP"}
QUOTES = re.findall(r'"([^"]+)"', " ".join(line for line in PAGE.splitlines() if line.startswith("**")))
QUOTES = [quote for quote in QUOTES if quote not in FOREIGN]


def _texts() -> list[str]:
    """Every string of the source, with … for what is filled in."""
    found: list[str] = []
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


TEXTS = _texts()


def test_there_are_quotes() -> None:
    assert len(QUOTES) > 20


@pytest.mark.parametrize("quote", QUOTES)
def test_quotes_are_said(quote: str) -> None:
    pieces = [re.escape(piece.strip(" '")) for piece in quote.split("…") if piece.strip(" '")]
    pattern = re.compile(".*".join(pieces), re.DOTALL)
    assert any(pattern.search(text) for text in TEXTS), quote
