"""The page of run folders: one file, escaped, described, and the same for the same runs."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from small_runs import Make, edit, edit_epochs

from retrograde.errors import RunError
from retrograde.lab import files
from retrograde.lab.record import Timing
from retrograde.report import write
from retrograde.report.comparison import of_folders
from retrograde.report.formats import cell, flat, flops
from retrograde.report.page import Fold, section
from retrograde.report.tables import plan_table, run_table


class Page(HTMLParser):
    """Tags with their attributes, and the text outside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.skipped = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.skipped = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self.skipped = False

    def handle_data(self, data: str) -> None:
        if not self.skipped:
            self.text += data


def page(runs: Path, title: str | None = None) -> str:
    return write([runs], runs.parent / "report.html", title).read_text(encoding="utf-8")


def test_writes_the_page_and_the_folders_above_it(runs: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "report.html"
    assert write([runs], output, "Two dithers") == output
    text = Page(output.read_text(encoding="utf-8")).text
    for said in ("Two dithers", "dither(scale=1.0)", "digits · resmlp", "deepfocus(warmup=2) is unfinished"):
        assert said in text, said


def test_a_page_of_several_groups_counts_them(runs: Path, copy_run: Make) -> None:
    assert "<title>Training runs in 2 groups</title>" in page(runs)
    assert "<title>digits · resmlp</title>" in page(copy_run("blocks", "alone"))


def test_an_output_that_cannot_be_written_is_an_error(runs: Path) -> None:
    with pytest.raises(RunError, match="cannot be written"):
        write([runs], runs)


def test_the_same_runs_give_the_same_bytes(runs: Path) -> None:
    assert page(runs) == page(runs)


def test_the_page_needs_no_network_and_holds_plotly_once(runs: Path) -> None:
    text = page(runs)
    tags = Page(text).tags
    links = [attrs.get("src") or attrs.get("href") or "" for _, attrs in tags]
    assert all(link.startswith(("#", "data:")) for link in links if link)
    assert not any("src" in attrs for tag, attrs in tags if tag == "script")
    assert len(re.findall(r"plotly\.js v\d", text)) == 1
    styles = "".join(re.findall(r"<style>(.*?)</style>", text, re.DOTALL))
    assert "url(" not in styles
    assert "@import" not in styles


def test_what_comes_from_runs_is_escaped(copy_run: Make, tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>"
    copy_run("plain-0", "a", label=evil, group=f"group {evil}", machine={"cpu": evil})
    text = page(tmp_path / "runs", evil)
    assert "<script>alert" not in text
    parsed = Page(text)
    assert parsed.text.count(evil) > 5
    scripts = [attrs for tag, attrs in parsed.tags if tag == "script"]
    plots = [attrs for _, attrs in parsed.tags if attrs.get("class") == "plot"]
    # Each plot's data, plotly and the page's own script: no further one came in through a label.
    assert len(scripts) == len(plots) + 2


def test_plot_data_is_json_also_of_a_run_that_diverged(copy_run: Make, tmp_path: Path) -> None:
    folder = copy_run("dither-0", outcome={"zeros": float("nan"), "seconds": float("inf")})
    text = (folder / files.METRICS).read_text()
    (folder / files.METRICS).write_text(re.sub(r'"loss": [^,}]+', '"loss": NaN', text))
    edit(folder / files.RESULT, test={"accuracy": float("nan")})
    found = re.findall(
        r'<script type="application/json"[^>]*>(.*?)</script>', page(tmp_path / "runs"), re.DOTALL
    )
    assert len(found) > 5
    assert all(json.loads(text)["data"] for text in found)
    assert "NaN" not in "".join(found)
    comparison = of_folders([tmp_path / "runs"])[0]
    assert comparison.result.summaries["dither(scale=1.0)"].keys() >= {"executed"}
    assert "accuracy" not in comparison.result.summaries["dither(scale=1.0)"]


def test_plots_and_tables_are_described(runs: Path) -> None:
    tags = Page(page(runs)).tags
    assert ("html", {"lang": "en"}) in tags
    plots = [attrs for _, attrs in tags if attrs.get("class") == "plot"]
    assert plots
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in plots)
    names = [tag for tag, _ in tags]
    assert names.count("caption") == names.count("table")
    assert all("scope" in attrs for tag, attrs in tags if tag == "th")
    ids = [attrs["id"] for _, attrs in tags if "id" in attrs]
    assert len(ids) == len(set(ids))


def titles(folds: tuple[Fold, ...]) -> list[str]:
    return [table.caption for fold in folds for table in fold.tables if table.rows]


def test_runs_are_folded_away_and_a_plan_is_shown_once(runs: Path) -> None:
    plain, dither, each = section(of_folders([runs])[0]).folds
    assert [fold.label for fold in plain.folds] == ["plain, seed 0", "plain, seed 1"]
    first, second = dither.folds
    assert titles((first,))[0] == "Plan: what is attached to each layer, and why"
    assert second.text == "The plan is that of dither(scale=1.0), seed 0."
    assert titles((second,)) == ["Layers in the last epoch", "Run", "Configuration", "Machine"]
    assert len(each.tables[0].rows) == 4


def test_a_plan_names_layers_methods_and_reasons(copy_run: Make, tmp_path: Path) -> None:
    copy_run("blocks")
    (run,) = of_folders([tmp_path / "runs"])[0].variants[0].records
    table = plan_table(run)
    assert [row.cells[0] for row in table.rows] == [layer.name for layer in run.description.plan.layers]
    assert {row.cells[6] for row in table.rows} == {"attached"}
    assert {row.cells[4] for row in table.rows} == {"deepfocus"}


def test_a_forecast_stands_beside_what_was_measured(copy_run: Make, tmp_path: Path) -> None:
    for run, forecast in (("dither-0", True), ("plain-0", False)):
        copy_run(run)
        (record,) = of_folders([tmp_path / "runs" / run])[0].variants[0].records
        rows = {row.cells[0]: row.cells[1] for row in run_table(record).rows}
        assert ("Attached backward passes in a step, forecast" in rows) is forecast
        assert rows["Status"] == "finished"
    outcome = record.outcome.model_copy(update={"timing": Timing(forecast_bytes=3 * 2**20)})
    record = replace(record, outcome=outcome)
    rows = {row.cells[0]: row.cells[1] for row in run_table(record).rows}
    assert rows["Saved activations, forecast"] == "3.00 MiB"


def test_a_methods_own_numbers_have_columns(copy_run: Make, tmp_path: Path) -> None:
    folder = copy_run("dither-0")
    edit_epochs(folder, layers={"head": {"zeros": 0.5, "something_new": 17, "energy": 0.25, "odd": [1]}})
    assert "something new" in Page(page(tmp_path / "runs")).text
    assert [cell(value, name) for name, value in (("new", 17000), ("energy", 0.25), ("odd", [1]))] == [
        "17,000",
        "25.00 %",
        "–",
    ]


def test_numbers_are_written_for_people() -> None:
    assert flops(1.2e9) == "1.2 GFLOP"
    assert flops(None) == flops(float("nan")) == "–"
    assert flat({"a": {"b": [1, 2]}, "c": [{"d": "e"}], "f": {}}) == [
        ("a.b", "[1, 2]"),
        ("c.0.d", "e"),
        ("f", "{}"),
    ]
