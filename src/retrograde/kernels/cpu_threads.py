"""How the numba kernels are compiled, and on how many threads they run: torch's own.

numba's cache on disk looks at the file of a kernel alone: after a change of what kernels in other files call, touch
those files.
"""

import functools
import os
import sys
from typing import Any

import numba
import torch
from numba import njit
from numba.core import cgutils, config, types
from numba.extending import intrinsic
from numba.np.ufunc import parallel as numba_parallel

if sys.platform == "linux" and "NUMBA_THREADING_LAYER" not in os.environ:
    # The layer that runs in torch's own OpenMP threads: two pools on the same cores would wait for each other.
    config.THREADING_LAYER = "omp"  # pyright: ignore[reportAttributeAccessIssue]

_GRAIN = 32768
"""Entries below which one thread works alone, as in torch."""

# Sums may be contracted and reordered, which vectorises them; NaN and Inf keep their meaning.
_FAST = {"contract", "reassoc", "nsz"}
jit: Any = njit(parallel=True, fastmath=_FAST, cache=True, nogil=True)
"""Compiles a kernel."""
serial: Any = njit(cache=True, nogil=True)
"""Compiles what kernels call."""
inlined: Any = njit(forceinline=True, nogil=True)
"""Compiles what kernels call so often that a call would cost more than the work."""


@intrinsic
def address(typing: Any, number: Any) -> Any:
    """In a kernel: the memory at an address that came as a number, for `numba.carray`."""
    return types.voidptr(number), lambda context, builder, signature, args: builder.inttoptr(
        args[0], cgutils.voidptr_t
    )


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
