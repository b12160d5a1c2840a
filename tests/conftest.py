"""What every test shares: the random seed, and the conformance table printed at the end."""

import pytest
import torch

CONFORMANCE: pytest.StashKey[dict[tuple[str, str], dict[str, str]]] = pytest.StashKey()
"""(method, layer kind) → mode → outcome."""


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Each test starts from the same random state, in whatever order it runs."""
    torch.manual_seed(0)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[CONFORMANCE] = {}
    config.pluginmanager.register(_Collector(config))
    config.addinivalue_line("markers", "conformance: one cell of the conformance table")
    # Tensors here are small: a second thread costs more than it brings, much more on a busy machine.
    torch.set_num_threads(1)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):  # type: ignore[no-untyped-def]
    """Note the outcome of every test that carries a conformance cell, in its report: that travels between processes."""
    outcome = yield
    report = outcome.get_result()
    marker = item.get_closest_marker("conformance")
    if marker is None or (report.when != "call" and report.passed):
        return
    params = item.callspec.params  # type: ignore[attr-defined]
    cell = params["method"].name, params["kind"].name, params["mode"]
    if report.passed:
        reason = dict(item.user_properties).get("reason")
        text = f"– {reason}" if reason else "ok"
    elif report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        text = "– " + reason.removeprefix("Skipped: ")
    else:
        text = "FAILED"
    report.user_properties.append(("conformance", [*cell, text]))


class _Collector:
    """Gathers the cells where the table is printed, which with several workers is none of them."""

    def __init__(self, config: pytest.Config) -> None:
        self._table = config.stash[CONFORMANCE]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, cell in report.user_properties:
            if name == "conformance":
                method, kind, mode, text = cell  # type: ignore[misc]
                self._table.setdefault((method, kind), {})[mode] = text


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the conformance table: method × layer kind by mode; exceptions with their reasons below it."""
    table = config.stash[CONFORMANCE]
    if not table:
        return
    modes = list(dict.fromkeys(mode for row in table.values() for mode in row))
    rows = [["method", "layer kind", *modes]]
    reasons: list[str] = []
    for (method, kind), cells in sorted(table.items()):
        shown = [cells.get(mode, "") for mode in modes]
        for i, text in enumerate(shown):
            if text.startswith("– "):
                if text[2:] not in reasons:
                    reasons.append(text[2:])
                shown[i] = f"({reasons.index(text[2:]) + 1})"
        rows.append([method, kind, *shown])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    terminalreporter.section("conformance")
    for row in rows:
        line = "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True))
        terminalreporter.write_line(line.rstrip())
    for i, reason in enumerate(reasons):
        terminalreporter.write_line(f"({i + 1}) {reason}")
