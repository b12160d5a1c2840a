"""What tiny runs are made of, how their files are changed, and how a page is opened."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from retrograde.lab import files

Make = Callable[..., Path]

SMALL = {"limit": 64, "batch_size": 16, "epochs": 2, "learning_rate": 0.01, "decline": False}
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


def opened(
    browser: Any, report: Path, width: int, height: int, theme: str
) -> Iterator[tuple[Any, list[str]]]:
    """The page with all plots drawn, and what went wrong on it; tests that share it leave it as they found it."""
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=theme)
    trouble: list[str] = []
    page.on("console", lambda message: trouble.append(f"console {message.type}: {message.text}"))
    page.on("pageerror", lambda error: trouble.append(f"error: {error}"))
    page.on("requestfailed", lambda request: trouble.append(f"failed: {request.url}"))
    page.on(
        "request", lambda request: trouble.append(request.url) if request.url.startswith("http") else None
    )
    page.set_default_timeout(150_000)  # every plot is drawn before it is loaded: slow on a busy machine
    page.goto(report.as_uri())
    page.wait_for_selector("html[data-drawn=true]", state="attached", timeout=60_000)
    yield page, trouble
    page.close()
