"""Writes the tables of the documents from ``results/``; ``--check`` only says whether they are up to date.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; NAME is a file ``results/NAME.json``.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
_OPTIONS = re.compile(r"\([^)]*\)")
DOCUMENTS = (ROOT / "README.md",)
_TABLE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(text: str) -> str:
    """The document with every table made anew."""
    return _TABLE.sub(lambda m: f"{m[1]}{render(load(m[2]))}{m[3]}", text)


def load(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))


def render(result: dict[str, Any]) -> str:
    """A Markdown table of comparison rows, with its caption."""
    head = ["model", "method", "test accuracy", "zeros (of their own)", "needed", "executed", "time"]
    rows = [[_cell(row, name) for name in head] for row in result["rows"]]
    lines = [
        f"| {' | '.join(head)} |",
        f"|---|---|{'---:|' * (len(head) - 2)}",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    machine = result["machine"]
    caption = (
        f"*{result['what']}; {result['seeds']} seeds, mean ± standard deviation. Shares are of the dense-equivalent "
        f"FLOPs; time is the ratio to plain backpropagation on {machine['cores']} cores ({machine['cpu']}), torch "
        f"{machine['torch']}. Made by `{result['command']}`.*"
    )
    return "\n".join(lines) + f"\n\n{caption}\n"


def _cell(row: dict[str, Any], name: str) -> str:
    match name:
        case "model" | "method":
            return str(row["model"] if name == "model" else _OPTIONS.sub("", row["label"]))
        case "test accuracy":
            return f"{row['accuracy']:.2%} ± {row['accuracy_deviation']:.2%}".replace("%", " %")
        case "zeros (of their own)":
            return (
                "–"
                if row["zeros"] is None
                else f"{100 * row['zeros']:.1f} % ({100 * row['own_zeros']:.1f} %)"
            )
        case "time":
            return f"×{row['seconds_ratio']:.2f}"
        case _:
            return f"{100 * row[name]:.1f} %"


def main() -> int:
    stale: list[str] = []
    for document in DOCUMENTS:
        before = document.read_text(encoding="utf-8")
        after = fill(before)
        if after != before:
            stale.append(document.name)
            if "--check" not in sys.argv:
                document.write_text(after, encoding="utf-8")
    print(f"tables {'to be made anew' if '--check' in sys.argv else 'written'}: {', '.join(stale) or 'none'}")
    return int(bool(stale) and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
