"""Generated programs by the thousand: is training with neutral settings plain training, and is every error a typed one?

    python repro/fuzz.py [--cases 20000] [--seed 0]

A program is a model of nested, shared, tied, computed and frozen layers, a training loop with exceptions, casts and
resumed checkpoints in it, and one or two methods; ``tests/fuzzing`` draws it, runs it plain and attached, and compares.
It is *the same as plain*, ends in a *typed error* (of retrograde, or what plain training raises, too), or is *wrong*.
``results/fuzz.json`` gets the counts after every chunk of programs, and each wrong program; an interrupted run goes
on after its last chunk, as long as the library is the same. `--only` runs one chunk again, and prints what is wrong.

Results: results/fuzz.json
"""

import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from reports import arguments, head

from retrograde.lab import files

ROOT = Path(__file__).parent.parent
CHUNK = 100

sys.path.insert(0, str(ROOT / "tests"))

from fuzzing.programs import WRONG, Program, outcome  # noqa: E402  found through the line above
from fuzzing.strategies import programs  # noqa: E402


def run(number: int, cases: int, first: int) -> dict[str, Any]:
    """One chunk: counts of outcomes, of errors by type, and the wrong programs."""
    outcomes: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    wrong: list[dict[str, Any]] = []

    @seed(first * 1_000_000 + number)
    @settings(
        max_examples=cases,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(programs())
    def one(case: Program) -> None:
        found = outcome(case)
        outcomes[found.kind] += 1
        if found.kind == WRONG:
            wrong.append({"chunk": number, "why": found.why, "program": repr(case)})
        elif found.why:
            errors[found.why.partition(":")[0]] += 1

    one()
    return {"outcomes": outcomes, "errors": errors, "wrong": wrong}


def unchanged(commit: str | None) -> bool:
    """Whether what is tested, and what tests it, is as it was at the commit."""
    compared = ["git", "diff", "--quiet", str(commit), "--", "src", "tests/fuzzing"]
    return subprocess.run(compared, cwd=ROOT, capture_output=True, check=False).returncode == 0


def main() -> None:
    parser = arguments(__doc__, "fuzz.json")
    parser.add_argument("--cases", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="run this chunk alone, and print what is wrong")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.only is not None:
        print(files.to_json(run(options.only, CHUNK, options.seed), indent=2))
        return
    report: dict[str, Any] = {
        **head("generated programs, attached against plain"),
        "seed": options.seed,
        "chunk": CHUNK,
        "chunks": 0,
        "seconds": 0.0,
        "cases": 0,
        "outcomes": {},
        "errors": {},
        "wrong": [],
    }
    if options.out.exists():
        before = json.loads(options.out.read_text())
        if before["seed"] == options.seed and before["chunk"] == CHUNK and unchanged(before["commit"]):
            report = {**before, "command": report["command"]}
    while report["cases"] < options.cases:
        began = time.perf_counter()
        found = run(report["chunks"], min(CHUNK, options.cases - report["cases"]), options.seed)
        for name in ("outcomes", "errors"):
            report[name] = dict(Counter(report[name]) + found[name])
        report["wrong"] += found["wrong"]
        report["chunks"] += 1
        report["cases"] = sum(report["outcomes"].values())
        report["seconds"] += time.perf_counter() - began
        files.write_json(options.out, report)
        print(report["cases"], report["outcomes"], file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
