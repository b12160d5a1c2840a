"""``compress``: a table, a page and a recommendation."""

from collections.abc import Callable
from pathlib import Path

import pytest
from outcome import Outcome

pytest.importorskip("torch_pruning", reason="torch-pruning is not installed")

SMALL = ("--epochs", "1", "--limit", "128", "--seeds", "1", "--trials", "0", "--widths", "0.5")


def test_compress_trains_and_recommends(run: Callable[..., Outcome]) -> None:
    outcome = run("compress", "mlp-small", "digits", *SMALL, "--max-dendrites", "2", "--tolerance", "100")
    assert outcome.code == 0
    told = " ".join(outcome.out.split())
    for words in (
        "whole network",
        "width 0.5, dendrites",
        "BatchNorm, as many parameters as 0.5",
        "Recommended: ",
    ):
        assert words in told
    assert "Dendrites: at width 0.5 dendrites change accuracy by" in told
    assert outcome.out.rstrip().endswith("report: compress.html")
    assert "Recommended: " in Path("compress.html").read_text(encoding="utf-8")
    again = run(
        "compress", "mlp-small", "digits", *SMALL, "--max-dendrites", "2", "--tolerance", "100", "--json"
    )
    assert again.json["recommended"] != "plain", "a hundred points may be lost"
    assert min(again.json["steps"], key=lambda step: step["parameters"])["name"] == again.json["recommended"]


def test_widths_out_of_range_are_bad_input(run: Callable[..., Outcome]) -> None:
    outcome = run("compress", "mlp-small", "digits", "--widths", "1.5")
    assert outcome.code == 3
    assert "shares of the hidden channels" in outcome.err
