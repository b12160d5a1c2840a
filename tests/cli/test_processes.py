"""The command as a process: streams, exit codes, signals and kills."""

import json
import random
import signal
import subprocess
import sys
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
    *("--method", "dither", "--target-sparsity", "0.9", "--no-decline"),
)


def wait_for(condition: Callable[[], bool], *processes: "subprocess.Popen[str]") -> None:
    until = time.monotonic() + 90
    while not condition():
        for process in processes:
            assert process.poll() in (None, 130), process.communicate()[1]
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.01)


@pytest.fixture
def whole(run: Run) -> Path:
    """The run of `LONG` without interruption."""
    assert run("train", *LONG, "--out", "whole").code == 0
    return Path("whole")


def test_streams_and_exit_codes(start: Start) -> None:
    processes = [
        start("train", *QUICK, "--method", "dither", "--json"),
        start("train", "--nope"),
        start("train", "--data", "nowhere", "--json"),
    ]
    outs, errs = zip(*(process.communicate(timeout=120) for process in processes), strict=True)
    assert [process.returncode for process in processes] == [0, 2, 3], errs
    assert json.loads(outs[0])["status"] == "finished"
    assert outs[1] == ""
    assert json.loads(outs[2])["error"]["type"] == "DataError"
    assert "run folder" in errs[0]
    for text in (*outs, *errs):
        assert "Traceback" not in text
        assert "\x1b" not in text


def test_a_polite_signal_ends_between_steps_and_the_run_goes_on(run: Run, start: Start, whole: Path) -> None:
    """SIGINT and SIGTERM: 130, result.json says interrupted, and the resumed run is the uninterrupted one."""
    started = {
        number: (start("train", *LONG, "--out", number.name, "--json"), Path(number.name))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    waiting = dict(started)

    def signal_those_that_train() -> bool:
        for number, (process, folder) in list(waiting.items()):
            metrics = folder / "metrics.jsonl"
            if metrics.exists() and metrics.stat().st_size > 0:
                process.send_signal(number)
                del waiting[number]
        return not waiting

    wait_for(signal_those_that_train, *(process for process, _ in started.values()))
    for process, folder in started.values():
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (130, ""), err
        assert "Traceback" not in err
        result = strict_json(folder / "result.json")
        assert result["status"] == "interrupted"
        assert 0 < result["steps"] < 600
        assert run("train", "--resume", "--model", "toy_models:dropout", "--out", folder).code == 0
        assert_same_run(whole, folder)


def test_killed_again_and_again(start: Start, whole: Path) -> None:
    """SIGKILL at random moments, a checkpoint every few milliseconds: nothing is lost, nothing is counted twice."""
    folder, moments = Path("killed"), random.Random(4)
    seen: list[int] = []
    for attempt in range(3):
        resume = ("--resume",) if attempt else ()
        process = start("train", *LONG, "--checkpoint-seconds", "0.01", "--out", folder, *resume)
        metrics = folder / "metrics.jsonl"
        size = metrics.stat().st_size if attempt else 0
        wait_for(lambda m=metrics, s=size: m.exists() and m.stat().st_size > s, process)
        time.sleep(moments.uniform(0, 0.4))
        process.kill()
        process.communicate()
        assert not (folder / "model.safetensors").exists()
        seen.append(lines(folder)[-1]["step"])
    assert seen == sorted(seen), "each attempt goes on where the last one was"
    process = start("train", "--resume", "--model", "toy_models:dropout", "--out", folder)
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


def test_python_dash_m_is_the_same_tool() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "retrograde", "--version"], capture_output=True, text=True, check=True
    )
    assert "retrograde" in found.stdout
