"""``bench``: rows as JSON or as a table, a file beside them, and refusals before anything is timed."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
from outcome import Outcome, strict_json
from torch import nn

from retrograde.kernels import rehearse
from retrograde.lab import bench, overhead, precisions, timing
from retrograde.lab.bench import Row
from retrograde.lab.contestants import Convolution, Linear, Workload
from retrograde.lab.precisions import Precision

Run = Callable[..., Outcome]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Shapes and models that take no time; the parts of batches that were asked for."""
    parts: list[int] = []

    def workloads(part: int) -> dict[str, Workload]:
        parts.append(part)
        small = Workload(
            lambda: nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 5)), (8, 20), (8,), 5
        )
        return {"mlp": small, "gpt": small}

    monkeypatch.setattr(bench, "SHAPES", (Linear(48, 32, 24), Convolution(3, 8, 6, 4, 3)))
    monkeypatch.setattr(bench, "QUICK_SHAPES", (Linear(48, 32, 24),))
    monkeypatch.setattr(bench, "workloads", workloads)
    monkeypatch.setattr(overhead, "_CALLS", {32: 2, 512: 1})
    monkeypatch.setattr(rehearse, "rehearse", lambda tell: [])
    monkeypatch.setattr(precisions, "measure", lambda: [])
    monkeypatch.setattr(timing, "DROPPED_AT", float("inf"))
    return parts


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("what", ["kernels", "layers", "steps"])
def test_json_and_file_hold_rows_machine_and_commit(run: Run, what: str) -> None:
    outcome = run("bench", what, "--rounds", "2", "--json", "-o", "found.json")
    assert outcome.code == 0, outcome.err
    found = outcome.json
    assert found == strict_json(Path("found.json"))
    assert {"machine", "commit", "rows", "dropped"} <= found.keys()
    assert {"torch", "threads", "cpu"} <= found["machine"].keys()
    assert (found["what"], found["rounds"], found["most_rounds"]) == (what, 2, 2)
    assert found["command"] == f"retrograde bench {what} --rounds 2 --json -o found.json"
    assert found["rows"]
    for row in found["rows"]:
        assert list(row) == [field.name for field in fields(Row)]
        for baseline in ("fp32", "bf16"):
            low, high = row[f"spread_{baseline}"]
            assert 0 < low <= high
            assert row[f"speedup_{baseline}"] > 0
        assert (row["model"] is not None) == (what == "steps")
    assert f"bench {what}" in outcome.err


@pytest.mark.usefixtures("tiny")
def test_kernels_table_is_readable_without_a_terminal(run: Run) -> None:
    outcome = run("bench", "kernels", "--rounds", "1")
    assert outcome.code == 0
    assert "\x1b" not in outcome.out
    for words in ("linear 48x32x24", "conv 3x8x6x6->4 3x3", "auto: reference", "skip-bfloat16", "98%", "×"):
        assert words in outcome.out
    assert "statistics, noise, indexing" in outcome.out
    assert max(map(len, outcome.out.splitlines())) <= 120


@pytest.mark.parametrize(("what", "words"), [("layers", "scale 2"), ("steps", "dither(scale=4.0)")])
@pytest.mark.usefixtures("tiny")
def test_other_tables_name_what_was_timed(run: Run, what: str, words: str) -> None:
    outcome = run("bench", what, "--rounds", "1")
    assert outcome.code == 0
    assert words in outcome.out
    assert "bf16 autocast:" in " ".join(outcome.out.split())


def test_steps_take_the_chosen_models_and_methods(run: Run, tiny: list[int]) -> None:
    flags = ("--model", "gpt", "--method", "dither", "decorrelate", "--rounds", "1", "--json")
    rows = run("bench", "steps", *flags).json["rows"]
    assert [(row["model"], row["method"]) for row in rows] == [
        ("gpt", "dither(scale=2.0)"),
        ("gpt", "dither(scale=4.0)"),
        ("gpt", "dither(scale=2.0, forward=int8)"),
        ("gpt", "dither"),
        ("gpt", "dither(scale=4.0) under bfloat16"),
        ("gpt", "decorrelate"),
    ]
    assert tiny == [1]


