"""Is this machine fit? What ``retrograde doctor`` asks."""

import copy
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from retrograde.errors import RetrogradeError
from retrograde.kernels import compiled
from retrograde.lab import data as lab_data
from retrograde.lab import machine, precisions, tensorboard
from retrograde.methods.dither import Dither
from retrograde.methods.registry import available
from retrograde.session import attach


@dataclass(frozen=True)
class Check:
    """One question and its answer.

    Attributes:
        name: what was looked at.
        status: ``ok``, ``note`` (works, with less) or ``failed``.
        detail: what was found, and what to do.
        seconds: that it took.
    """

    name: str
    status: str
    detail: str
    seconds: float


Note = Callable[[str], None]
"""Told what happens now."""


def run_checks(
    data_dir: Path | None = None,
    begin: Note = lambda name: None,
    note: Note = lambda line: None,
) -> list[Check]:
    """All checks, in order; none raises.

    Args:
        data_dir: folder that holds data sets.
        begin: told the name of each check before it runs.
        note: told by name what a long one is doing, and how long each took.
    """
    found: list[Check] = []
    for name, check in (
        ("machine", _machine),
        ("versions", _versions),
        ("methods", _methods),
        ("gradients", _gradients),
        ("precisions", _precisions),
        ("compile", _compile),
        ("kernels", lambda: _kernels(lambda what: note(f"kernels: {what}"))),
        ("accelerator", _accelerator),
        ("data sets", lambda: _data(data_dir)),
        ("TensorBoard", _tensorboard),
    ):
        begin(name)
        start = time.perf_counter()
        try:
            status, detail = check()
        except Exception as error:  # a doctor reports whatever is broken and goes on
            status, detail = "failed", f"{type(error).__name__}: {error}"
        found.append(Check(name, status, detail, time.perf_counter() - start))
        note(f"{name}: {found[-1].seconds:.1f} s")
    return found


def _machine() -> tuple[str, str]:
    m = machine.describe(torch.device("cpu"))
    cpu = f"{m['cpu']} ({m['instructions']})"
    return "ok", f"{cpu}, {m['cores']} cores, {m['memory_gib']} GiB, {m['threads']} torch threads"


def _versions() -> tuple[str, str]:
    return "ok", f"Python {sys.version.split()[0]}, torch {torch.__version__}"


def _methods() -> tuple[str, str]:
    return "ok", ", ".join(available())


def _gradients() -> tuple[str, str]:
    """An attached layer with the neutral setting gives autograd's gradients; a dithered one comes close on average."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 32, generator=generator)
    plain = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 8))
    expected = _gradient(plain, x)
    neutral = copy.deepcopy(plain)
    session = attach(neutral, Dither(scale=0.0), seed=0)
    worst = float((_gradient(session.model, x) - expected).abs().max())
    dithered = copy.deepcopy(plain)
    session = attach(dithered, Dither(scale=1.0), seed=0)
    draws = [_gradient(session.model, x) for _ in range(200)]
    bias = float((torch.stack(draws).mean(0) - expected).norm() / expected.norm())
    detail = f"neutral setting: largest difference {worst:.1e}; dithered, mean of 200 draws: {bias:.1%} off"
    return ("ok" if worst < 1e-5 and bias < 0.2 else "failed"), detail


def _gradient(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    gradients = torch.autograd.grad(model(x).square().mean(), list(model.parameters()))
    return torch.cat([gradient.flatten() for gradient in gradients])


def _precisions() -> tuple[str, str]:
    """A small table of what torch's own products take, and a warning where autocast would only cost time."""
    measured = precisions.measure()
    found: list[str] = []
    for op, layer in (("linear", "linear layer"), ("conv", "convolution")):
        rows = [one for one in measured if one.op == op]
        each = ", ".join(f"{one.name} {one.seconds * 1e3:.3g} ms (×{one.ratio:.2g})" for one in rows)
        found.append(f"{layer} {rows[0].shape}, fastest in {precisions.fastest(measured, op).name}: {each}")
    slower = [one for one in measured if one.name == "bfloat16" and one.ratio < 1]
    if not slower:
        return "ok", "\n".join(found)
    by = " and ".join(f"{1 / one.ratio:.1f} times ({one.op})" for one in slower)
    verdict = "train in float32, without autocast"
    if len(slower) < sum(one.name == "bfloat16" for one in measured):
        verdict = "autocast pays only for models that are made of the other kind of layer"
    found.append(f"bfloat16 takes longer than float32 here, {by}: {verdict}.")
    return "note", "\n".join(found)


def _compile() -> tuple[str, str]:
    model = nn.Linear(4, 4)
    attach(model, Dither(scale=1.0), seed=0)
    try:
        torch.compile(model, fullgraph=True)(torch.randn(2, 4)).sum().backward()
    except Exception as error:  # Inductor needs a compiler, and its errors are of many kinds
        first = (str(error).splitlines() or [""])[0]
        return (
            "note",
            f"torch.compile does not work here ({first}); eager training does. Install a C++ compiler.",
        )
    return "ok", "torch.compile(fullgraph=True) trains an attached layer"


def _kernels(note: Note) -> tuple[str, str]:
    """Compile them, so that no training run has to."""
    if not compiled.usable():
        return "note", "torch's own alone: numba cannot be imported. Install it: pip install numba"
    from retrograde.kernels.rehearse import (
        rehearse,  # a compiler comes with it: not for every command's start
    )

    found: dict[str, list[str]] = {}
    for one in rehearse(note):
        found.setdefault(one.layer, []).append(f"{one.zeros:.0%} zeros: {one.kernel}")
    return "ok", "\n".join(f"{layer}, fastest at {', '.join(each)}" for layer, each in found.items())


def _accelerator() -> tuple[str, str]:
    if torch.cuda.is_available():
        return "ok", torch.cuda.get_device_name(0)
    return "note", "no CUDA device: training runs on the processor"


def _data(data_dir: Path | None) -> tuple[str, str]:
    where = data_dir or os.environ.get("RETROGRADE_DATA")
    try:
        names = lab_data.available(data_dir)
    except RetrogradeError as error:
        return "failed", str(error)
    if where is None:
        return "note", f"{', '.join(names)}; set RETROGRADE_DATA for more"
    return "ok", f"{', '.join(names)} (in {where})"


def _tensorboard() -> tuple[str, str]:
    if tensorboard.is_available():
        return "ok", "installed"
    return "note", "not installed: `train` writes no TensorBoard logs. Install retrograde[tensorboard]."
