"""Run folders, as a training run leaves them behind.

A run folder holds ``run.json`` (what was asked for), ``metrics.jsonl`` (what happened, one line per event)
and ``result.json`` (what came out; absent while the run is going or after it was killed). ``seconds`` in an
event is the time since the run started.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import ValidationError

from retrograde.errors import RunError
from retrograde.report.records import Description, Epoch, LayerNumbers, Record, Result, Step, number

SCHEMA = 1


@dataclass(frozen=True)
class Run:
    """A run folder, read. ``result`` of a run that has not ended is empty, with status ``unfinished``."""

    folder: Path
    description: Description
    steps: tuple[Step, ...]
    epochs: tuple[Epoch, ...]
    result: Result

    @property
    def label(self) -> str:
        """The run's name for people."""
        return self.description.label or self.description.name

    @property
    def seed(self) -> int | None:
        """The recipe's seed."""
        seed = self.description.recipe.get("seed")
        return seed if isinstance(seed, int) else None

    @property
    def test(self) -> float | None:
        """The test score in the run's own metric."""
        return number(self.result.test.get(self.description.metric))

    @property
    def layers(self) -> dict[str, LayerNumbers]:
        """Each layer's numbers in the last epoch that has any."""
        return next((epoch.layers for epoch in reversed(self.epochs) if epoch.layers), {})

    @property
    def fallbacks(self) -> int:
        """How often any layer took the exact path instead, over all epochs."""
        return sum(layer.fallbacks or 0 for epoch in self.epochs for layer in epoch.layers.values())

    @property
    def step_seconds(self) -> float | None:
        """Seconds per step: the run's own figure, or for a run that has not ended that of its last epoch."""
        if self.result.step_seconds is not None:
            return number(self.result.step_seconds)
        return number(next((e.step_seconds for e in reversed(self.epochs) if e.step_seconds), None))

    def flops(self, count: str) -> float | None:
        """One of the counts of the whole run: dense, needed, executed, discounted or overhead."""
        return number(getattr(self.result.flops, count))

    def of_dense(self, count: str) -> float | None:
        """One of the counts as a share of the dense-equivalent."""
        part, whole = self.flops(count), self.flops("dense")
        return part / whole if part is not None and whole else None


def collect(paths: Iterable[Path]) -> list[Run]:
    """Read every run under ``paths``, each a run folder or a folder of run folders, in order and once each.

    Raises:
        RunError: a path does not exist, holds no run, or holds one that cannot be read.
    """
    folders: dict[Path, None] = {}
    for path in map(Path, paths):
        found = [path] if _is_run(path) else [child for child in _children(path) if _is_run(child)]
        if not found:
            raise RunError(
                f"No runs found in {path}: neither the folder nor a folder in it has a run.json. "
                "Name a run folder, or the folder that holds them."
            )
        folders.update(dict.fromkeys(folder.resolve() for folder in found))
    if not folders:
        raise RunError("No runs found: no path was given. Name at least one run folder.")
    return [read(folder) for folder in folders]


def read(folder: Path) -> Run:
    """Read one run folder.

    A cut-off last line of ``metrics.jsonl`` is left out, as a killed run leaves one. Where a resumed run
    repeats an epoch or a step, the later line counts.

    Raises:
        RunError: a file is missing, is no JSON, has another schema, or lacks a field.
    """
    source = folder / "run.json"
    if not source.is_file():
        raise RunError(
            f"{source} is missing, so {folder} is not a run folder or was copied in part. "
            "Copy the folder again, or leave it out."
        )
    description = _parse(Description, _load(source), source)
    steps: dict[int, Step] = {}
    epochs: dict[int, Epoch] = {}
    for where, event in _events(folder / "metrics.jsonl"):
        if event.get("event") == "step":
            step = _parse(Step, event, where)
            steps[step.step] = step
        elif event.get("event") == "epoch":
            epoch = _parse(Epoch, event, where)
            epochs[epoch.epoch] = epoch
    source = folder / "result.json"
    result = _parse(Result, _load(source), source) if source.is_file() else Result()
    return Run(
        folder=folder,
        description=description,
        steps=tuple(steps[key] for key in sorted(steps)),
        epochs=tuple(epochs[key] for key in sorted(epochs)),
        result=result,
    )


def _is_run(folder: Path) -> bool:
    # A folder with a run's other files counts, so that its missing run.json is reported and not passed over.
    return any((folder / name).is_file() for name in ("run.json", "metrics.jsonl", "result.json"))


def _children(path: Path) -> list[Path]:
    if not path.is_dir():
        raise RunError(f"{path} is not a folder. Name a run folder, or the folder that holds them.")
    return sorted(child for child in path.iterdir() if child.is_dir())


def _load(source: Path) -> dict[str, Any]:
    try:
        data: object = json.loads(source.read_bytes())
    except (OSError, ValueError) as error:
        raise RunError(
            f"{source} cannot be read: {error}. The file is damaged; copy it again, or leave the run out."
        ) from error
    if not isinstance(data, dict):
        raise RunError(
            f"{source} is not a JSON object, so no run wrote it. Copy it again, or leave the run out."
        )
    fields = cast(dict[str, Any], data)
    if fields.get("schema") != SCHEMA:
        raise RunError(
            f"{source} has schema {fields.get('schema')!r}, and this version reads schema {SCHEMA}. "
            "Use the version of retrograde that wrote the run, or run it again."
        )
    return fields


def _events(source: Path) -> list[tuple[str, dict[str, Any]]]:
    if not source.is_file():
        return []
    lines = [line for line in enumerate(source.read_bytes().split(b"\n"), start=1) if line[1].strip()]
    events: list[tuple[str, dict[str, Any]]] = []
    for at, line in lines:
        try:
            event: object = json.loads(line)
        except ValueError as error:
            if at == lines[-1][0]:
                break
            raise RunError(
                f"{source}, line {at} is not JSON: {error}. Only the last line of a killed run may be "
                "cut off, so the file is damaged; remove the line, or leave the run out."
            ) from error
        if isinstance(event, dict):
            events.append((f"{source}, line {at}", cast(dict[str, Any], event)))
    return events


_RecordT = TypeVar("_RecordT", bound=Record)


def _parse(kind: type[_RecordT], data: dict[str, Any], source: Path | str) -> _RecordT:
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise RunError(
            f"{source} does not fit schema {SCHEMA}: {field}: {first['msg']}. "
            "Correct the field, or leave the run out."
        ) from error
