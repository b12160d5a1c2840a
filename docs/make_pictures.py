"""Takes pictures of a real run of ``retrograde demo``, its terminal and its report. Needs Chromium."""

import os
import shutil
import subprocess
import sys
import tempfile
from io import StringIO
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

FOLDER = Path(__file__).parent / "pictures"
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
COMMAND = "retrograde demo"
COLUMNS = 132


def main() -> None:
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        sys.exit("Chromium is needed to make the pictures: install the package chromium.")
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary, sync_playwright() as playwright:
        terminal = run_demo(Path(temporary))
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        picture_terminal(browser, terminal, Path(temporary))
        picture_report(browser, Path(temporary) / "report.html")
        browser.close()


def run_demo(folder: Path) -> str:
    """The real run; returns what the terminal showed."""
    environment = {**os.environ, "FORCE_COLOR": "1", "COLUMNS": str(COLUMNS)}
    command = [Path(sys.executable).parent / "retrograde", "demo"]
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def picture_terminal(browser: Browser, shown: str, folder: Path) -> None:
    console = Console(record=True, width=COLUMNS, file=StringIO(), force_terminal=True)
    console.print(Text(f"$ {COMMAND}", style="bold"))
    console.print(Text.from_ansi(shown), soft_wrap=True)
    style = (
        "body{margin:0;display:inline-block;padding:18px 22px;background:#0c0c0c}pre{margin:0;font-size:14px}"
    )
    page_file = folder / "terminal.html"
    html = console.export_html(theme=MONOKAI)
    page_file.write_text(html.replace("<style>", f"<style>{style}"), encoding="utf-8")
    page = browser.new_page(device_scale_factor=1.5, viewport={"width": 1600, "height": 400})
    page.goto(page_file.as_uri())
    page.locator("body").screenshot(path=FOLDER / "terminal.png")


def picture_report(browser: Browser, report: Path) -> None:
    page = browser.new_page(viewport={"width": 1180, "height": 1380})
    page.goto(report.as_uri())
    page.wait_for_selector(".plotly .main-svg")
    page.screenshot(path=FOLDER / "report.png")


if __name__ == "__main__":
    main()
