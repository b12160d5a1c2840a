"""What a command left behind, on its streams and in its run folder."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

QUICK = ("--limit", "64", "--epochs", "1", "--batch-size", "16", "--no-decline")

_TIMES = (
    "seconds",
    "step_seconds",
    "backward_seconds",
    "peak_memory_bytes",
    "folder",
    "metrics_bytes",
    "timing",
    "clocked",
)


@dataclass(frozen=True)
class Outcome:
    """What a command left: its exit code, stdout and stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Stdout as strict JSON: the whole of it, and no NaN."""
        return json.loads(self.out, parse_constant=_refuse)


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def strict_json(path: Path) -> Any:
    """A file that must be JSON by the book."""
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)


def untimed(content: dict[str, Any]) -> dict[str, Any]:
    """All but what depends on the clock."""
    return {key: value for key, value in content.items() if key not in _TIMES}


def lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without times."""
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [untimed(json.loads(line, parse_constant=_refuse)) for line in text.splitlines()]


def assert_same_run(one: Path, two: Path) -> None:
    """Two run folders hold the same finished run to the bit: weights, states, figures and log lines."""
    assert untimed(strict_json(one / "result.json")) == untimed(strict_json(two / "result.json"))
    assert lines(one) == lines(two)
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    states = [torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (one, two)]
    for state in states:
        # Measured seconds of the process, which one that shares it with others may have, and need not.
        (state["session"] or {}).pop("calibration", None)
    _assert_same(*map(untimed, states), "checkpoint")


def _assert_same(one: Any, two: Any, where: str) -> None:
    if isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key, value in one.items():
            _assert_same(value, two[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(two), where
        for number, pair in enumerate(zip(one, two, strict=True)):
            _assert_same(*pair, f"{where}.{number}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, two), where
    else:
        assert one == two, where
