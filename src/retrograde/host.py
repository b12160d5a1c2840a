"""What every part may need of the machine: the processor's name, the cache folder, files written whole or not."""

import ctypes
import functools
import os
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

_INFO = Path("/proc/cpuinfo")
_KEPT_BY_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
"""Variables by which a user has chosen how glibc keeps memory."""


def cache_folder(part: str) -> Path:
    """``$RETROGRADE_CACHE/<part>``, or ``~/.cache/retrograde/<part>`` where that is not set; it may not exist yet."""
    root = os.environ.get("RETROGRADE_CACHE") or "~/.cache/retrograde"
    try:
        return Path(root).expanduser() / part
    except RuntimeError:  # a user without a home, as in many containers: a place where nothing can be kept
        return Path(os.devnull) / root / part


def processor() -> str:
    """The processor's name."""
    match = re.search(r"model name\s*:\s*(.+)", _INFO.read_text()) if _INFO.is_file() else None
    return match[1].strip() if match else platform.processor() or platform.machine()


def instructions() -> str:
    """What the processor can do, where the system tells it: machines of one name may differ."""
    match = re.search(r"flags\s*:\s*(.+)", _INFO.read_text()) if _INFO.is_file() else None
    return match[1].strip() if match else ""


def settings() -> dict[str, str]:
    """Environment variables that change how fast products are: torch's own, and those that numba compiles."""
    prefixes = ("ATEN_CPU_", "ONEDNN_", "DNNL_", "MKL_", "NUMBA_CPU_")
    return {k: v for k, v in sorted(os.environ.items()) if k.startswith(prefixes)}


def write_atomically(path: Path, write: Callable[[BinaryIO], object], *, shared: bool = False) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk, and put it in place of `path`.

    Args:
        path: where it ends.
        write: called with the open file.
        shared: several processes may do so at once: each has a temporary file of its own, which a killed one leaves.
    """
    # Of a name as long as names may be there is no longer one.
    temporary = path.parent / f".{path.name[:100]}{f'.{os.getpid()}' if shared else ''}.partial"
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@functools.cache
def keep_freed_memory() -> bool:
    """Let glibc keep what a training step frees for the next step, once in a process; whether it does.

    By default it returns the end of its heap to the system whenever much of that is free, and whether a backward pass
    leaves it so is chance. The next step then takes every page anew: up to a third of the time of a convolutional
    network's step, plain or attached. What is kept is at most what the process has held at once. Whoever sets one of
    `_KEPT_BY_USER` in the environment is obeyed.
    """
    if any(name in os.environ for name in _KEPT_BY_USER):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no glibc
        return False
    # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h: never, and from the largest size that glibc accepts on.
    return bool(mallopt(-1, 2**31 - 1)) and bool(mallopt(-3, 1 << 25))
