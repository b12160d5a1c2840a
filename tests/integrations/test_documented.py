"""The programs of ``docs/integrations.md`` run, are killed in mid-epoch, run again, and end as if they had not been."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import documented
import pytest
import torch
from documented import ACCELERATE, LIGHTNING, LOOP, NAMESPACES, PAGE, TESTED, TRAINER, run
from torch import nn

from retrograde.engine.layers import AttachedLayer

NEEDS = {
    TRAINER: ("transformers", "accelerate"),
    LIGHTNING: ("lightning",),
    ACCELERATE: ("accelerate",),
    LOOP: (),
}

CHECKPOINTS = {
    TRAINER: ("checkpoints/checkpoint-10/retrograde_session.pt", "checkpoints/checkpoint-20"),
    LIGHTNING: ("checkpoints/epoch=1-step=15.ckpt", "checkpoints/epoch=1-step=20.ckpt"),
    ACCELERATE: ("checkpoints/epoch-0", "checkpoints/epoch-1"),
    LOOP: ("checkpoint.pt", "checkpoint.pt.new"),
}
"""What is there when a program was killed, and what not."""


def model_of(names: dict[str, Any]) -> nn.Module:
    """The model that a program has trained, folded: by its trainer, or by itself."""
    if "plain" in names:
        return names["plain"]
    return names["module"] if "module" in names else names["model"]


def skip_without(section: str) -> None:
    for package in NEEDS[section]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of a section: the folder of its killed programs, by method, and what killed them."""
    if not hasattr(os, "fork"):
        pytest.skip("without fork, killing a process for each method takes minutes")

    @cache
    def kill(section: str) -> tuple[Path, dict[str, int]]:
        folder = tmp_path_factory.mktemp("killed")
        command = [sys.executable, documented.__file__, section, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        found = re.findall(r"^(\w+) (-?\d+)$", done.stdout, re.MULTILINE)
        assert len(found) == len(TESTED[section]), done.stdout[-3000:] + done.stderr[-3000:]
        return folder, {method: int(by) for method, by in found}

    return kill


def test_each_section_has_a_program() -> None:
    assert re.findall(r"^## (.+)", PAGE, re.MULTILINE)[:4] == list(NAMESPACES)


@pytest.mark.parametrize("section", NAMESPACES)
def test_program_before_the_diff(section: str, tmp_path: Path) -> None:
    """It is a program without retrograde, and the diff changes nothing but what has to do with it."""
    skip_without(section)
    names = run(section, None, tmp_path)
    assert "rg" not in names
    added = [line[2:] for line in PAGE.splitlines() if line.startswith("+ ")]
    assert all(re.search(r"retrograde|Retrograde|rg\.|session", line) for line in added)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("section", "method"), [(section, method) for section, methods in TESTED.items() for method in methods]
)
def test_killed_and_run_again(section: str, method: str, tmp_path: Path, killed: Any) -> None:
    """The weights are those of the program that was not killed, and the model is plain."""
    skip_without(section)
    whole = model_of(run(section, method, tmp_path / "whole"))
    folder, by = killed(section)
    assert by[method] == -signal.SIGKILL
    assert (folder / method / CHECKPOINTS[section][0]).exists()
    assert not (folder / method / CHECKPOINTS[section][1]).exists()
    resumed = model_of(run(section, method, folder / method))
    assert not any(isinstance(module, AttachedLayer) for module in resumed.modules())
    expected, found = whole.state_dict(), resumed.state_dict()
    assert found.keys() == expected.keys()
    if method.startswith("perforate"):
        assert any("dendrites." in key for key in found)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
