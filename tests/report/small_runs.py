"""What tiny runs are made of, and how their files are changed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from retrograde.lab import files

Make = Callable[..., Path]

SMALL = {"limit": 64, "batch_size": 16, "epochs": 2, "learning_rate": 0.01}
RUNS: dict[str, dict[str, Any]] = {
    "plain-0": {},
    "plain-1": {"seed": 1},
    "dither-0": {"methods": {"dither": {"scale": 1.0}}},
    "dither-1": {"methods": {"dither": {"scale": 1.0}}, "seed": 1},
    "bases": {"methods": {"decorrelate": {"every": 2}, "spectral": {"warmup": 1, "every": 2}}},
    "blocks": {"model": "resmlp", "methods": {"deepfocus": {"warmup": 2}}, "epochs": 4},
    "grown": {
        "methods": {
            "perforate": {
                "patience": 1,
                "limit": 2,
                "candidate_limit": 2,
                "max_dendrites": 2,
                "rule": "perforated",
            }
        },
        "epochs": 9,
    },
}


def edit(path: Path, **fields: Any) -> None:
    """Replace fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_epochs(folder: Path, **fields: Any) -> None:
    """Replace fields of every epoch's line."""
    path = folder / files.METRICS
    events = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [event | fields if event["event"] == "epoch" else event for event in events]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
