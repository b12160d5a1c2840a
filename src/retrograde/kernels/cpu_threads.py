"""How the numba kernels are compiled, and on how many threads they run: torch's own.

What is compiled is kept on disk, and stale after any change in this folder: kernels call those of other files, of
which numba's own cache knows nothing.
"""

import contextlib
import functools
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import torch
from numba import njit
from numba.core import cgutils, config, types
from numba.core.caching import FunctionCache
from numba.extending import intrinsic
from numba.np.ufunc import parallel as numba_parallel

from retrograde import host
from retrograde.errors import RetrogradeWarning

if sys.platform == "linux" and "NUMBA_THREADING_LAYER" not in os.environ:
    # The layer that runs in torch's own OpenMP threads: two pools on the same cores would wait for each other.
    config.THREADING_LAYER = "omp"  # pyright: ignore[reportAttributeAccessIssue]

_GRAIN = 32768
"""Entries below which one thread works alone, as in torch."""

# Sums may be contracted and reordered, which vectorises them; NaN and Inf keep their meaning.
_FAST = {"contract", "reassoc", "nsz"}


@functools.cache
def _sources() -> tuple[tuple[str, int, float], ...]:
    """Of all kernels: what a kernel was compiled from changes when any of them does."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return tuple((file.name, file.stat().st_size, file.stat().st_mtime) for file in files)


class _Cache(FunctionCache):
    """numba's cache on disk: files that cannot be read or written cost time, and nothing else."""

    def __init__(self, function: Any) -> None:
        super().__init__(function)
        file: Any = self._cache_file
        file._source_stamp = file._source_stamp, _sources()

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # unpickling damaged bytes raises whatever they lead to
            with contextlib.suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with contextlib.suppress(OSError):
            super().save_overload(sig, data)


def _compiler(**options: Any) -> Callable[[Any], Any]:
    """Compiles a function, and keeps the result on disk where that is possible."""

    def compiled(function: Any) -> Any:
        made: Any = njit(nogil=True, **options)(function)
        cache = _cache(function)
        if cache is not None:
            made._cache = cache
        return made

    return compiled


def _cache(function: Any) -> _Cache | None:
    """Where numba keeps what it compiles, else our own cache folder: an installation may be read-only, and a home."""
    with contextlib.suppress(RuntimeError, OSError):
        return _Cache(function)
    numbas = config.CACHE_DIR  # pyright: ignore[reportAttributeAccessIssue]
    config.CACHE_DIR = str(host.cache_folder("numba"))  # pyright: ignore[reportAttributeAccessIssue]
    try:
        return _Cache(function)
    except (RuntimeError, OSError):
        _tell_uncached(config.CACHE_DIR)  # pyright: ignore[reportAttributeAccessIssue]
        return None
    finally:
        config.CACHE_DIR = numbas  # pyright: ignore[reportAttributeAccessIssue]


@functools.cache
def _tell_uncached(folder: str) -> None:
    warnings.warn(
        f"compiled kernels cannot be stored, neither in numba's own folder nor in {folder}, so every process compiles "
        "them again, which takes a minute or more. Set RETROGRADE_CACHE to a writable folder.",
        RetrogradeWarning,
        stacklevel=2,
    )


jit = _compiler(parallel=True, fastmath=_FAST)
"""Compiles a kernel."""
serial = _compiler()
"""Compiles what kernels call."""
inlined: Any = njit(forceinline=True, nogil=True)
"""Compiles what kernels call so often that a call would cost more than the work."""


def _address(typing: Any, number: Any) -> Any:

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(number), generate


address: Any = intrinsic(_address)
"""In a kernel: the memory at an address that came as a number, for `numba.carray`."""


@functools.cache
def _launch() -> None:
    # Starting its threads, numba sets the process's number of OpenMP threads, which is torch's too.
    before = torch.get_num_threads()
    numba_parallel._launch_threads()  # pyright: ignore[reportPrivateUsage]
    torch.set_num_threads(before)


def use_threads(size: int) -> int:
    """Use as many threads as torch would for `size` entries: waking them costs more than a short loop.

    Returns their number.
    """
    _launch()
    most: int = config.NUMBA_NUM_THREADS  # pyright: ignore[reportAttributeAccessIssue]
    wanted = min(torch.get_num_threads(), most) if size >= _GRAIN else 1
    if numba.get_num_threads() != wanted:
        numba.set_num_threads(wanted)
    return wanted
