"""Projected gradients added up over ranks: the same as whole ones, in fewer bytes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import retrograde as rg
from cases import assert_bitwise, assert_same, batch, in_two_ranks, seeded
from retrograde.errors import AttachError, OptionError


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 8, 3, stride=2, groups=2),
        nn.Flatten(),
        nn.Linear(72, 6),
    )


def trained(
    rank: int, *, shared: bool, penalty: bool = False, dtype: torch.dtype = torch.float32, norm: bool = False
) -> dict[str, Any]:
    model = seeded(net).to(dtype)
    if norm:
        torch.nn.utils.weight_norm(model[4])
    rg.attach(model, rg.Spectral(residual="unbiased", rank=4, every=3, skip_head=False), seed=3)
    parallel = nn.parallel.DistributedDataParallel(model)
    sent: list[int] = []
    if shared:
        rg.spectral.share_projections(parallel)
        reduce = torch.distributed.all_reduce

        def counting(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            sent.append(tensor.numel())
            return reduce(tensor, *args, **kwargs)

        torch.distributed.all_reduce = counting  # type: ignore[assignment]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(7):
        optimizer.zero_grad()
        loss = torch.sin(parallel(batch((4, 8, 7, 7), seed=10 * step + rank).to(dtype))).square().mean()
        if penalty:
            loss = loss + model[4].weight.square().sum()
        loss.backward()
        optimizer.step()
    if shared:
        torch.distributed.all_reduce = reduce
    return {"parameters": dict(model.state_dict()), "sent": sent}


def worker(rank: int, folder: str) -> None:
    found: dict[str, Any] = {"whole": trained(rank, shared=False), "shared": trained(rank, shared=True)}
    try:
        trained(rank, shared=True, penalty=True)
    except AttachError as error:
        found["refused"] = str(error)
    for name, options in {"bfloat16": {"dtype": torch.bfloat16}, "norm": {"norm": True}}.items():
        found[name] = [trained(rank, shared=shared, **options)["parameters"] for shared in (False, True)]
    torch.save(found, f"{folder}/rank{rank}.pt")


def test_two_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through steps and refreshes: ranks agree to the last bit, and with plain DDP to rounding."""
    in_two_ranks(worker, tmp_path, monkeypatch)
    one, two = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert_bitwise(one["shared"]["parameters"], two["shared"]["parameters"])
    assert_same(one["shared"]["parameters"], one["whole"]["parameters"], 1e-4)
    whole = sum(p.numel() for p in net().parameters())
    # The first step's are whole: only its backward pass tells how the layers multiply.
    first, *gradients = [size for size in one["shared"]["sent"] if size > 500]
    assert first == whole
    assert len(gradients) == 6
    assert max(gradients) < 0.5 * whole
    assert "'4'" in one["refused"]
    assert "penalty" in one["refused"]
    for name, tolerance in (("bfloat16", 0.02), ("norm", 1e-4)):
        assert_bitwise(one[name][1], two[name][1])
        assert_same(one[name][1], one[name][0], tolerance)


def test_nothing_to_share_is_refused() -> None:
    model = nn.Linear(64, 64)
    session = rg.attach(model, rg.Dither())

    class Parallel:
        module = model

    with pytest.raises(OptionError, match="nothing to share"):
        rg.spectral.share_projections(Parallel(), session)  # type: ignore[arg-type]
