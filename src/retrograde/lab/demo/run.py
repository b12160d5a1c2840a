"""Runs the scenarios within a given time: fewer epochs, and then fewer seeds, where the machine is slow."""

import dataclasses
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from retrograde.lab.claims.cells import Cell, train_together
from retrograde.lab.claims.grid import Grid, Places
from retrograde.lab.claims.jobs import State
from retrograde.lab.claims.result import Result
from retrograde.lab.demo.scenarios import Scenario
from retrograde.lab.record import read_run

_TRIED_STEPS = 5
"""Of each run beforehand: the first one compiles and calibrates kernels, the median tells how long a step takes."""

_OVERHEAD = 1.3
"""Time of a run over that of its steps: setting up, reading the validation split, writing checkpoints."""

_PREPARATION = 0.25
"""Share of the progress that compiling and trying count as."""

Show = Callable[[str, float], None]
"""Called with what is being done, and the share of all work that is done."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What the demonstration did.

    Attributes:
        shown: every scenario as it was run, with its result.
        shortened: what was left out to stay within the time, in words; empty where nothing was.
        seconds: that it took.
    """

    shown: tuple[tuple[Scenario, Result], ...]
    shortened: str
    seconds: float


class Demonstration:
    """The scenarios with paired seeds: every scenario with the first seed, then with the second one, and so on.

    Args:
        scenarios: what to show.
        folder: of the runs.
        seeds: paired, at most.
        seconds: that all may take, kernels included. The first seed is run to its end in any case.
        show: told of the progress.
        stop: asked after every step; true raises KeyboardInterrupt.
    """

    def __init__(
        self,
        scenarios: Sequence[Scenario],
        folder: Path,
        *,
        seeds: int,
        seconds: float,
        show: Show = lambda what, share: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._scenarios, self._folder = scenarios, folder
        self._seeds, self._seconds, self._show, self._stop = seeds, seconds, show, stop
        self._began = time.monotonic()

    def run(self) -> Outcome:
        """Try, shorten, train.

        Raises:
            KeyboardInterrupt: `stop` said so.
        """
        expected = [self._try(number, one) for number, one in enumerate(self._scenarios)]
        share = min(1.0, self._left / (self._seeds * sum(expected)))
        scenarios = [one.shortened(share, self._seeds) for one in self._scenarios]
        results: list[Result] = []
        seeds = 0
        while seeds < self._seeds:
            began = time.monotonic()
            found = self._round(scenarios, seeds)
            if found is None:
                break
            results, seeds = found, seeds + 1
            if time.monotonic() - began > self._left:
                break
        shown = tuple(
            (scenario.shortened(1.0, seeds), result)
            for scenario, result in zip(scenarios, results, strict=True)
        )
        return Outcome(shown, self._shortened(scenarios, seeds), time.monotonic() - self._began)

    @property
    def _left(self) -> float:
        return self._began + self._seconds - time.monotonic()

    def _try(self, number: int, scenario: Scenario) -> float:
        """Seconds that one seed should take, from a few steps of each run, which also bring their kernels."""
        claim = scenario.claim
        self._show(f"kernels: {scenario.name}", number / len(self._scenarios) * _PREPARATION)
        cells: list[Cell] = []
        for name in claim.contestants:
            recipe = claim.recipe_of(name, {"steps": _TRIED_STEPS})
            cells.append(Cell(name, recipe, self._folder / "tried" / scenario.name / name))
        train_together(
            cells,
            group=claim.title,
            labels={name: name for name in claim.contestants},
            data_dir=None,
            tell=lambda share: None,
            stop=self._stop,
            trial=True,
        )
        whole = claim.recipe_of(next(iter(claim.contestants)))
        pace = sum(read_run(cell.folder).epochs[-1].step_seconds or 0.0 for cell in cells)
        shutil.rmtree(self._folder / "tried")
        return _OVERHEAD * pace * whole.length(whole.load_data())

    def _round(self, scenarios: Sequence[Scenario], seed: int) -> list[Result] | None:
        """Every scenario with one more seed; None where the time ran out on the way, which the first seed ignores."""
        late = False

        def stop() -> bool:
            nonlocal late
            late = seed > 0 and self._left < 0
            return late or self._stop()

        results: list[Result] = []
        for number, scenario in enumerate(scenarios):
            claim = scenario.claim.model_copy(update={"seeds": seed + 1})
            done = (seed + number / len(scenarios)) / self._seeds

            def show(state: State, done: float = done, scenario: Scenario = scenario) -> None:
                within = state.done / state.total / len(scenarios) / self._seeds
                share = _PREPARATION + (1 - _PREPARATION) * (done + within)
                self._show(f"seed {seed + 1} of {self._seeds}: {scenario.name}", share)

            grid = Grid(claim, Places(self._folder / scenario.name))
            try:
                results.append(grid.run(command="retrograde demo", show=show, stop=stop))
            except KeyboardInterrupt:
                if late and not self._stop():
                    return None
                raise
        return results

    def _shortened(self, scenarios: Sequence[Scenario], seeds: int) -> str:
        fewer = [
            f"{short.name} {short.claim.recipe['epochs']} of {whole.claim.recipe['epochs']}"
            for short, whole in zip(scenarios, self._scenarios, strict=True)
            if short.claim.recipe["epochs"] < whole.claim.recipe["epochs"]
        ]
        parts = [f"fewer epochs ({', '.join(fewer)})"] if fewer else []
        if seeds < self._seeds:
            parts.append(f"{seeds} of {self._seeds} seeds")
        if not parts:
            return ""
        return f"Shortened to stay near {self._seconds:.0f} s on this machine: {' and '.join(parts)}."
