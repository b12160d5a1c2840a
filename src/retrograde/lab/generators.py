"""torch's random generators, kept apart: what one run draws does not depend on what else runs in the process."""

import contextlib
from collections.abc import Generator

import torch
from torch import Tensor


@contextlib.contextmanager
def seeded(seed: int, cuda: list[torch.device]) -> Generator[None]:
    """torch's generators, those of the CUDA devices too, at `seed`, and as they were afterwards."""
    with torch.random.fork_rng(cuda):
        torch.manual_seed(seed)
        yield


class Generators:
    """One run's own stream of torch's random numbers.

    Args:
        seed: where it begins.
        cuda: devices whose generators belong to it beside the CPU's.
    """

    def __init__(self, seed: int, cuda: list[torch.device]) -> None:
        self._cuda = cuda
        # None while in use: torch's own generators hold the state then.
        self._kept: list[Tensor] | None
        with seeded(seed, cuda):
            self._kept = self._read()

    @contextlib.contextmanager
    def in_use(self) -> Generator[None]:
        """torch draws from this stream, and from its former ones afterwards."""
        with torch.random.fork_rng(self._cuda):
            if self._kept is not None:
                self._write(self._kept)
            self._kept = None
            try:
                yield
            finally:
                self._kept = self._read()

    def state_dict(self) -> list[Tensor]:
        """Where the stream is, in use or not."""
        return self._read() if self._kept is None else self._kept

    def load_state_dict(self, state: list[Tensor]) -> None:
        """Go on from there, in the next `in_use`."""
        # torch refuses here what is no state of its generators.
        with torch.random.fork_rng(self._cuda):
            self._write(state)
        self._kept = state

    def _read(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self._cuda)]

    def _write(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for device, state in zip(self._cuda, states[1:], strict=True):
            torch.cuda.set_rng_state(state, device)
