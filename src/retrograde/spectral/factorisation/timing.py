"""Forward times of layers and models against each other, in turns."""

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import Tensor, nn

_ROUNDS = (7, 31)
"""Fewest and most."""
_SECONDS = 0.15
"""Rounds go on for so long."""
MARGIN = 0.95
"""A layer counts as faster below this share of the original's time: less may be noise."""
_TRIED = (1.0, 0.85, 0.7, 0.55, 0.4, 0.28, 0.18, 0.1)
"""Shares of the largest rank that are timed, from the top, until one is faster."""


def alternate(runs: Sequence[Callable[[], object]]) -> list[float]:
    """Median seconds of each run; all take turns, each round in the opposite order of the one before."""
    seconds: list[list[float]] = [[] for _ in runs]
    begun = time.perf_counter()
    with torch.no_grad():
        for run in runs:
            run()  # kernels are chosen, memory is taken
        for number in range(_ROUNDS[1]):
            if number >= _ROUNDS[0] and time.perf_counter() - begun > _SECONDS:
                break
            order = list(enumerate(runs))
            for i, run in reversed(order) if number % 2 else order:
                _wait()
                start = time.perf_counter()
                run()
                _wait()
                seconds[i].append(time.perf_counter() - start)
    return [median(each) for each in seconds]


def fastest_rank(layer: nn.Module, make: Callable[[int], nn.Module], largest: int, x: Tensor) -> int:
    """The largest rank tried whose two layers measure faster than the one; 0: none does."""
    for rank in dict.fromkeys(max(1, int(share * largest)) for share in _TRIED):
        pair = make(rank)
        before, after = alternate((lambda: layer(x), lambda pair=pair: pair(x)))
        if after < MARGIN * before:
            return rank
    return 0


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
