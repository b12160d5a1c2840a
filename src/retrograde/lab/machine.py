"""What a run ran on: a figure without its machine means little."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from retrograde import host


def describe(device: torch.device) -> dict[str, Any]:
    """Processor, cores, memory, versions: plain values for JSON."""
    found: dict[str, Any] = {
        "cpu": host.processor(),
        "instructions": instructions(),
        "cores": _cores(),
        "memory_gib": _memory_gib(),
        "os": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "retrograde": version("retrograde"),
        "threads": torch.get_num_threads(),
        "denormals": "flushed" if flushes_denormals() else "kept",
        "device": device.type,
    }
    if settings := host.settings():
        found["settings"] = settings
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def instructions() -> str:
    """The widest vectors that torch uses here, and what multiplies bfloat16 and 8-bit integers: ``"AVX512 + bf16"``.

    Masks in the environment (``ATEN_CPU_CAPABILITY``, ``ONEDNN_MAX_CPU_ISA``) count.
    """
    widest = torch.backends.cpu.get_cpu_capability()
    flags = host.instructions().split()
    if "AVX512" not in widest or "ONEDNN_MAX_CPU_ISA" in os.environ:
        return widest
    units = {"bf16": "avx512_bf16", "int8": "avx512_vnni", "AMX": "amx_tile"}
    return " + ".join([widest, *(name for name, flag in units.items() if flag in flags)])


def flushes_denormals() -> bool:
    """Whether this thread takes denormal numbers for zero."""
    return float(torch.tensor(1e-40) * 0.5) == 0


def commit() -> str | None:
    """The checkout's commit, with ``-dirty`` when it holds changes; None outside a checkout."""
    try:
        # A package that is installed below somebody's checkout is none of it.
        _git("ls-files", "--error-unmatch", Path(__file__).name)
        return _git("describe", "--always", "--dirty", "--abbrev=12")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*command: str) -> str:
    folder = Path(__file__).parent
    run = subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, check=True)
    return run.stdout.strip()


def _cores() -> int:
    # The cores that this process may use, which in a container are fewer than the machine's.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_gib() -> float | None:
    if "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
