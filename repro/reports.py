"""What the scripts here share: their command line, and the head of the file that each of them writes."""

import argparse
import shlex
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import torch

from retrograde.lab import machine

RESULTS = Path(__file__).parent.parent / "results"


def arguments(doc: str | None, out: str | None = None) -> argparse.ArgumentParser:
    """A command line whose help is the script's docstring, and the file of `RESULTS` that it writes by default."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if out is not None:
        parser.add_argument("--out", type=Path, default=RESULTS / out)
    return parser


def head(what: str, device: str = "cpu") -> dict[str, Any]:
    """What a result begins with; made before anything is measured, for the working tree may change meanwhile."""
    try:
        found = machine.describe(torch.device(device))
    except PackageNotFoundError:
        # On a borrowed machine retrograde may be a source folder on the path, and not installed.
        found = {"torch": torch.__version__, "device": device}
    return {
        "schema": 1,
        "what": what,
        "command": shlex.join(["python", f"repro/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "machine": found,
        "commit": machine.commit(),
    }
