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
    """torch's generators, and those of the CUDA devices."""

    def __init__(self, cuda: list[torch.device]) -> None:
        self._cuda = cuda

    def state_dict(self) -> list[Tensor]:
        """Where they are."""
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self._cuda)]

    def load_state_dict(self, state: list[Tensor]) -> None:
        """Go on from there; torch refuses what is no state of its generators."""
        torch.set_rng_state(state[0])
        for device, of_device in zip(self._cuda, state[1:], strict=True):
            torch.cuda.set_rng_state(of_device, device)
