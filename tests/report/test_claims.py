"""The page of claims' results: it says what the results say, also where they say little."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from small_runs import opened

from retrograde.cli.main import main
from retrograde.errors import RunError
from retrograde.lab.claims.definition import Check
from retrograde.lab.claims.result import Entry, Reading, Result, Run, Trial, write_result
from retrograde.lab.claims.verdict import complete
from retrograde.report.comparison import Comparison
from retrograde.report.page import Section, read_claims, render_claims, write_claims
from retrograde.report.page import section as section_of
from retrograde.report.pictures.results import cost_metric, course, courses, goal

CHECKS = (
    Check(says="fast & accurate", of="ours", metric="accuracy", minus="plain", at_least=-0.01),
    Check(says="reaches it sooner", of="ours", metric="seconds_to_target", over="plain", at_most=0.9),
)


def made(
    seeds: int = 5,
    checks: Sequence[Check] = CHECKS,
    *,
    quick: bool = False,
    executed: float | None = 0.5,
    zeros: float | None = 0.9,
    reached: float = 0.96,
    target: str | None = "plain",
    peak: int | None = 2**30,
) -> Result:
    """A baseline that goes to 95 % in 40 s, one of ours that goes to `reached` in 20 s, and a peer that has little."""
    names = {"plain": "plain", "ours": "ours <b>, scale 2", "peer": "a peer with quite a long name, k = 50"}
    ends = {"plain": (0.95, 40.0), "ours": (reached, 20.0), "peer": (0.9, 60.0)}
    runs: list[Run] = []
    for seed in range(seeds):
        for name, (height, took) in ends.items():
            top, long = height + 0.002 * seed, took + seed
            # A straight line from 10 % to the top, with another number of readings for each seed.
            shares = [(at + 1) / (4 + seed) for at in range(4 + seed)]
            figures: dict[str, float | None] = {
                "accuracy": top - 0.01,
                "best_validation": top,
                "zeros": zeros if name == "ours" else None,
                "executed": executed if name == "ours" else 1.0,
                "parameters": 1000.0,
                "seconds": long,
            }
            curve = [
                Reading(
                    step=int(100 * share),
                    seconds=long * share,
                    accuracy=top if share == 1 else 0.1 + share / 2,
                )
                for share in shares
            ]
            runs.append(
                Run(
                    contestant=name,
                    seed=seed,
                    commit="abc-dirty",
                    metrics=figures,
                    flops={"dense": 1e9},
                    peak_memory_bytes=peak,
                    curve=curve,
                )
            )
    searched = [
        Trial(changes={"learning_rate": 0.00123456, "schedule": "cosine"}, accuracy=0.91, error=None),
        Trial(changes={"learning_rate": 0.0456789, "schedule": "constant"}, accuracy=0.93, error=None),
        Trial(changes={"learning_rate": 9.0}, accuracy=0.0, error="it came to nan"),
    ]
    entries = {
        name: Entry(
            label=label,
            recipe={"data": "digits", "methods": {"dither": {"scale": 2.0}} if name == "ours" else {}},
            changes=searched[1].changes if checks else {},
            trials=searched if checks else [],
            source={"accuracy": 0.9777} if name == "ours" and checks else {},
        )
        for name, label in names.items()
    }
    return complete(
        Result(
            claim="dither/made-up",
            hash="0123456789abcdef",
            quick=quick,
            title="A made-up claim",
            sentence="As accurate as <plain>" if checks else "",
            source="Nobody 2020, Table 7" if checks else "",
            note="First part\nof it.\n\nSecond part." if checks else "",
            command="retrograde repro run dither/made-up",
            machine={"cpu": "A processor", "cores": 2, "torch": "2.13.0"},
            jobs=1,
            threads=2,
            seeds=list(range(seeds)),
            equal="steps",
            target=target,
            table=["accuracy", "zeros", "executed", "seconds", "seconds_to_target"],
            contestants=entries,
            runs=runs,
        ),
        checks,
    )


def section(result: Result) -> Section:
    return section_of(Comparison(result, {}))


def column(found: Section, name: str) -> list[str]:
    """Of the checks."""
    at = [one.name for one in found.checks.columns].index(name)
    return [row.cells[at] for row in found.checks.rows]


def text_of(page: str) -> str:
    """What a reader sees: no scripts, no styles, no tags."""
    page = re.sub(r"<(script|style)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", page).split())


def test_page_says_what_the_result_says() -> None:
    """Means over seeds 0 to 4 are those of seed 2: 0.004 above the first."""
    page = render_claims([made()])
    text = text_of(page)
    for said in (
        "A made-up claim",
        "As accurate as &lt;plain&gt;",
        "Nobody 2020, Table 7",
        "94.40 % ± 0.39 %",
        "95.40 % ± 0.39 %",
        "test accuracy 97.77 %",
        "×0.52 ± 0.02",
        "fast &amp; accurate",
        "First part of it.",
        "0.04568",
        "93.00 %",
        "it came to nan",
        "0123456789abcdef",
        "abc-dirty",
        "retrograde repro run dither/made-up",
        "A processor",
    ):
        assert said in text, said
    assert "<b>, scale 2" not in page, "labels are escaped"
    outside = re.sub(r"<script\b.*?</script>", "", page, flags=re.DOTALL)
    assert "http" not in outside, "the page needs no network"
    assert not re.search(r"<script[^>]*\bsrc", page)
    assert page == render_claims([made()])


def test_verdicts() -> None:
    """All hold, one of two, none; a quick run has no verdict."""
    assert section(made()).badge == "reproduced"
    assert column(section(made()), "outcome") == ["holds", "holds"]
    assert section(made(reached=0.945)).badge == "partly"
    failed = section(made(reached=0.5))
    assert failed.badge == "not reproduced"
    assert column(failed, "figure")[1] == "–"
    assert column(failed, "check")[1].endswith("has no figure for 5 of 5 seeds")
    more = [CHECKS[0].model_copy(update={"exceeds": 0.005})]
    assert section(made(checks=more)).badge == "exceeded"
    assert column(section(made(checks=more)), "outcome") == ["exceeded"]


def test_badges_have_tones() -> None:
    for result, tone in ((made(), "good"), (made(reached=0.945), "part"), (made(reached=0.5), "bad")):
        assert f'<span class="badge large {tone}">{result.verdict}</span>' in render_claims([result])


def test_quick_decides_nothing() -> None:
    found = section(made(quick=True))
    assert found.badge == "quick: decides nothing"
    assert f'<span class="badge large plain">{found.badge}' in render_claims([made(quick=True)])
    assert "decides nothing" in found.caveats[0]
    assert not any("decides nothing" in caveat for caveat in section(made()).caveats)


def test_figures_that_are_missing() -> None:
    found = section(made(reached=0.5))
    columns = [one.name for one in found.figures.columns]
    rows = {
        row.swatch.run: dict(zip(columns, row.cells, strict=True)) for row in found.figures.rows if row.swatch
    }
    assert rows["ours"]["time to target"] == "never"
    assert rows["plain"]["zeros in δ"] == "–"
    assert rows["plain"]["time over the baseline’s"] == "×1"


def test_one_seed_without_checks() -> None:
    """What an ad-hoc comparison leaves: no source, no checks, no search, no target, one seed."""
    result = made(1, (), zeros=None, executed=None, target=None, peak=None)
    found = section(result)
    assert not found.badge
    assert not found.checks.rows
    assert "One seed" in found.figures.caption
    assert "the source’s figures" not in [one.name for one in found.figures.columns]
    # Nothing to pair; what is left has two plots, side by side.
    assert [chart.wide for chart in found.galleries[0].charts] == [False, False]
    text = text_of(render_claims([result]))
    assert "94.00 %" in text
    assert "±" not in text
    for empty in ("<blockquote", 'class="lede"', 'class="verdict"', "Checks</h3>", 'class="note"'):
        assert empty not in render_claims([result]), empty


def test_no_readings() -> None:
    result = made()
    for run in result.runs:
        run.curve = []
        run.metrics = dict.fromkeys(run.metrics)
    assert section(complete(result, CHECKS)).galleries == ()
    assert "–" in text_of(render_claims([result]))


def test_lead_stands_below_the_title() -> None:
    assert '<p class="lede">Take &lt;this&gt;.</p>' in render_claims([made()], "Title", "Take <this>.")


def test_several_results_have_a_list() -> None:
    page = render_claims([made(), made(quick=True)], "Both")
    assert page.count('<section class="group"') == 2
    assert "<title>Both</title>" in page
    assert 'href="#section-1"' in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_course_interpolates() -> None:
    """Two lines that are straight between their ends are so in the mean, as far as the shorter one goes."""
    found = course([[(0.0, 0.0), (10.0, 100.0)], [(0.0, 0.0), (4.0, 20.0), (20.0, 20.0)]])
    assert [[x for x, _ in line] for line in found] == [[0.0, 4.0, 10.0]] * 2
    assert [y for _, y in found[0]] == pytest.approx([0.0, 40.0, 100.0])
    assert [y for _, y in found[1]] == pytest.approx([0.0, 20.0, 20.0])


def test_course_of_single_readings() -> None:
    assert course([[(1.0, 50.0)], [(3.0, 70.0)]]) == [[(2.0, 50.0)], [(2.0, 70.0)]]
    assert course([[], []]) == []


def test_course_has_few_points() -> None:
    line = [(float(x), float(x)) for x in range(5000)]
    found = course([line, line])
    assert len(found[0]) <= 200
    assert found[0][-1] == pytest.approx((4999, 4999))


def test_lines_end_with_the_shortest_run() -> None:
    result = made()
    assert courses(result)["plain"][0][-1][0] == 40.0
    assert courses(result)["peer"][0][-1][0] == 60.0
    found = goal(result)
    assert found is not None
    assert found[0] == pytest.approx(95.4)
    drawn = section(result).galleries[0].charts[0].spec["data"]
    assert any(trace["line"].get("dash") == "dash" and list(trace["y"]) == [95.4, 95.4] for trace in drawn)
    without = section(made(target=None)).galleries[0].charts[0]
    assert len(without.legend) == len(section(result).galleries[0].charts[0].legend) - 1


def test_cost_is_what_differs() -> None:
    assert cost_metric(made()) == "executed"
    # One per cent more work is no choice, and neither are the same parameters.
    assert cost_metric(made(executed=1.01)) == "seconds"
    larger = made(executed=None)
    for run in larger.runs:
        run.metrics["parameters"] = 5000.0 if run.contestant == "ours" else 1000.0
    assert cost_metric(complete(larger, CHECKS)) == "parameters"


def test_command_takes_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, page = tmp_path / "made-up.json", tmp_path / "page.html"
    write_result(made(), file)
    assert main(["report", str(file), "-o", str(page), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["report"] == str(page)
    assert page.read_text(encoding="utf-8") == render_claims([made()])


def test_command_refuses_a_mixture(tmp_path: Path) -> None:
    file = tmp_path / "made-up.json"
    write_result(made(), file)
    with pytest.raises(RunError, match="run folders alone"):
        read_claims([file, tmp_path])
    with pytest.raises(RunError, match="none was given"):
        render_claims([])


def test_command_refuses_other_json(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text("{}", encoding="utf-8")
    with pytest.raises(RunError, match="does not fit its schema"):
        read_claims([tmp_path / "result.json"])
    (tmp_path / "run.json").write_text("{}", encoding="utf-8")
    with pytest.raises(RunError, match="a single run"):
        read_claims([tmp_path / "result.json"])


@pytest.mark.browser
@pytest.mark.parametrize(("width", "theme"), [(1200, "light"), (390, "dark")])
def test_page_draws_and_fits(browser: Any, tmp_path: Path, width: int, theme: str) -> None:
    report = write_claims([made(), made(1, (), zeros=None, target=None)], tmp_path / "page.html")
    for page, trouble in opened(browser, report, width, 900, theme):
        assert not trouble
        assert page.locator(".plot[data-drawn=true]").count() == 5
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        # A click in a legend hides a contestant in all plots of its claim, and in no other.
        page.locator('button[data-group="0"][data-run="ours"]').first.click()
        assert page.locator('button[data-run="ours"][aria-pressed="false"]').count() == 2
