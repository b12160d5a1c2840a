import os
import subprocess
import sys
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
import torch

pytest.register_assert_rewrite("outcome")

from outcome import Outcome  # noqa: E402

from retrograde.cli import main  # noqa: E402

_TOY = """
from torch import nn


def dropout(data):
    width = data.train.inputs[0].numel()
    return nn.Sequential(
        nn.Flatten(), nn.Linear(width, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, data.classes)
    )


def wide(data):
    return nn.Sequential(nn.Flatten(), nn.Linear(999, data.classes))


def narrow(data):
    return nn.Sequential(nn.Flatten(), nn.Linear(data.train.inputs[0].numel(), data.classes - 1))


def number():
    return 3
"""


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test works in an empty folder of its own with a module of toy models, without the user's settings."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "toy_models.py").write_text(_TOY)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("RETROGRADE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("RETROGRADE_DATA", "FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Run a command in this process, without a keyboard."""
    monkeypatch.setattr(sys, "stdin", None)

    def run_(*arguments: object) -> Outcome:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as leave:
            code = leave.code if isinstance(leave.code, int) else 1 if leave.code else 0
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run_


@pytest.fixture
def start() -> Generator[Callable[..., "subprocess.Popen[str]"]]:
    """Start a command as a process of its own, without a keyboard."""
    started: list[subprocess.Popen[str]] = []

    def start_(*arguments: object) -> "subprocess.Popen[str]":
        code = "import sys; from retrograde.cli import main; sys.exit(main())"
        process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Sums depend on the number of threads in their last bits.
            env={**os.environ, "TERM": "dumb", "OMP_NUM_THREADS": str(torch.get_num_threads())},
        )
        started.append(process)
        return process

    yield start_
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()
