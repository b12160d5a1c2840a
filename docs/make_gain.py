"""Draws ``pictures/gain.svg``, the README's picture of a gain; ``--check`` only says whether it is stale.

    python docs/make_gain.py [--check]

Bars of seconds until a validation accuracy was reached, from a claim's result. A variant that did not reach it in every
seed is drawn pale, and its label says in how many it did. The same result makes the same file, which can be checked.
"""

import sys
from html import escape
from pathlib import Path
from statistics import fmean

from make_performance import is_stale

from retrograde.lab.claims import wording
from retrograde.lab.claims.result import Result, read_result, targets_of

ROOT = Path(__file__).parent.parent
CLAIM = "decorrelate/cifar10-mlp-budgets"
OURS = "decorrelate"
PICTURE = ROOT / "docs" / "pictures" / "gain.svg"
METRIC = "seconds_to_target"
LONGEST = 24
"""Letters of a label that fit."""

WIDTH, LEFT, RIGHT, BAR, GAP, TOP, FOOT = 760, 212, 140, 26, 12, 74, 34
INK, FAINT, PLAIN, ACCENT = "#24292f", "#57606a", "#a8b1bb", "#0072b2"
FONT = "-apple-system,'Segoe UI','Helvetica Neue',Arial,sans-serif"


def drawn(result: Result) -> str:
    """The picture as SVG: a bar for each variant, the quickest first."""
    # Of our own variants one: the others are on the method's page.
    shown = [
        name for name, one in result.contestants.items() if name == OURS or not one.recipe.get("methods")
    ]
    times = {name: reached(result, name) for name in shown}
    bars = sorted(((fmean(found), name) for name, found in times.items() if found))
    scale = (WIDTH - LEFT - RIGHT) / bars[-1][0]
    height = TOP + len(bars) * (BAR + GAP) + FOOT
    rows = "".join(
        row(result, name, TOP + at * (BAR + GAP), scale * seconds) for at, (seconds, name) in enumerate(bars)
    )
    title, goal, machine = heading(result)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="{FONT}" role="img" aria-label="{escape(title)}">\n'
        f'<rect width="{WIDTH}" height="{height}" rx="8" fill="#ffffff"/>\n'
        f"{text(24, 32, title, size=18, weight=600)}{text(24, 54, goal, colour=FAINT)}"
        f"{rows}{text(24, height - 14, machine, size=12, colour=FAINT)}</svg>\n"
    )


def reached(result: Result, name: str) -> list[float]:
    return [value for value in result.figures(name, METRIC) if value is not None]


def row(result: Result, name: str, y: float, length: float) -> str:
    """A label, a bar and a figure."""
    ours, always = name == OURS, len(reached(result, name)) == len(result.seeds)
    middle = y + BAR / 2 + 5
    label = result.contestants[name].label if not ours else "Decorrelate + AdamW"
    label = label if len(label) <= LONGEST else label.partition(",")[0]
    bar = (
        f'<rect x="{LEFT}" y="{y}" width="{length:.1f}" height="{BAR}" rx="3" fill="{ACCENT if ours else PLAIN}" '
        f'fill-opacity="{1 if always else 0.45}"/>\n'
    )
    weight = 600 if ours else 400
    return (
        text(LEFT - 12, middle, label, weight=weight, anchored="end")
        + bar
        + text(LEFT + length + 10, middle, wording.cell(result, name, METRIC), weight=weight)
    )


def heading(result: Result) -> tuple[str, str, str]:
    """Title, what was to be reached, and where it was measured."""
    names = targets_of(result.target)
    recipe = result.contestants[names[0]].recipe
    target = " or ".join(result.contestants[name].label for name in names)
    machine, seeds = result.machine, len(result.seeds)
    return (
        f"Seconds of training to where {target} ends",
        f"{str(recipe['model']).upper()} on CIFAR-10; rate and decay searched for each; "
        f"mean of {seeds} seeds ± half of the 95 % interval",
        f"{machine['cpu']}, {machine['cores']} cores; torch {machine['torch']}; float32. "
        f"retrograde repro run {result.claim}",
    )


def text(
    x: float,
    y: float,
    words: str,
    *,
    size: int = 14,
    weight: int = 400,
    colour: str = INK,
    anchored: str = "start",
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" fill="{colour}" '
        f'text-anchor="{anchored}">{escape(words)}</text>\n'
    )


def main() -> int:
    made = drawn(read_result(ROOT / "results" / f"{CLAIM}.json"))
    if "--check" in sys.argv:
        return int(is_stale(PICTURE, made))
    PICTURE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
