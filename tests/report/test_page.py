import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from retrograde.errors import RunError
from retrograde.report import collect, write
from retrograde.report.formats import flops, share, size
from retrograde.report.groups import Group, grouped
from retrograde.report.page import section
from retrograde.report.pictures import charts, swatches
from retrograde.report.pictures.chart import COLOURS
from retrograde.report.prose import caveats, headline

Make = Callable[..., Path]
SPACE = "\u00a0"


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


def group(path: Path) -> Group:
    return grouped(collect([path]))[0]


def edit(folder: Path, **fields: object) -> None:
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(result | fields))


def test_writes_the_page_and_the_folders_above_it(runs: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "report.html"
    assert write([runs], output, "Two dithers") == output
    text = Page(output.read_text(encoding="utf-8")).text
    assert "Two dithers" in text
    assert "Dither(scale=1)" in text
    assert f"97.2{SPACE}%" in text
    assert "images · convolutions" in text


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


def test_what_comes_from_runs_is_escaped(make_run: Make, tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>"
    make_run("a", evil, group=f"group {evil}", recipe={"task": evil}, machine={"cpu": evil})
    text = page(tmp_path / "runs", evil)
    assert "<script>alert" not in text
    parsed = Page(text)
    assert parsed.text.count(evil) > 5
    scripts = [attrs for tag, attrs in parsed.tags if tag == "script"]
    plots = [attrs for _, attrs in parsed.tags if attrs.get("class") == "plot"]
    # Each plot's data, plotly and the page's own script: no further one came in through a label.
    assert len(scripts) == len(plots) + 2


def test_plot_data_is_json(runs: Path) -> None:
    found = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page(runs), re.DOTALL)
    assert len(found) == 16
    assert all(json.loads(text)["data"] for text in found)


def test_differences_are_against_the_baseline_of_the_group(make_run: Make, tmp_path: Path) -> None:
    edit(make_run("base", scale=0), test={"accuracy": 0.90}, seconds=10.0)
    edit(make_run("better"), test={"accuracy": 0.924}, seconds=15.0)
    edit(make_run("worse", scale=4), test={"accuracy": 0.88}, seconds=5.0)
    rows = {row.swatch.label: row.cells for row in section(group(tmp_path / "runs")).table.rows}
    assert rows["Backprop"]["Difference"].text == "baseline"
    assert rows["Dither(scale=2)"]["Test"].text == f"92.4{SPACE}%"
    assert rows["Dither(scale=2)"]["Difference"].text == f"+2.4{SPACE}pt"
    assert rows["Dither(scale=2)"]["Time ratio"].text == f"1.50{SPACE}×"
    assert rows["Dither(scale=4)"]["Difference"].text == f"−2.0{SPACE}pt"
    text = headline(group(tmp_path / "runs"))
    assert text.startswith(f"Dither(scale=2) reaches 92.4{SPACE}% test accuracy, +2.4{SPACE}pt against")
    assert "1.50 times the baseline’s time" in text


def test_several_baselines_are_averaged(make_run: Make, tmp_path: Path) -> None:
    edit(make_run("base-0", scale=0), test={"accuracy": 0.90})
    edit(make_run("base-1", scale=0), test={"accuracy": 0.92})
    edit(make_run("dither"), test={"accuracy": 0.92})
    found = section(group(tmp_path / "runs"))
    assert "mean of the 2 baselines" in found.caption
    differences = [row.cells["Difference"].text for row in found.table.rows]
    assert differences == [f"−1.0{SPACE}pt", f"+1.0{SPACE}pt", f"+1.0{SPACE}pt"]


def test_a_run_with_nothing_measured_makes_a_page(make_run: Make, tmp_path: Path) -> None:
    folder = make_run("empty", finished=False, plan=None, machine=None, recipe=None)
    (folder / "metrics.jsonl").unlink()
    assert "unfinished" in Page(page(tmp_path / "runs")).text
    cells = section(group(tmp_path / "runs")).table.rows[0].cells
    assert [cell.text for cell in cells.values()] == ["–"] * 9 + ["unfinished"]
    assert not any(charts(group(tmp_path / "runs")).values())


def test_a_diverged_run_makes_a_page(make_run: Make, tmp_path: Path) -> None:
    folder = make_run("diverged", epochs=2)
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(re.sub(r'"loss": [^,}]+', '"loss": NaN', text))
    edit(folder, test={"accuracy": float("nan")}, zeros=float("nan"), seconds=float("inf"))
    assert "NaN" not in "".join(re.findall(r"application/json[^>]*>(.*?)</script>", page(tmp_path / "runs")))
    assert section(group(tmp_path / "runs")).table.rows[0].cells["Test"].text == "–"


@pytest.mark.parametrize(
    ("kernel", "scale", "shown"), [("reference", 2, True), ("cpu", 2, False), ("reference", 0, False)]
)
def test_the_reference_caveat_needs_a_reference_kernel_with_a_method(
    make_run: Make, tmp_path: Path, kernel: str, scale: float, shown: bool
) -> None:
    make_run(kernel=kernel, scale=scale)
    assert (
        any("Reference kernels multiply zeros too" in text for text in caveats(group(tmp_path / "runs")))
        == shown
    )


def test_caveats_name_other_machines_and_unfinished_runs(make_run: Make, tmp_path: Path) -> None:
    make_run("base", scale=0)
    make_run("dither", machine={"cpu": "Another"}, finished=False)
    found = " ".join(caveats(group(tmp_path / "runs")))
    assert "different machines" in found
    assert "Dither(scale=2) is unfinished" in found


def test_a_run_keeps_its_colour_in_every_plot(runs: Path) -> None:
    first = group(runs)
    colours = {swatch.run: swatch.colour for swatch in swatches(first)}
    assert list(colours.values())[1:] == list(COLOURS[:2])
    seen = 0
    for chart in [chart for found in charts(first).values() for chart in found]:
        for trace in chart.spec["data"]:
            if "meta" in trace:
                colour = trace.get("line", trace.get("marker"))["color"]
                assert colour == colours[trace["meta"]["run"]]
                seen += 1
    assert seen > 20


def test_the_bars_of_a_count_add_up_to_its_total(runs: Path) -> None:
    first = group(runs)
    (chart,) = charts(first)["flops"]
    bars = [trace for trace in chart.spec["data"] if trace["type"] == "bar"]
    at = {y for trace in bars for y in trace["y"]}
    sums = [
        sum(x for trace in bars for x, y in zip(trace["x"], trace["y"], strict=True) if y == row)
        for row in sorted(at)
    ]
    counts = ("dense", "needed", "executed", "discounted")
    totals = [getattr(run.result.flops, count) / 1e9 for run in first.runs for count in counts]
    assert sums == pytest.approx(totals)
    assert "overhead, or not split" in [swatch.label for swatch in chart.legend]


def test_plots_and_tables_are_described(runs: Path) -> None:
    tags = Page(page(runs)).tags
    assert ("html", {"lang": "en"}) in tags
    plots = [attrs for _, attrs in tags if attrs.get("class") == "plot"]
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in plots)
    names = [tag for tag, _ in tags]
    assert names.count("caption") == names.count("table")
    assert all("scope" in attrs for tag, attrs in tags if tag == "th")


def test_numbers_are_written_for_people() -> None:
    assert share(0.974) == f"97.4{SPACE}%"
    assert flops(1.2e9) == f"1.2{SPACE}GFLOP"
    assert size(3 * 2**20) == f"3.0{SPACE}MiB"
    assert share(None) == flops(None) == flops(float("nan")) == "–"