def test_quick_takes_fewer_shapes_and_smaller_batches(run: Run, tiny: list[int]) -> None:
    rows = run("bench", "layers", "--quick", "--rounds", "1", "--json").json["rows"]
    assert [row["op"] for row in rows] == ["linear"]
    found = run("bench", "steps", "--quick", "--models", "mlp", "--methods", "dither", "--json").json
    assert (tiny, found["rounds"]) == ([8], 3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["steps", "--models", "mpl"], ["'mpl'", "Did you mean 'mlp'?", "vgg-small"]),
        (["steps", "--methods", "diter"], ["'diter'", "Did you mean 'dither'?", "spectral"]),
        (["kernels", "--rounds", "0"], ["rounds=0", "1 or more"]),
        (["kernels", "--seconds", "0"], ["seconds=0", "above 0"]),
        (["kernels", "--model", "mlp"], ["bench kernels", "--model", "bench steps"]),
        (["layers", "--method", "dither"], ["bench layers", "--method"]),
        (["layers", "-o", "nowhere/found.json"], ["nowhere/found.json", "--output"]),
    ],
)
def test_bad_input_is_3_and_nothing_is_timed(
    run: Run, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: list[str]
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("timed")

    monkeypatch.setattr(bench, "interleave", refuse)
    outcome = run("bench", *arguments)
    assert (outcome.code, outcome.out) == (3, "")
    assert "OptionError" in outcome.err
    assert all(word in outcome.err for word in words), outcome.err


@pytest.mark.parametrize("arguments", [[], ["kernel"], ["kernels", "--rounds", "few"]])
def test_wrong_usage_is_2(run: Run, arguments: list[str]) -> None:
    outcome = run("bench", *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err


def test_help_lists_the_flags(run: Run) -> None:
    outcome = run("bench", "--help")
    assert outcome.code == 0
    assert all(
        flag in outcome.out for flag in ("--json", "--quick", "--rounds", "--seconds", "--model", "--method")
    )


@pytest.mark.usefixtures("tiny")
def test_steps_name_the_methods_that_have_not_begun(run: Run) -> None:
    """As the methods themselves say; those that were not timed are not named."""
    late = "not begun so early in a run"

    def told(method: str) -> str:
        return " ".join(run("bench", "steps", "--rounds", "1", "--method", method).out.split())

    assert f"{late}: perforate" in told("perforate")
    assert late not in told("dither")


@pytest.mark.usefixtures("tiny")
def test_what_this_machine_has_no_unit_for_is_listed_as_dropped(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "DROPPED_AT", 1e9)
    slow = [Precision("linear", "256x512x512", "bfloat16", 1.0, 1e-10)]
    monkeypatch.setattr(precisions, "measure", lambda: slow)
    shown = " ".join(run("bench", "kernels", "--rounds", "1").out.split())
    assert "not run, or not run again" in shown
    assert "in 3 cells torch in bfloat16 ×10000000000 in a product of 256x512x512" in shown
    found = run("bench", "kernels", "--quick", "--rounds", "1", "--json").json
    assert {one["variant"] for one in found["dropped"]} == {"torch in bfloat16", "bfloat16"}
    assert all(row["speedup_bf16"] is None for row in found["rows"])


@pytest.mark.usefixtures("tiny")
def test_a_budget_makes_fewer_rounds_and_the_table_says_how_many(run: Run) -> None:
    outcome = run("bench", "layers", "--rounds", "50", "--seconds", "1e-9")
    assert "1 interleaved rounds" in " ".join(outcome.out.split())
    found = run("bench", "layers", "--seconds", "1e-9", "--json").json
    assert (found["rounds"], found["most_rounds"]) == (1, 1)
