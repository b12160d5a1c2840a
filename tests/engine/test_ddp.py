"""Two ranks over gloo: parameters stay equal, noise does not."""

from pathlib import Path

import pytest
import torch
from torch import nn

import retrograde as rg
from cases import batch, in_two_ranks, mlp, program, seeded


def worker(rank: int, folder: str) -> None:
    model = seeded(mlp)
    session = rg.attach(model, rg.Dither(scale=2), seed=3)
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    # Equal data on both ranks: without_sync shows the ranks' own noise.
    with parallel.no_sync():
        torch.sin(parallel(batch((16, 8)))).sum().backward()
    own = model[4].weight.grad.clone()
    model.zero_grad()
    for step in range(4):
        optimizer.zero_grad()
        torch.sin(parallel(batch((16, 8), seed=10 * step + rank))).square().mean().backward()
        optimizer.step()
    result = {
        "own": own,
        "parameters": {n: p.detach() for n, p in model.named_parameters()},
        "step": session.step,
        "calls": program(model[0]).total.calls,
    }
    torch.save(result, f"{folder}/rank{rank}.pt")


def test_two_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks' models stay identical to the last bit, while the same data meets different noise on each."""
    in_two_ranks(worker, tmp_path, monkeypatch)
    one, two = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert one["step"] == two["step"] == 4
    assert one["calls"] == two["calls"] == 5
    assert not torch.equal(one["own"], two["own"])
    start = seeded(mlp).state_dict()
    for name, value in one["parameters"].items():
        assert torch.equal(value, two["parameters"][name]), name
        assert not torch.equal(value, start[name]), name
