"""The README does what it says: its Python runs, its commands exist, its figures come from ``results/``."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from retrograde.cli import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run(capsys: pytest.CaptureFixture[str]) -> None:
    """Each Python block runs as it stands, and prints a plan and a summary."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})
    assert "attached" in capsys.readouterr().out


def test_commands_exist(capsys: pytest.CaptureFixture[str]) -> None:
    """Every `retrograde COMMAND` in the README is a command with a help page."""
    commands = set(re.findall(r"^retrograde (\w+)", README, re.MULTILINE))
    assert {"methods", "plan", "train", "report", "doctor"} <= commands
    for command in commands:
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0
        assert command in capsys.readouterr().out


def test_linked_files_exist() -> None:
    """Relative links and pictures lead somewhere."""
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_tables_are_those_of_the_results() -> None:
    """No figure in a table is older than, or other than, what `results/` holds."""
    done = subprocess.run(
        [sys.executable, "docs/make_tables.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
