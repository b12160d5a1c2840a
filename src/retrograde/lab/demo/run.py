"""Runs the scenarios within a given time: fewer epochs, and then fewer seeds, where the machine is slow."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

from retrograde.lab.claims.cells import seconds_of_seed
from retrograde.lab.claims.grid import Grid, Places
from retrograde.lab.claims.jobs import Show, Stop
from retrograde.lab.claims.result import Result
from retrograde.lab.demo.scenarios import Scenario

_PREPARATION = 0.25
"""Share of the progress that compiling and trying count as."""


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


@dataclasses.dataclass(frozen=True)
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

    scenarios: Sequence[Scenario]
    folder: Path
    seeds: int
    seconds: float
    show: Show
    stop: Stop
    _began: float = dataclasses.field(default_factory=time.monotonic)

    def run(self) -> Outcome:
        """Try, shorten, train.

        Raises:
            KeyboardInterrupt: `stop` said so.
        """
        expected = [self._try(number, one) for number, one in enumerate(self.scenarios)]
        share = min(1.0, self._left / (self.seeds * sum(expected)))
        scenarios = [one.shortened(share, self.seeds) for one in self.scenarios]
        results: list[Result] = []
        seeds = 0
        while seeds < self.seeds:
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
        return self._began + self.seconds - time.monotonic()

    def _try(self, number: int, scenario: Scenario) -> float:
        """Seconds that one seed should take, from a few steps of each run, which also bring their kernels."""
        self.show(f"kernels: {scenario.name}", number / len(self.scenarios) * _PREPARATION, 1.0)
        return seconds_of_seed(scenario.claim, self.folder / "tried", stop=self.stop)

    def _round(self, scenarios: Sequence[Scenario], seed: int) -> list[Result] | None:
        """Every scenario with one more seed; None where the time ran out on the way, which the first seed ignores."""
        late = False

        def stop() -> bool:
            nonlocal late
            late = seed > 0 and self._left < 0
            return late or self.stop()

        results: list[Result] = []
        for number, scenario in enumerate(scenarios):
            claim = scenario.claim.model_copy(update={"seeds": seed + 1})
            before = (seed + number / len(scenarios)) / self.seeds
            name = f"seed {seed + 1} of {self.seeds}: {scenario.name}"

            def show(what: str, done: float, total: float, before: float = before, name: str = name) -> None:
                within = done / total / len(scenarios) / self.seeds
                self.show(name, _PREPARATION + (1 - _PREPARATION) * (before + within), 1.0)

            grid = Grid(claim, Places(self.folder / scenario.name))
            try:
                results.append(grid.run(command="retrograde demo", show=show, stop=stop))
            except KeyboardInterrupt:
                if late and not self.stop():
                    return None
                raise
        return results

    def _shortened(self, scenarios: Sequence[Scenario], seeds: int) -> str:
        fewer = [
            f"{short.name} {short.claim.recipe['epochs']} of {whole.claim.recipe['epochs']}"
            for short, whole in zip(scenarios, self.scenarios, strict=True)
            if short.claim.recipe["epochs"] < whole.claim.recipe["epochs"]
        ]
        parts = [f"fewer epochs ({', '.join(fewer)})"] if fewer else []
        if seeds < self.seeds:
            parts.append(f"{seeds} of {self.seeds} seeds")
        if not parts:
            return ""
        return f"Shortened to stay near {self.seconds:.0f} s on this machine: {' and '.join(parts)}."
