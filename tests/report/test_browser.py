"""The page in a real browser: it draws, fits a phone and follows the theme."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from small_runs import opened

from retrograde.report import write

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def report(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Several seeds, and all methods, in two groups."""
    return write([trained], tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture(scope="module")
def desktop(browser: Any, report: Path) -> Iterator[tuple[Any, list[str]]]:
    yield from opened(browser, report, 1280, 900, "light")


@pytest.fixture(scope="module")
def phone(browser: Any, report: Path) -> Iterator[tuple[Any, list[str]]]:
    yield from opened(browser, report, 360, 740, "dark")


def luminance(colour: str) -> float:
    red, green, blue = (int(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3])
    return (0.2126 * red + 0.7152 * green + 0.0722 * blue) / 255


def theme_of(page: Any) -> dict[str, float]:
    """Luminance of the page, its text, the plots' tick labels and the baseline's line."""
    colours = page.evaluate(
        """() => {
          const of = (selector, property) => getComputedStyle(document.querySelector(selector))[property];
          return {
            page: of("body", "backgroundColor"), text: of("body", "color"),
            tick: of(".plot .xtick text", "fill"),
            line: of("#plot-0-1-0 .scatterlayer .trace path.js-line", "stroke"),
          };
        }"""
    )
    return {name: luminance(colour) for name, colour in colours.items()}


@pytest.mark.parametrize("size", ["desktop", "phone"])
def test_every_plot_is_drawn(request: pytest.FixtureRequest, size: str) -> None:
    page, trouble = request.getfixturevalue(size)
    assert not trouble
    plots = page.query_selector_all(".plot")
    assert len(plots) == 26
    page.evaluate("window.scrollTo(0, 0)")
    whole = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
    for plot in plots:
        name = plot.get_attribute("id")
        marks = plot.evaluate(
            """(plot) => [...plot.querySelectorAll(
                 `.scatterlayer .trace path.js-line, .scatterlayer .points path, .bars .point path,
                  .scatterlayer path.js-fill, .heatmaplayer image, .shapelayer path`)]
               .filter((path) => (path.getAttribute("d") || path.href) && path.getBoundingClientRect().width > 0)
               .length"""
        )
        assert marks, name
        box = plot.bounding_box()
        assert box["height"] >= 260, name
        assert box["width"] <= page.viewport_size["width"], name
        place = (box["x"], box["y"], box["x"] + box["width"], box["y"] + box["height"])
        assert len(set(whole.crop(place).get_flattened_data())) > 20, name


def test_nothing_scrolls_sideways_on_a_phone(phone: tuple[Any, list[str]]) -> None:
    page, _ = phone
    page.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    # The summary is wider than a phone, so it must scroll inside its own container.
    assert page.evaluate("(box => box.scrollWidth > box.clientWidth)(document.querySelector('.scroll'))")
    page.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = false; })")


def test_text_in_plots_stays_inside(phone: tuple[Any, list[str]]) -> None:
    page, _ = phone
    outside = page.evaluate(
        """() => [...document.querySelectorAll(".plot")].flatMap((plot) => {
          const box = plot.getBoundingClientRect();
          return [...plot.querySelectorAll("svg text")].filter((text) => {
            const own = text.getBoundingClientRect();
            return own.width > 0 && (own.left < box.left - 1 || own.right > box.right + 1);
          }).map((text) => plot.id + ": " + text.textContent);
        })"""
    )
    assert outside == []


def test_the_theme_is_followed_while_the_page_is_open(desktop: tuple[Any, list[str]]) -> None:
    page, trouble = desktop
    light = theme_of(page)
    assert light["page"] > 0.9
    assert max(light["text"], light["line"]) < 0.2
    tick = page.evaluate("getComputedStyle(document.querySelector('.plot .xtick text')).fill")
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(
        """(old) => getComputedStyle(document.querySelector(".plot .xtick text")).fill !== old""", arg=tick
    )
    dark = theme_of(page)
    assert dark["page"] < 0.1
    assert min(dark["text"], dark["line"]) > 0.8
    assert dark["tick"] > 0.5 > light["tick"]
    assert not trouble
    page.emulate_media(color_scheme="light")


def test_a_legend_entry_hides_its_run_in_the_whole_group(desktop: tuple[Any, list[str]]) -> None:
    page, trouble = desktop
    count = "(id) => document.querySelectorAll('#' + id + ' path.js-line').length"
    before = [page.evaluate(count, f"plot-{group}-1-0") for group in (0, 1)]
    button = page.locator(".legend button", has_text="dither(scale=1.0)").first
    button.click()
    page.wait_for_function(f"({count})('plot-0-1-0') < {before[0]}")
    assert page.evaluate(count, "plot-1-1-0") == before[1]
    assert button.get_attribute("aria-pressed") == "false"
    button.click()
    page.wait_for_function(f"({count})('plot-0-1-0') === {before[0]}")
    assert not trouble
