"""Every example runs as its docstring says, shortened."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
COMMANDS = [
    (path, command.split("#")[0].split()[2:])
    for path in EXAMPLES
    for command in re.findall(rf"^python examples/{path.name}.*$", path.read_text(), re.MULTILINE)
]


def test_each_says_how_it_is_run() -> None:
    assert {path for path, _ in COMMANDS} == set(EXAMPLES) != set()


@pytest.mark.parametrize(("path", "arguments"), COMMANDS, ids=lambda value: getattr(value, "name", None))
def test_example_runs(path: Path, arguments: list[str]) -> None:
    """It ends well, and says what came of both models."""
    command = [sys.executable, str(path), *arguments, "--reports", "8"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 0, found.stderr
    assert "base alone" in found.stdout
    assert "dendrite sets" in found.stdout
