"""The numba kernels, but for convolutions (`retrograde.kernels.cpu_convolution`). A compiler comes with them.

Each gives the same bits on any number of threads.
"""

from retrograde.kernels.cpu_elementwise import (
    Levels,
    Statistics,
    count_zeros,
    dither,
    nsd,
    statistics,
)
from retrograde.kernels.cpu_linear import pack, product
from retrograde.kernels.cpu_lists import Lists, lists
from retrograde.kernels.cpu_threads import use_threads

__all__ = [
    "Levels",
    "Lists",
    "Statistics",
    "count_zeros",
    "dither",
    "lists",
    "nsd",
    "pack",
    "product",
    "statistics",
    "use_threads",
]
