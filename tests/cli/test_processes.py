"""The command as a process: streams, exit codes, signals and kills."""

import json
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from outcome import QUICK, Outcome, assert_same_run, lines, strict_json

from retrograde.cli.signals import stop_request

Run = Callable[..., Outcome]
Start = Callable[..., "subprocess.Popen[str]"]

LONG = (
    *("--model", "toy_models:dropout", "--limit", "640", "--batch-size", "32", "--epochs", "30"),
    *("--method", "dither", "--target-sparsity", "0.9"),
)


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[str]", seconds: float = 90) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.01)


@pytest.fixture
def whole(run: Run) -> Path:
    """The run of `LONG` without interruption."""
    assert run("train", *LONG, "--out", "whole").code == 0
    return Path("whole")


def test_result_on_stdout_and_log_on_stderr(start: Start) -> None:
    process = start("train", *QUICK, "--method", "dither", "--json")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert json.loads(out)["status"] == "finished"
    assert "run folder" in err
    assert "\x1b" not in out + err


def test_wrong_usage_and_bad_input(start: Start) -> None:
    processes = [start("train", "--nope"), start("train", "--data", "nowhere", "--json")]
    results = [(process.communicate(timeout=120), process.returncode) for process in processes]
    (usage, bad) = results
    assert (usage[0][0], usage[1]) == ("", 2)
    assert json.loads(bad[0][0])["error"]["type"] == "DataError"
    assert bad[1] == 3
    assert "Traceback" not in usage[0][1] + bad[0][1]


def test_a_polite_signal_ends_between_steps_and_the_run_goes_on(run: Run, start: Start, whole: Path) -> None:
    """SIGINT and SIGTERM: 130, result.json says interrupted, and the resumed run is the uninterrupted one."""
    folders = {signal.SIGINT: Path("int"), signal.SIGTERM: Path("term")}
    for number, folder in folders.items():
        process = start("train", *LONG, "--out", folder, "--json")
        metrics = folder / "metrics.jsonl"
        wait_for(lambda metrics=metrics: metrics.exists() and metrics.stat().st_size > 0, process)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (130, ""), err
        assert "Traceback" not in err
        result = strict_json(folder / "result.json")
        assert result["status"] == "interrupted"
        assert 0 < result["steps"] < 600
        assert run("train", "--resume", "--out", folder).code == 0
        assert_same_run(whole, folder)


def test_killed_again_and_again(start: Start, whole: Path) -> None:
    """SIGKILL at random moments, a checkpoint every few milliseconds: nothing is lost, nothing is counted twice."""
    folder, moments = Path("killed"), random.Random(4)
    seen: list[int] = []
    for attempt in range(4):
        resume = ("--resume",) if attempt else ()
        process = start("train", *LONG, "--checkpoint-seconds", "0.01", "--out", folder, *resume)
        size = (folder / "metrics.jsonl").stat().st_size if attempt else 0
        metrics = folder / "metrics.jsonl"
        wait_for(lambda m=metrics, s=size: m.exists() and m.stat().st_size > s, process)
        time.sleep(moments.uniform(0, 0.4))
        process.kill()
        process.communicate()
        assert not (folder / "model.safetensors").exists()
        seen.append(lines(folder)[-1]["step"])
    assert seen == sorted(seen), "each attempt goes on where the last one was"
    process = start("train", "--resume", "--out", folder)
    assert process.wait(timeout=120) == 0
    assert_same_run(whole, folder)
    names = {path.name for path in folder.iterdir()}
    assert names == {path.name for path in whole.iterdir()}, "no half-written files are left"


# signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_interrupts_at_once(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_request() as stop:
        assert not stop()
        signal.raise_signal(number)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before
