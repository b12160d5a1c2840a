"""Layers, models and helpers that several test files share."""

import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

import retrograde as rg

Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One layer kind: how to make it, and the shape of an input."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    call: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


def conv(dim: int, *args: Any, **options: Any) -> Callable[[], nn.Module]:
    return partial((nn.Conv1d, nn.Conv2d, nn.Conv3d)[dim - 1], *args, **options)


def transposed(dim: int, *args: Any, **options: Any) -> Callable[[], nn.Module]:
    return partial((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dim - 1], *args, **options)


def _convolutions() -> list[Case]:
    cases: list[Case] = []
    for dim in (1, 2, 3):
        size = ((9,), (7, 8), (5, 6, 5))[dim - 1]
        batched = (3, 4, *size)
        variants: dict[str, dict[str, Any]] = {
            "plain": {},
            "no_bias": {"bias": False},
            "stride": {"stride": 2, "padding": 1},
            "padding": {"padding": 2},
            "same_odd": {"padding": "same"},
            "valid": {"padding": "valid"},
            "dilation": {"dilation": 2, "padding": 2},
            "groups": {"groups": 2},
            "depthwise": {"groups": 4, "padding": 1},
            "replicate": {"padding": 1, "padding_mode": "replicate"},
            "reflect": {"padding": 1, "padding_mode": "reflect"},
            "circular": {"padding": 2, "padding_mode": "circular"},
        }
        cases += [Case(f"conv{dim}d_{n}", conv(dim, 4, 8, 3, **o), batched) for n, o in variants.items()]
        cases += [
            Case(f"conv{dim}d_same_even", conv(dim, 4, 6, 4, padding="same"), batched),
            Case(f"conv{dim}d_same_dilated", conv(dim, 4, 6, 2, padding="same", dilation=3), batched),
            Case(
                f"conv{dim}d_same_circular",
                conv(dim, 4, 6, 4, padding="same", padding_mode="circular"),
                batched,
            ),
            Case(f"conv{dim}d_unbatched", conv(dim, 4, 8, 3, padding=1), batched[1:]),
            Case(
                f"conv{dim}d_unbatched_reflect",
                conv(dim, 4, 8, 3, padding=1, padding_mode="reflect"),
                batched[1:],
            ),
            Case(f"conv{dim}d_empty", conv(dim, 4, 8, 3, padding=1), (0, *batched[1:])),
        ]
        turned: dict[str, dict[str, Any]] = {
            "plain": {},
            "stride": {"stride": 2, "padding": 1},
            "output_padding": {"stride": 2, "output_padding": 1},
            "groups": {"groups": 2, "stride": 2},
            "dilation": {"dilation": 2},
            "no_bias": {"bias": False},
        }
        cases += [
            Case(f"transposed{dim}d_{n}", transposed(dim, 4, 6, 3, **o), batched) for n, o in turned.items()
        ]
        output_size = [2 * n for n in size]
        cases += [
            Case(
                f"transposed{dim}d_output_size",
                transposed(dim, 4, 6, 3, stride=2, padding=1),
                batched,
                {"output_size": output_size},
            ),
            Case(f"transposed{dim}d_unbatched", transposed(dim, 4, 6, 3, stride=2), batched[1:]),
            Case(f"transposed{dim}d_empty", transposed(dim, 4, 6, 3), (0, *batched[1:])),
        ]
    cases.append(
        Case(
            "conv2d_mixed",
            conv(2, 4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
            (3, 4, 7, 8),
        )
    )
    return cases


LINEAR = [
    Case("linear_1d", partial(nn.Linear, 6, 5), (6,)),
    Case("linear_2d", partial(nn.Linear, 6, 5), (7, 6)),
    Case("linear_3d", partial(nn.Linear, 6, 5), (3, 4, 6)),
    Case("linear_no_bias", partial(nn.Linear, 6, 5, bias=False), (7, 6)),
    Case("linear_empty", partial(nn.Linear, 6, 5), (0, 6)),
    Case("linear_one_output", partial(nn.Linear, 6, 1), (7, 6)),
]
LAYERS = LINEAR + _convolutions()


class Turned(nn.Module):
    """A linear layer whose weight lies as (i, o), as in GPT-2."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        # One product for autocast, as the kind that it is registered as: the sum would be in the bias's float32.
        return nn.functional.linear(x, self.weight.T, self.bias)


rg.register_layer(Turned, rg.LinearKind(turned=True))


def mlp(*, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(8, 16, bias=bias),
        nn.ReLU(),
        nn.Linear(16, 16, bias=bias),
        nn.Tanh(),
        nn.Linear(16, 4, bias=bias),
    )


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 16, 4),
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (16, 8)),
    "cnn": (cnn, (6, 3, 8, 8)),
}


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A model whose initial weights depend on `seed` alone."""
    torch.manual_seed(seed)
    return make()


def batch(shape: Sequence[int], seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gradients(
    model: nn.Module, x: Tensor, forward: Callable[..., Any] | None = None, **call: Any
) -> Gradients:
    """Gradients of a fixed, non-linear loss for every parameter and, under ``"input"``, for `x`."""
    model.zero_grad(set_to_none=True)
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    z = (model if forward is None else forward)(x, **call)
    ramp = torch.linspace(-1.0, 1.0, z.numel(), dtype=z.dtype).reshape(z.shape)
    (torch.sin(z) * ramp).sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    if x.grad is not None:
        found["input"] = x.grad
    return found


def assert_same(found: Gradients, expected: Gradients, relative: float = 1e-6) -> None:
    """Equal keys, and equal values to `relative` of each expected tensor's largest magnitude.

    A gradient that vanishes by symmetry (a bias before BatchNorm) is held to a thousandth of
    the largest one's tolerance.
    """
    assert found.keys() == expected.keys()
    largest = max((float(v.abs().max()) for v in expected.values() if v.numel()), default=0.0)
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        assert found[name].dtype == value.dtype, name
        if value.numel():
            worst = float((found[name] - value).abs().max())
            assert worst <= relative * max(float(value.abs().max()), 1e-3 * largest), (name, worst)


def assert_bitwise(found: Gradients, expected: Gradients) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, shape: Sequence[int], steps: int, first: int = 0
) -> None:
    """Plain training on batches that depend on the step alone."""
    for step in range(first, first + steps):
        optimizer.zero_grad()
        torch.sin(model(batch(shape, seed=100 + step))).square().mean().backward()
        optimizer.step()


def program(layer: nn.Module) -> Any:
    """The program of an attached layer."""
    return layer.__dict__["_retrograde"]


NEUTRAL: dict[str, rg.Dither] = {
    "zero_scale": rg.Dither(scale=0),
    "tiny_scale": rg.Dither(scale=1e-7, bits=None),
}


def in_two_ranks(worker: Callable[[int, str], None], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run ``worker(rank, folder)`` in two processes of one gloo group.

    Args:
        worker: a function of a test module's top level; it leaves its findings in `folder`.
        folder: shared by both ranks.
        monkeypatch: gives the processes this one's import path.
    """
    monkeypatch.setenv("PYTHONPATH", ":".join(p for p in sys.path if p))
    mp.spawn(_rank, args=(worker, str(folder)), nprocs=2, join=True)


def _rank(rank: int, worker: Callable[[int, str], None], folder: str) -> None:
    torch.set_num_threads(1)
    # A rank that waits in vain fails within the minute, instead of holding the suite.
    torch.distributed.init_process_group(
        "gloo", timeout=timedelta(seconds=60), init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    try:
        worker(rank, folder)
        # A rank that is gone while the other takes its wrappers down would be waited for.
        gc.collect()
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()
